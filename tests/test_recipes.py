"""The README's recipes, each applied to a copy of the app, run and, where it matters, killed."""

import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, App, wait_for
from provider import Provider
from recipes import ENVIRONMENT, README, apply_diff, blocks, copy_app, run

# What is only DBOS's, and has no unixepoch() of ours, fails here: see the README's limits.
OLD_SQLITE = sys.version_info >= (3, 12) and sqlite3.sqlite_version_info < (3, 42)
DIFFS = ("own_tool.diff", "approval.diff", "durability.diff")


def database(app: App) -> dict[str, str]:
    """Return the setting by which a copy of the app uses the test's database."""
    return {"DBOS_SYSTEM_DATABASE_URL": app.database_url}


def test_what_the_readme_shows_of_a_diff_or_of_the_service_is_what_the_file_says() -> None:
    files = {name: (PROJECT / "tests" / name).read_text() for name in (*DIFFS, "service.py")}
    for heart in blocks("diff"):
        assert any(heart in text for text in files.values()), heart
    for name in files:
        assert f"tests/{name}" in README


TABLE = "SELECT 1 FROM sqlite_master WHERE name = 'operation_outputs'"


def test_the_plain_pattern_survives_a_kill(tmp_path: Path) -> None:
    [plain] = blocks("python", 'name="plain"')
    (copy_app(tmp_path) / "plain.py").write_text(plain)
    if OLD_SQLITE:
        assert "NOT NULL constraint failed" in run(tmp_path, "plain.py").stdout
        return
    slow = plain.replace("DBOS.launch()", "tools.service.latency = 1\nDBOS.launch()")
    (tmp_path / "slow.py").write_text(slow)
    app = App(tmp_path, f"sqlite:///{tmp_path / 'plain.sqlite'}")
    first_step = "SELECT output, completed_at_epoch_ms FROM operation_outputs WHERE function_id = 1"
    with subprocess.Popen([sys.executable, "slow.py"], cwd=tmp_path, env=ENVIRONMENT) as process:
        wait_for(lambda: app.rows(TABLE) and app.rows(first_step), "step 1")
        process.kill()
    stored = app.rows(first_step)
    again = run(tmp_path, "plain.py")
    assert again.returncode == 0, again.stdout
    assert "company_name='Acme'" in again.stdout
    assert app.rows(first_step) == stored, "the checkpoint is the one of the killed process"
    assert app.statuses() == {"SUCCESS": 1}


def test_runs_killed_under_dbos_agent_finish_under_dbos_durability(
    app: App, tmp_path: Path
) -> None:
    folder = copy_app(tmp_path)
    assert run(folder, "agent.py", "Acme", "--crash", **database(app)).returncode == -9
    apply_diff("durability.diff", folder)
    again = run(folder, "-W", "error", "agent.py", "Acme", **database(app))
    assert again.returncode == 0, again.stdout
    assert "interrupted" in again.stdout
    assert "fetch_company_overview calls" not in again.stdout
    assert app.status() == "SUCCESS"


def test_new_runs_crash_and_recover_under_dbos_durability(app: App, tmp_path: Path) -> None:
    apply_diff("durability.diff", copy_app(tmp_path))
    assert run(tmp_path, "agent.py", "Acme", "--crash", **database(app)).returncode == -9
    again = run(tmp_path, "-W", "error", "agent.py", "Acme", **database(app))
    assert again.returncode == 0, again.stdout
    assert "fetch_company_overview calls" not in again.stdout
    many = run(tmp_path, "-W", "error", "agent.py", "Acme", "Globex", **database(app))
    assert many.returncode == 0, many.stdout


def test_a_tool_of_ones_own_is_retried_and_checkpointed(tmp_path: Path) -> None:
    """Against a server that drops a connection, is overloaded, answers garbage, and answers."""
    metrics = {"revenue_usd_millions": 1.5, "revenue_growth_percent": 2, "net_margin_percent": 3}
    metrics_of_acme = json.dumps({"company_name": "Acme", **metrics}).encode()
    answers = [None, (503, b""), (200, b"garbage"), (200, metrics_of_acme)]
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Idempotency-Key"])
            if answer := answers.pop(0):
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    apply_diff("own_tool.diff", copy_app(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tool = (tmp_path / "tools.py").read_text()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        (tmp_path / "tools.py").write_text(tool.replace("https://metrics.example.com", url))
        first = run(tmp_path, "agent.py", "Acme")
        assert "fetch_financial_metrics    ran               4" in first.stdout, first.stdout
        assert "revenue_usd_millions    1.5" in first.stdout
        again = run(tmp_path, "agent.py", "Acme")
        assert "fetch_financial_metrics    restored" in again.stdout
        server.shutdown()
    assert len(keys) == 4
    assert len(set(keys)) == 1


# ---------------------------------------------------------------- a person approves


def wait_for_question(folder: Path, app: App) -> list[str]:
    """Run the command until it asks, and kill it; return the command that answers yes."""
    log = folder / "asked"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "agent.py", "Acme"],
            cwd=folder,
            env={**ENVIRONMENT, **database(app)},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        # The run waits for a message when `recv` has noted until when it waits.
        sleeps = "SELECT 1 FROM {dbos}operation_outputs WHERE function_name = 'DBOS.sleep'"
        wait_for(lambda: "or, in place of yes" in log.read_text(), "the question")
        wait_for(lambda: app.rows(sleeps), "the run to wait")
        process.kill()
    assert 'may the model call notify_sales({"company_name":"Acme"})?' in log.read_text()
    [command] = re.findall(r"answer: uv run (answer\.py \S+ \S+ yes)", log.read_text())
    return shlex.split(command)


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_a_person_answers_while_nothing_runs_and_the_effect_happens_once_or_never(
    app: App, tmp_path: Path, answer: str
) -> None:
    apply_diff("approval.diff", copy_app(tmp_path))
    asked = wait_for_question(tmp_path, app)
    assert wait_for_question(tmp_path, app) == asked, "a rerun asks the same question again"
    unclear = run(tmp_path, *asked[:-1], "Yes", **database(app))
    assert unclear.returncode == 1, "only yes and no are answers"
    assert "yes|no" in unclear.stdout
    words = asked[:-1] + (["yes"] if answer == "yes" else ["no", "not", "this", "year"])
    assert run(tmp_path, *words, **database(app)).returncode == 0
    other = "no" if answer == "yes" else "yes"
    assert run(tmp_path, *asked[:-1], other, **database(app)).returncode == 0, "too late"
    again = run(tmp_path, "agent.py", "Acme", **database(app))
    assert again.returncode == 0, again.stdout
    assert "fetch_company_overview calls" not in again.stdout
    assert "interrupted, resumes after 5 finished steps" in again.stdout.replace("\n", " ")
    outbox = tmp_path / "outbox.txt"
    sent = outbox.read_text().splitlines() if outbox.exists() else []
    assert len(sent) == (answer == "yes")
    replay = run(tmp_path, "agent.py", "Acme", **database(app))
    assert "finished earlier" in replay.stdout
    assert len(sent) == (len(outbox.read_text().splitlines()) if outbox.exists() else 0)
    if answer == "no":
        reasons = run(tmp_path, "-c", SHOW_DENIAL, **database(app))
        assert "A person says no: not this year" in reasons.stdout


SHOW_DENIAL = """
import config
client = config.open_database(config.load_settings())
[run] = client.list_workflows()
print(run.output.all_messages())
"""


def test_a_process_killed_after_the_approved_effect_has_it_only_once(
    app: App, tmp_path: Path
) -> None:
    apply_diff("approval.diff", copy_app(tmp_path))
    tools = (tmp_path / "tools.py").read_text()
    sent = '        return f"sent to {recipient}"\n'
    assert sent in tools
    die = "        os.kill(os.getpid(), signal.SIGKILL)\n"
    asked = wait_for_question(tmp_path, app)
    assert run(tmp_path, *asked, **database(app)).returncode == 0
    (tmp_path / "tools.py").write_text(tools.replace(sent, die + sent))
    assert run(tmp_path, "agent.py", "Acme", **database(app)).returncode == -9
    (tmp_path / "tools.py").write_text(tools)
    again = run(tmp_path, "agent.py", "Acme", **database(app))
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("notify_sales sends the e-mail") == 1, "the step ran again"
    assert len((tmp_path / "outbox.txt").read_text().splitlines()) == 1, "the e-mail did not"


# ---------------------------------------------------------------- the web service


@contextmanager
def serve(folder: Path, **environment: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Start the web service in a copy of the app; yield its process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    log = folder / f"log-{port}"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "service:app", "--port", port],
            cwd=folder,
            env={**ENVIRONMENT, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        wait_for(lambda: "running on" in log.read_text(), "the service")
        yield server, f"http://127.0.0.1:{port}"
        server.kill()
    assert "Exception in ASGI" not in log.read_text(), log.read_text()


def ask(method: str, url: str) -> tuple[int, Any]:
    """Return the status code and the JSON of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def copy_service(folder: Path) -> None:
    """Copy the app and the service."""
    (copy_app(folder) / "service.py").write_text((PROJECT / "tests/service.py").read_text())


def test_the_service_killed_with_requests_in_flight_resumes_them_without_being_asked(
    app: App, tmp_path: Path
) -> None:
    copy_service(tmp_path)
    slow = {**database(app), "DEMO_LATENCY": "1"}
    companies = ("Acme", "Globex", "Initech")
    with serve(tmp_path, **slow) as (server, url):
        asked = [ask("POST", f"{url}/reports/{company}") for company in companies]
        assert [code for code, _ in asked] == [202, 202, 202]
        reports = [answer["report"] for _, answer in asked]
        assert ask("POST", f"{url}/reports/Acme") == asked[0], "the same request, the same run"
        assert ask("GET", url + reports[0]) == (202, {"state": "in progress"})
        stored = "SELECT count(*) FROM {dbos}operation_outputs"
        wait_for(lambda: app.rows(stored) >= [(4,)], "steps of several runs")
        server.kill()
    assert app.statuses() == {"PENDING": 3}
    with serve(tmp_path, **database(app)) as (server, url):
        wait_for(lambda: app.statuses() == {"SUCCESS": 3}, "all runs to end")
        for company, report in zip(companies, reports, strict=True):
            code, answer = ask("GET", url + report)
            assert (code, answer["report"]["company_name"]) == (200, company)
        assert ask("POST", f"{url}/reports/Acme") == asked[0]
        assert app.rows(stored) == [(12,)], "each step is stored once"
        server.terminate()
        server.wait()


def test_the_service_says_so_when_a_run_lies_idle_whose_command_was_killed(
    app: App, tmp_path: Path
) -> None:
    copy_service(tmp_path)
    with serve(tmp_path, **database(app)) as (_, url):
        command = app.start("Acme", WAIT_AT="after effect 3")
        app.until("waiting after effect 3")
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert (code, ask("GET", url + answer["report"])) == (202, (202, {"state": "in progress"}))
        command.signal(signal.SIGKILL)
        command.wait()
        told = {"state": "interrupted: a worker or another POST resumes it"}
        assert ask("GET", url + answer["report"]) == (202, told)
        assert ask("POST", f"{url}/reports/Acme")[0] == 202
        wait_for(lambda: app.statuses() == {"SUCCESS": 1}, "the report")
        assert ask("POST", f"{url}/reports/A/S")[0] == 202, "a name may hold a slash"


def test_the_service_shuts_down_after_the_runs_in_flight_have_ended(
    app: App, tmp_path: Path
) -> None:
    copy_service(tmp_path)
    with serve(tmp_path, DEMO_LATENCY="0.3", **database(app)) as (server, url):
        assert ask("POST", f"{url}/reports/Acme")[0] == 202
        wait_for(lambda: app.statuses() == {"PENDING": 1}, "the run to begin")
        server.terminate()
        server.wait()
    assert app.statuses() == {"SUCCESS": 1}


UNFIT = "has 0 characters: give it 1 to 100."


def test_the_service_tells_what_is_wrong_by_its_status_codes(
    app: App, tmp_path: Path, provider: Provider
) -> None:
    copy_service(tmp_path)
    provider.script = ["402"]
    environment = {**database(app), **provider.environment}
    with serve(tmp_path, **environment) as (_, url):
        assert ask("GET", f"{url}/reports/nothing")[0] == 404
        code, answer = ask("POST", f"{url}/reports/%20")
        assert (code, answer["detail"]) == (
            422,
            "the company's name has 0 characters: give it 1 to 100.",
        )
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert code == 202
        wait_for(lambda: app.statuses() == {"ERROR": 1}, "the model to refuse")
        failed = ask("GET", url + answer["report"])
        assert failed == (502, {"detail": "the research has failed; POST again to resume it"})
        assert ask("POST", f"{url}/reports/Acme")[0] == 202
        wait_for(lambda: app.statuses() == {"SUCCESS": 1}, "the model to answer")
        assert ask("GET", url + answer["report"])[0] == 200
        app.rows("UPDATE {dbos}workflow_output SET output = 'of an older type'")
        assert ask("GET", url + answer["report"])[0] == 409
        app.rows("UPDATE {dbos}workflow_status SET application_version = '0', status = 'ERROR'")
        assert ask("POST", f"{url}/reports/Acme")[0] == 409


# ---------------------------------------------------------------- what others' programs do


LOGFIRE = "import logfire\nimport sqlalchemy"


def test_each_step_is_a_span_in_the_trace(tmp_path: Path) -> None:
    [lines] = blocks("python", "logfire.configure")
    code = (copy_app(tmp_path) / "agent.py").read_text()
    start = '    """Run the command line; return its exit code."""\n'
    assert start in code
    code = code.replace(start, start + lines)
    (tmp_path / "agent.py").write_text(code.replace("import sqlalchemy", LOGFIRE))
    traced = run(tmp_path, "-W", "error", "agent.py", "Acme")
    assert traced.returncode == 0, traced.stdout
    spans = ("chat offline", "running tool: fetch_company_overview")
    assert all(span in traced.stdout for span in spans), traced.stdout


def dbos(app: App, *words: str) -> str:
    """Run DBOS's own command; return what it printed."""
    done = subprocess.run(
        [Path(sys.executable).parent / "dbos", "workflow", *words, "-s", app.database_url],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_dbos_command_lists_shows_cancels_and_resumes_runs(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    [run] = json.loads(dbos(app, "list"))
    run_id = run["workflow_id"]
    assert [step["function_id"] for step in json.loads(dbos(app, "steps", run_id))] == [1, 2]
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
    assert "enqueued, resumes after 2 finished steps" in again.stdout.replace("\n", " ")
    assert app.repeated() == []
    dbos(app, "fork", run_id, "--step", "3")
    assert "version None" in app.run("--list").stdout


def test_old_runs_are_deleted_and_unfinished_ones_are_not(app: App, tmp_path: Path) -> None:
    [delete] = blocks("python", "delete_workflows")
    (copy_app(tmp_path) / "delete_old_runs.py").write_text(delete)
    app.run("Old")
    app.run("Old failure", OUTAGE="1")
    app.run("Old crash", KILL_AT="before commit 3")
    days = 31 * 24 * 3600 * 1000
    for column in ("created_at", "updated_at", "completed_at"):
        app.rows(f"UPDATE {{dbos}}workflow_status SET {column} = {column} - {days}")
    app.run("New")
    deleted = run(tmp_path, "delete_old_runs.py", **database(app))
    assert deleted.stdout == "1 runs deleted\n", deleted.stdout
    assert app.statuses() == {"SUCCESS": 1, "ERROR": 1, "PENDING": 1}
    for name in ("Old failure", "Old crash"):
        again = app.run(name)
        assert again.wait() == 0, again.stderr
        assert "  step 2" not in again.stdout
