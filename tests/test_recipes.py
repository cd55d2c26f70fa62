"""Recipes that bring one run to its end, killed and judged from outside; and changed copies of it.

`recipes/worker.py` and `many.py` are in test_queue.py.
"""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, App, Process, wait_for
from provider import COMPANY, Provider, tool_calls

FILES = ("agent.py", "config.py", "tools.py")
# What is only DBOS's, and has no unixepoch() of ours, fails here: see the README's limits.
OLD_SQLITE = sys.version_info >= (3, 12) and sqlite3.sqlite_version_info < (3, 42)
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "COLUMNS": "80",
    "DEMO_LATENCY": "0",
    "DEMO_FAILURE_RATE": "0",
}
ONE_STEP_EACH = """SELECT function_id, function_name FROM {dbos}operation_outputs
    ORDER BY function_id"""


def copy_project(folder: Path, *recipes: str) -> Path:
    """Copy the three files, and some recipes: their database and outbox are in the copy, too."""
    for name in FILES:
        shutil.copy(PROJECT / name, folder)
    for name in recipes:
        (folder / "recipes").mkdir(exist_ok=True)
        shutil.copy(PROJECT / "recipes" / f"{name}.py", folder / "recipes")
    return folder


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a person would, in a copy of the project; a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def in_one_line(text: str) -> str:
    """Undo the folding to 80 columns."""
    return " ".join(text.split())


def database(app: App) -> dict[str, str]:
    """Return the setting by which a copy of the project uses the test's database."""
    return {"DBOS_SYSTEM_DATABASE_URL": app.database_url}


def test_importing_a_recipe_prints_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    recipes = ("plain", "own_tool", "approval", "durability")
    copy_project(tmp_path, *recipes)
    before = sorted(tmp_path.rglob("*"))
    done = python(tmp_path, "-B", "-c", f"from recipes import {', '.join(recipes)}")
    assert (done.returncode, done.stdout) == (0, "")
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- the plain pattern

SLOW_PLAIN = """
import asyncio, tools
from recipes import plain
tools.service.latency = 1
asyncio.run(plain.main())
"""
TABLE = "SELECT 1 FROM sqlite_master WHERE name = 'operation_outputs'"


def test_the_plain_pattern_survives_a_kill(tmp_path: Path) -> None:
    copy_project(tmp_path, "plain")
    warned = ("-W", "ignore:`DBOSAgent` is deprecated", "-m", "recipes.plain")
    if OLD_SQLITE:
        assert "NOT NULL constraint failed" in python(tmp_path, *warned).stdout
        return
    app = App(tmp_path, f"sqlite:///{tmp_path / 'plain.sqlite'}")
    first_step = "SELECT output, completed_at_epoch_ms FROM operation_outputs WHERE function_id = 1"
    command = [sys.executable, "-c", SLOW_PLAIN]
    with subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT) as process:
        wait_for(lambda: app.rows(TABLE) and app.rows(first_step), "step 1")
        process.kill()
    stored = app.rows(first_step)
    assert app.statuses() == {"PENDING": 1}
    again = python(tmp_path, *warned)
    assert again.returncode == 0, again.stdout
    assert "company_name='Acme'" in again.stdout
    assert app.rows(first_step) == stored, "the checkpoint is the one of the killed process"
    assert app.statuses() == {"SUCCESS": 1}


# ---------------------------------------------------------------- DBOSDurability


@pytest.mark.parametrize(("first", "then"), [("", "durability"), ("durability", "")])
@pytest.mark.parametrize("left", ["killed", "failed"])
def test_a_run_begun_under_one_of_dbos_agent_and_dbos_durability_ends_under_the_other(
    app: App, left: str, first: str, then: str
) -> None:
    if left == "killed":
        begun = app.run("Acme", recipe=first, KILL_AT="before commit 3")
        assert begun.wait() == -signal.SIGKILL
    else:
        begun = app.run("Acme", recipe=first, OUTAGE="1")
        assert begun.wait() == 1, begun.stderr
    again = app.run("Acme", recipe=then)
    assert again.wait() == 0, again.stderr
    told = "interrupted" if left == "killed" else "resumes at step 3"
    assert told in in_one_line(again.stdout)
    assert again.stdout.count("restored") == 2
    assert app.repeated() == []
    assert app.status() == "SUCCESS"
    assert app.rows(ONE_STEP_EACH) == [
        (1, "research_agent__model.request"),
        (2, "fetch_company_overview"),
        (3, "fetch_financial_metrics"),
        (4, "research_agent__model.request"),
    ]
    replayed = app.run("Acme", recipe=first)
    assert "finished earlier" in in_one_line(replayed.stdout)


@pytest.mark.parametrize(
    "point", ["after enqueue", "inside 1", "after commit 1", "before commit 2", "after commit 4"]
)
def test_a_run_under_dbos_durability_killed_at_any_point_repeats_no_committed_step(
    app: App, point: str
) -> None:
    assert app.run("Acme", recipe="durability", KILL_AT=point).wait() == -signal.SIGKILL
    again = app.run("Acme", recipe="durability")
    assert again.wait() == 0, again.stderr
    assert app.repeated() == []
    assert [step for step, _ in app.rows(ONE_STEP_EACH)] == [1, 2, 3, 4]


# ---------------------------------------------------------------- a tool of one's own

METRICS = {"revenue_usd_millions": 1.5, "revenue_growth_percent": 2, "net_margin_percent": 3}
ANSWER = (200, json.dumps({"company_name": "Acme", **METRICS}).encode())
Answer = tuple[int, bytes] | None


class MetricsServer(ThreadingHTTPServer):
    """A company-data service that answers as its script says, and then well."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        """Status and body of the next answers; None cuts the connection."""
        self.asked: list[tuple[str, str | None]] = []
        """Path and idempotency key of each request."""
        super().__init__(("127.0.0.1", 0), MetricsHandler)

    @property
    def environment(self) -> dict[str, str]:
        return {"METRICS_URL": f"http://127.0.0.1:{self.server_address[1]}/v1/companies"}


class MetricsHandler(BaseHTTPRequestHandler):
    server: MetricsServer

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Idempotency-Key"]))
        answer = self.server.script.pop(0) if self.server.script else ANSWER
        if answer:
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    with MetricsServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def own_tool(app: App, server: MetricsServer, **environment: str) -> Process:
    """Run the recipe to its end."""
    return app.run("Acme", recipe="own_tool", **{**server.environment, **environment})


def test_a_tool_of_ones_own_is_retried_with_one_key_and_then_stored(
    app: App, server: MetricsServer
) -> None:
    """A dropped connection, an overload, garbage, another shape, and then the answer."""
    server.script = [None, (503, b""), (429, b""), (200, b"garbage"), (200, b"[]")]
    first = own_tool(app, server)
    assert first.wait() == 0, first.stderr
    assert "(attempt 6 of 10)" in first.stdout
    assert "revenue_usd_millions    1.5" in first.stdout
    assert len(server.asked) == 6
    [(path, key)] = set(server.asked)
    assert path == "/v1/companies?name=Acme"
    assert re.fullmatch(r"research-acme-\w+:fetch_metrics_by_http:[0-9a-f]{16}", f"{key}")
    again = own_tool(app, server, METRICS_URL="")
    assert "finished earlier" in in_one_line(again.stdout), "a replay needs no server"
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("point", "requests"),
    [("before commit 2", 1), ("inside 2", 1), ("before commit 3", 2), ("after commit 3", 1)],
)
def test_a_tool_of_ones_own_that_is_killed_asks_again_only_in_the_step_in_flight(
    app: App, server: MetricsServer, point: str, requests: int
) -> None:
    assert own_tool(app, server, KILL_AT=point).wait() == -signal.SIGKILL
    again = own_tool(app, server)
    assert again.wait() == 0, again.stderr
    assert len(server.asked) == requests
    assert len(set(server.asked)) == 1, "the same idempotency key"
    assert app.repeated() == []
    assert [step for step, _ in app.rows(ONE_STEP_EACH)] == [1, 2, 3, 4]


def test_an_unknown_company_goes_back_to_the_model_without_a_retry(
    app: App, server: MetricsServer
) -> None:
    server.script = [(404, b"")]
    finished = own_tool(app, server)
    assert finished.wait() == 0, finished.stderr
    assert "attempt" not in finished.stdout
    assert [name for _, name in app.rows(ONE_STEP_EACH)][2:5] == [
        "fetch_metrics_by_http",
        "research_agent__model.request",
        "fetch_metrics_by_http",
    ]


def test_what_a_server_refuses_is_not_retried_and_the_same_command_goes_on_later(
    app: App, server: MetricsServer
) -> None:
    server.script = [(403, b"")]
    refused = own_tool(app, server)
    assert refused.wait() == 1
    assert refused.stderr.startswith("error: the run failed: RefusedError: status 403\n")
    assert len(server.asked) == 1
    again = own_tool(app, server)
    assert again.wait() == 0, again.stderr
    assert "failed (RefusedError: status 403), resumes at step 3" in in_one_line(again.stdout)
    assert again.stdout.count("restored") == 2
    assert app.repeated() == []


def test_no_header_of_a_request_is_stored_when_the_connection_fails(
    app: App, server: MetricsServer
) -> None:
    server.script = [None] * 10
    assert own_tool(app, server).wait() == 1
    assert len(server.asked) == 10
    [(error,)] = app.rows("SELECT error FROM {dbos}operation_outputs WHERE function_id = 3")
    stored = base64.b64decode(error)
    assert b"UnavailableError" in stored
    assert b"dempotency" not in stored, "the request, and an API key with it"


@pytest.mark.parametrize("url", ["", "metrics.example.com", "http://me:pass/word@127.0.0.1/"])
def test_without_an_address_no_run_is_left_behind(app: App, url: str) -> None:
    refused = app.run("Acme", recipe="own_tool", METRICS_URL=url)
    assert refused.wait() == 2
    assert refused.stderr.startswith("error: METRICS_URL is not set to an address")
    assert ":pass" not in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert app.statuses() == {}


READ_ERROR = """
import config
client, _ = config.open_database(config.load_settings())
[run] = client.list_workflows()
print(type(run.error).__module__, run.error)
"""


def test_what_a_recipe_that_is_run_with_m_stores_can_be_loaded_by_other_programs(
    tmp_path: Path, server: MetricsServer
) -> None:
    copy_project(tmp_path, "own_tool")
    server.script = [(403, b"")]
    command = ("-m", "recipes.own_tool", "Acme")
    failed = python(tmp_path, *command, **server.environment)
    assert failed.returncode == 1, failed.stdout
    assert python(tmp_path, "-c", READ_ERROR).stdout == "recipes.own_tool status 403\n"
    again = python(tmp_path, *command, **server.environment)
    assert again.returncode == 0, again.stdout
    assert "failed (RefusedError: status 403), resumes at step 3" in in_one_line(again.stdout)


# ---------------------------------------------------------------- a person approves

WAITS = "SELECT 1 FROM {dbos}operation_outputs WHERE function_name = 'DBOS.sleep'"
BUILDS = ["", "durability"]


def start_approval(app: App, build: str = "", **environment: str) -> tuple[Process, list[str]]:
    """Start the command; return it when its run waits, and the words that say whom to answer."""
    process = app.start("Acme", recipe="approval", patches={"build": build}, **environment)
    process.until_prints("or, in place of yes")
    # `recv` has noted until when it waits.
    wait_for(lambda: app.rows(WAITS), "the run to wait")
    assert 'may the model call notify_sales({"company_name":"Acme"})?' in process.stdout
    [command] = re.findall(r"answer: uv run -m recipes\.approval (.* yes)\n", process.stdout)
    return process, shlex.split(command)[:-1]


def leave_waiting(app: App, build: str = "") -> list[str]:
    """Kill the command while its run waits."""
    process, question = start_approval(app, build)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return question


def answer(app: App, *words: str) -> Process:
    """Answer as a person does."""
    return app.run(*words, recipe="approval")


def refusal(process: Process) -> str:
    """Return why an answer was refused."""
    assert process.wait() == 2, process.stdout
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    return process.stderr


def outbox(app: App) -> list[str]:
    """Return the e-mails that were sent."""
    path = app.folder / "outbox.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("word", ["yes", "no"])
def test_a_person_answers_while_nothing_runs_and_the_effect_happens_once_or_never(
    app: App, word: str, build: str
) -> None:
    question = leave_waiting(app, build)
    assert leave_waiting(app, build) == question, "a rerun asks the same question again"
    sent = answer(app, *question, word, *([] if word == "yes" else ["not", "this", "year"]))
    assert sent.wait() == 0, sent.stderr
    assert outbox(app) == []
    again = app.run("Acme", recipe="approval", patches={"build": build})
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 5 finished steps" in in_one_line(again.stdout)
    assert ("  A person says no: not this year\n" in again.stdout) == (word == "no")
    assert len(outbox(app)) == (word == "yes")
    assert app.status() == "SUCCESS"
    assert app.repeated() == []
    assert len(app.ledger("effect")) == 4, "two lookups and two model requests"
    replay = app.run("Acme", recipe="approval", patches={"build": build})
    assert "finished earlier" in in_one_line(replay.stdout)
    assert len(outbox(app)) == (word == "yes")


def test_a_run_that_waits_in_a_process_goes_on_when_it_is_answered(app: App) -> None:
    process, question = start_approval(app)
    assert answer(app, *question, "yes").wait() == 0
    assert process.wait() == 0, process.stderr
    assert "  the answer is yes\n" in process.stdout
    assert len(outbox(app)) == 1


def test_an_approval_that_was_asked_under_dbos_agent_is_carried_out_under_dbos_durability(
    app: App,
) -> None:
    question = leave_waiting(app)
    assert answer(app, *question, "yes").wait() == 0
    again = app.run("Acme", recipe="approval", patches={"build": "durability"})
    assert again.wait() == 0, again.stderr
    assert app.repeated() == []
    assert len(outbox(app)) == 1


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("point", "times"),
    [
        ("before body 5", 1),
        ("before commit 7", 2),
        ("after commit 7", 1),
        ("before outcome SUCCESS", 1),
    ],
)
def test_a_process_killed_around_the_approved_effect_has_it_only_once(
    app: App, point: str, times: int, build: str
) -> None:
    question = leave_waiting(app, build)
    assert answer(app, *question, "yes").wait() == 0
    patches = {"build": build}
    killed = app.run("Acme", recipe="approval", patches=patches, KILL_AT=point)
    assert killed.wait() == -signal.SIGKILL, killed.stdout
    again = app.run("Acme", recipe="approval", patches=patches)
    assert again.wait() == 0, again.stderr
    printed = killed.stdout + again.stdout
    assert printed.count("notify_sales sends the e-mail") == times, "how often the step ran"
    assert len(outbox(app)) == 1
    assert app.repeated() == []


def test_only_the_first_answer_to_a_call_counts_and_the_second_is_told_so(app: App) -> None:
    question = leave_waiting(app)
    assert answer(app, *question, "no", "never").wait() == 0
    told = f"call {question[-1]} has received its answer: the first one counts."
    assert told in refusal(answer(app, *question, "yes")), "sent, but not received yet"
    finished = app.run("Acme", recipe="approval")
    assert "  A person says no: never\n" in finished.stdout
    assert told in refusal(answer(app, *question, "yes")), "received"
    assert outbox(app) == []


def test_a_call_id_that_a_provider_uses_again_is_another_question(
    sqlite_app: App, provider: Provider
) -> None:
    """And what a provider puts into it does not reach the command that a person copies."""
    again = tool_calls(("notify_sales", json.dumps(COMPANY)))
    again["choices"][0]["message"]["tool_calls"][0]["id"] = "x; touch pwned #"
    provider.custom, provider.script = again, ["custom", "custom"]
    process, question = start_approval(sqlite_app, **provider.environment)
    assert all(re.fullmatch("[a-z0-9-]+", word) for word in question)
    assert answer(sqlite_app, *question, "no").wait() == 0
    wait_for(lambda: process.stdout.count("  answer: ") == 2, "the next question")
    line = process.stdout.rpartition("  answer: uv run -m recipes.approval ")[2]
    assert line.split()[2] != question[2]
    assert answer(sqlite_app, *line.split()[:3], "yes").wait() == 0
    assert process.wait() == 0, process.stderr
    assert len(outbox(sqlite_app)) == 1


def test_an_answer_that_nothing_waits_for_is_told_so(app: App) -> None:
    option, run_id, call_id = leave_waiting(app)
    assert "no run unknown is stored" in refusal(answer(app, option, "unknown", call_id, "yes"))
    told = refusal(answer(app, option, run_id, "unknown", "yes"))
    assert f"run {run_id} has not asked about a call unknown." in told
    for words in (["Yes"], ["maybe"], []):
        unclear = answer(app, option, run_id, call_id, *words)
        assert unclear.wait() == 2
        assert "yes|no" in unclear.stderr
    assert app.rows("SELECT * FROM {dbos}notifications") == []


def test_a_failed_run_takes_no_answer_until_its_command_has_made_it_wait_again(app: App) -> None:
    """Its rewind would delete the answer."""
    question = leave_waiting(app)
    app.rows("UPDATE {dbos}workflow_status SET status = 'ERROR'")
    assert "If it failed, run its command first." in refusal(answer(app, *question, "yes"))
    process, asked_again = start_approval(app)
    assert asked_again == question
    assert answer(app, *question, "yes").wait() == 0
    assert process.wait() == 0, process.stderr
    assert len(outbox(app)) == 1


def test_an_answer_meets_a_database_that_is_not_there_with_one_clear_error(tmp_path: Path) -> None:
    app = App(tmp_path, "postgresql://nobody@127.0.0.1:1/nothing")
    done = answer(app, "--answer", "run", "call", "yes")
    assert done.wait() == 2
    assert done.stderr.startswith("error: the database (Postgres nothing on 127.0.0.1) cannot be")


def test_the_printed_command_answers_a_run_that_is_run_with_m(tmp_path: Path) -> None:
    copy_project(tmp_path, "approval")
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "recipes.approval", "Acme"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        wait_for(lambda: "or, in place of yes" in log.read_text(), "the question")
        process.kill()
    [command] = re.findall(r"answer: uv run (.*)\n", log.read_text())
    assert python(tmp_path, *shlex.split(command)).returncode == 0
    again = python(tmp_path, "-m", "recipes.approval", "Acme")
    assert again.returncode == 0, again.stdout
    assert "interrupted" in again.stdout
    assert len((tmp_path / "outbox.txt").read_text().splitlines()) == 1


# ---------------------------------------------------------------- make it yours

CALL = "payload = await service.financials(company_name, key)\n"
BUGS = {
    'KeyError("metrics")': CALL + '        payload = payload["metrics"]\n',
    "AttributeError(\"'dict' object has no attribute 'metrics'\")": (
        CALL + "        payload = payload.metrics  # type: ignore\n"
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_mended_while_its_run_is_half_done(app: App, tmp_path: Path, bug: str) -> None:
    """It is neither retried as if it were an outage nor sent to the model as its mistake."""
    code = copy_project(tmp_path).joinpath("tools.py").read_text()
    assert code.count(CALL) == 1
    (tmp_path / "tools.py").write_text(code.replace(CALL, BUGS[bug]))
    failed = python(tmp_path, "agent.py", "Acme", **database(app))
    assert failed.returncode == 1, failed.stdout
    error = eval(bug)  # as Python would show it
    told = f"{type(error).__name__}: {error}"
    assert f"error: the run failed: {told}" in failed.stdout
    assert failed.stdout.count("step 3: fetch_financial_metrics calls the service") == 1
    (tmp_path / "tools.py").write_text(code)
    again = python(tmp_path, "agent.py", "Acme", **database(app))
    assert again.returncode == 0, again.stdout
    assert f"failed ({told}), resumes at step 3." in in_one_line(again.stdout)
    assert re.findall(r"^ (\d)  .* restored", again.stdout, re.MULTILINE) == ["1", "2"]
    assert re.findall(r"^  step (\d): \w+ (?:calls|asks)", again.stdout, re.MULTILINE) == ["3"]
    bill = (tmp_path / "service.log").read_text().splitlines()
    assert [line.split()[-1] for line in bill] == ["billed", "billed", "record"]
    assert app.status() == "SUCCESS"


FAIL = """
import logging, threading
import agent, config

class Listener(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("Exception encountered in asynchronous"):
            logged.set()

logged = threading.Event()
executor = agent.Executor(config.load_settings())
logging.getLogger("dbos").addHandler(Listener())
try:
    agent.research(executor, executor.request("Acme"))
except agent.RunFailed:
    assert logged.wait(60)
    print("lost:", executor.lost)
"""


def test_a_run_that_has_failed_is_not_taken_for_one_that_dbos_has_given_up(
    app: App, tmp_path: Path
) -> None:
    """DBOS logs the error of both. If it were, the run could go on again without being asked."""
    copy_project(tmp_path)
    code = (tmp_path / "tools.py").read_text()
    (tmp_path / "tools.py").write_text(code.replace(CALL, CALL + '        payload["metrics"]\n'))
    done = python(tmp_path, "-c", FAIL, **database(app))
    assert "lost: {}" in done.stdout, done.stdout
    assert app.status() == "ERROR"


# ---------------------------------------------------------------- what others' programs do

TRACED = """    import logfire

    logfire.configure(send_to_logfire="if-token-present")
    logfire.instrument_pydantic_ai()
"""


def test_each_step_is_a_span_in_the_trace(tmp_path: Path) -> None:
    code = copy_project(tmp_path).joinpath("agent.py").read_text()
    start = '    """Run the command line; return its exit code."""\n'
    assert start in code
    (tmp_path / "agent.py").write_text(code.replace(start, start + TRACED))
    traced = python(tmp_path, "agent.py", "Acme")
    assert traced.returncode == 0, traced.stdout
    spans = ("chat offline", "running tool: fetch_company_overview")
    assert all(span in traced.stdout for span in spans), traced.stdout


def dbos(app: App, *words: str) -> Any:
    """Run DBOS's own command; return the JSON that it printed."""
    done = subprocess.run(
        [Path(sys.executable).parent / "dbos", "workflow", *words, "-s", app.database_url],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout) if words[0] in ("list", "steps") else None


def test_the_dbos_command_lists_shows_cancels_and_resumes_runs(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    [run] = dbos(app, "list")
    run_id = run["workflow_id"]
    assert [step["function_id"] for step in dbos(app, "steps", run_id)] == [1, 2]
    if OLD_SQLITE and app.database_url.startswith("sqlite"):
        with pytest.raises(subprocess.CalledProcessError):
            dbos(app, "cancel", run_id)
        return
    dbos(app, "cancel", run_id)
    assert app.status() == "CANCELLED"
    dbos(app, "resume", run_id)
    assert app.rows("SELECT queue_name FROM {dbos}workflow_status") == [("_dbos_internal_queue",)]
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "enqueued, resumes after 2 finished steps" in in_one_line(again.stdout)
    assert app.repeated() == []
    dbos(app, "fork", run_id, "--step", "3")
    versions = "SELECT application_version FROM {dbos}workflow_status ORDER BY created_at"
    assert app.rows(versions)[1] == (None,), "a fork that no process of ours takes"
