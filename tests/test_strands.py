"""Answers, settings and servers that once stranded a run: it goes on, or the command says why not.

What a take-over by another process may strand is in test_takeover.py, and databases that fill up or
go away for a while are in test_adversity.py.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from conftest import PROJECT, App, Process, start_postgres
from provider import BOTH_TOOLS, REPORT, Provider, completion, tool_calls
from sqlalchemy import make_url
from test_adversity import migrated, refused

import config


def said(process: Process) -> str:
    """Return what a process printed, in one line: it folds its lines."""
    return " ".join((process.stdout + process.stderr).split())


# ---------------------------------------------------------------- what the model answers

HALF = "Hello \ud83d world"
"""A lone surrogate, which is no text: half of an emoji, as models that are cut off send it."""


@pytest.mark.parametrize(
    "answer",
    [
        completion({"role": "assistant", "content": HALF}),
        tool_calls((HALF, "{}")),
        tool_calls(("fetch_company_overview", HALF)),
        tool_calls(BOTH_TOOLS[0], ("final_result", HALF)),
    ],
    ids=["text", "tool", "arguments", "second call"],
)
def test_an_answer_that_could_not_be_sent_back_is_refused_in_its_step_and_never_stored(
    app: App, provider: Provider, answer: dict[str, Any]
) -> None:
    provider.custom, provider.script = answer, ["answer", "custom"]
    run = app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert "failed with GarbledAnswerError" in said(run)
    assert len(provider.requests) == 3
    assert len(app.ledger("effect")) == 2
    assert HALF[6].encode("utf-8", "surrogatepass") not in stored(app)


def test_a_model_that_answers_so_again_and_again_fails_the_run_and_one_rerun_is_enough(
    app: App, provider: Provider
) -> None:
    provider.custom = completion({"role": "assistant", "content": HALF})
    provider.script = ["answer", *["custom"] * 4]
    failed = app.run("Acme", **provider.environment)
    assert failed.wait() == 1
    assert "GarbledAnswerError" in failed.stderr
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(app.ledger("effect")) == 2
    assert app.repeated() == []


def test_half_an_emoji_that_is_escaped_in_a_tools_arguments_goes_back_to_the_model(
    sqlite_app: App, provider: Provider
) -> None:
    """In the arguments, which are JSON in JSON, it is plain text until somebody parses them."""
    provider.custom = tool_calls(("fetch_company_overview", r'{"company_name": "\ud83d"}'))
    provider.script = ["custom"]
    run = sqlite_app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert len(provider.requests) == 2
    assert sqlite_app.ledger("effect overview") == [], "the tool was not called with it"


def stored(app: App) -> bytes:
    """Return all that is stored of steps and runs, decoded."""
    values = app.rows("SELECT output, error FROM {dbos}operation_outputs")
    values += app.rows("SELECT output, error FROM {dbos}workflow_output")
    return b"".join(base64.b64decode(value) for row in values for value in row if value)


@pytest.mark.parametrize(
    ("script", "asked"),
    [(["wrong name"], 2), (["answer", "wrong name"], 1)],
    ids=["in the first answer", "after both tools"],
)
def test_an_answer_that_the_provider_refuses_in_the_history_is_dropped_by_the_next_rerun(
    app: App, provider: Provider, script: list[str], asked: int
) -> None:
    provider.script = list(script)
    failed = app.run("Acme", **provider.environment)
    assert failed.wait() == 1
    assert "400" in failed.stderr
    assert "Run the same command to resume" in failed.stderr
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(provider.requests) == len(script) + 1 + asked
    assert len(app.ledger("effect overview")) == 1
    # The answer had called this tool as well, and what followed a dropped answer is dropped with
    # it: that is the promise's one exception. The service knows the call by its key.
    assert len(app.ledger("effect financials")) == 2
    bill = (app.folder / "service.log").read_text().splitlines()
    assert len([line for line in bill if line.endswith("billed")]) == 2


def test_a_model_that_repeats_such_an_answer_costs_one_rerun_more(
    app: App, provider: Provider
) -> None:
    provider.script = ["answer", "wrong name", "400", "wrong name"]
    assert app.run("Acme", **provider.environment).wait() == 1
    assert app.run("Acme", **provider.environment).wait() == 1
    last = app.run("Acme", **provider.environment)
    assert last.wait() == 0, last.stderr
    assert len(app.ledger("effect overview")) == 1


@pytest.mark.parametrize(
    ("script", "rerun"),
    [
        (["400"], 0),
        (["422"], 0),
        (["too long"], 0),
        (["answer", "too long"], 2),
        (["answer", "413"], 2),
    ],
)
def test_a_refusal_that_no_rerun_could_mend_names_the_way_out(
    sqlite_app: App, provider: Provider, script: list[str], rerun: int
) -> None:
    """There is no earlier answer to drop, or dropping one would help only for a moment."""
    for _ in range(2):
        provider.script = list(script)
        failed = sqlite_app.run("Acme", **provider.environment)
        assert failed.wait() == 1
        assert "take another --bucket, or another MODEL" in failed.stderr
        assert "Run the same command" not in failed.stderr
        script = script[-1:]
    other = sqlite_app.run("Acme", "--bucket=2", **provider.environment)
    assert other.wait() == 0, other.stderr
    assert len(sqlite_app.ledger("effect overview")) == 1 + (rerun > 0)


# ---------------------------------------------------------------- what the provider wishes


def test_the_wait_that_a_provider_asks_for_is_kept_and_told(
    sqlite_app: App, provider: Provider
) -> None:
    provider.script = ["429 after 3"]
    run = sqlite_app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert "again in 3.0 s" in said(run)
    first, second, *_ = provider.times
    # DBOS's own part of the wait, a second, is shortened to a hundredth in the tests.
    assert second - first >= 2


def test_a_wait_until_a_time_of_day_is_kept_as_well(sqlite_app: App, provider: Provider) -> None:
    provider.script = ["503 after 5 s, as a date"]
    run = sqlite_app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    first, second, *_ = provider.times
    assert second - first >= 2  # a date has whole seconds, and DBOS's own second is shortened


@pytest.mark.parametrize("wish", ["3600", formatdate(4_000_000_000, usegmt=True)])
def test_no_wish_makes_it_wait_for_more_than_a_minute(
    sqlite_app: App, provider: Provider, wish: str
) -> None:
    provider.script = [f"429 after {wish}"]
    run = sqlite_app.start("Acme", **provider.environment)
    run.until_prints("again in 60.0 s")
    run.signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


@pytest.mark.parametrize("wish", ["soon", "-5", "nan", "inf", "0"])
def test_a_wish_that_means_nothing_changes_nothing(
    sqlite_app: App, provider: Provider, wish: str
) -> None:
    provider.script = [f"429 after {wish}"]
    run = sqlite_app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert "again in 1.0 s" in said(run)


# ---------------------------------------------------------------- databases that never work again


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL of its own."""
    server = start_postgres(tmp_path_factory)
    yield server
    server.cleanup()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
@pytest.mark.parametrize("recipe", ["", "worker"])
def test_a_database_that_cannot_hold_every_text_is_refused_at_the_start(
    postgres: str, tmp_path: Path, encoding: str, recipe: str
) -> None:
    url = make_url(postgres).set(database=f"{encoding.lower()}_{abs(hash(tmp_path))}")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            f'CREATE DATABASE "{url.database}" ENCODING {encoding} LC_COLLATE "C" LC_CTYPE "C"'
            " TEMPLATE template0".encode()
        )
    app = App(tmp_path, url.render_as_string(hide_password=False))
    told = refused(app, *([] if recipe else ["Acme \U0001f600"]), recipe=recipe)
    assert f"has the encoding {encoding}" in told
    assert "ENCODING 'UTF8'" in told
    with psycopg.connect(app.database_url) as connection:
        found = connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'dbos'")
        assert found.fetchall() == [], "nothing was created there"


def ask(url: str, *queries: str) -> None:
    """Send queries to a server, as its administrator."""
    with psycopg.connect(url, autocommit=True) as connection:
        for query in queries:
            connection.execute(query.encode())


CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'learner'"


@pytest.mark.parametrize(
    ("queries", "told"),
    [
        (["ALTER ROLE learner PASSWORD 'new'", CUT], "password authentication failed"),
        (["DROP DATABASE migrated WITH (FORCE)"], 'database "migrated" does not exist'),
        (["ALTER ROLE learner NOLOGIN", CUT], "not permitted to log in"),
        (["REVOKE ALL ON dbos.workflow_status FROM learner"], "permission denied"),
        (["REVOKE ALL ON dbos.operation_outputs FROM learner"], "permission denied"),
        (["REVOKE ALL ON dbos.workflow_output FROM learner"], "permission denied"),
        (["ALTER TABLE dbos.workflow_status RENAME TO other"], "does not exist"),
    ],
    ids=["password", "database", "login", "status", "steps", "results", "table"],
)
def test_a_lasting_error_of_the_database_in_mid_run_ends_the_command_with_its_reason(
    server: Any, tmp_path: Path, queries: list[str], told: str
) -> None:
    admin, own = server.get_uri(), make_url(migrated(server))
    grants = ["SCHEMA dbos", "ALL TABLES IN SCHEMA dbos", "ALL SEQUENCES IN SCHEMA dbos"]
    ask(admin, "CREATE ROLE learner LOGIN PASSWORD 'old-secret'")
    ask(migrated(server), *[f"GRANT ALL ON {what} TO learner" for what in grants])
    (server.pgdata / "pg_hba.conf").write_text(
        "local all learner scram-sha-256\nlocal all all trust\n"
    )
    ask(admin, "SELECT pg_reload_conf()")
    app = App(tmp_path, own.render_as_string(hide_password=False))
    as_learner = own.set(username="learner", password="old-secret")
    url = as_learner.render_as_string(hide_password=False)
    run = app.start("Acme", WAIT_AT="before commit 3", DBOS_SYSTEM_DATABASE_URL=url)
    app.until("waiting before commit 3")
    ask(admin if "DATABASE" in queries[0] else migrated(server), *queries)
    app.open_gate()
    assert run.wait() == 2, said(run)
    assert run.stderr.startswith("error: the database (Postgres migrated on ")
    assert told in run.stderr
    assert len(run.stderr.splitlines()) == 2, run.stderr
    assert "old-secret" not in run.stdout + run.stderr


class RefusalError(Exception):
    """What a server says, with its code."""

    sqlstate: str | None = None


def error_of(text: str, state: str | None = None) -> sqlalchemy.exc.OperationalError:
    """Return a database error as SQLAlchemy raises it."""
    refusal = RefusalError(text)
    refusal.sqlstate = state
    return sqlalchemy.exc.OperationalError("SELECT 1", {}, refusal)


@pytest.mark.parametrize(
    ("text", "state", "passes"),
    [
        ("terminating connection due to administrator command", "57P01", True),
        ("terminating connection because of crash of another process", "57P02", True),
        ("the database system is starting up", "57P03", True),
        ("too many connections for role", "53300", True),
        ("deadlock detected", "40P01", True),
        ("lock not available", "55P03", True),
        ("idle-in-transaction timeout", "25P03", True),
        ("connection failed: FATAL:  the database system is starting up", None, True),
        ("connection failed: FATAL:  sorry, too many clients already", None, True),
        ("connection failed: Connection refused", None, True),
        ("server closed the connection unexpectedly", None, True),
        ("consuming input failed: SSL SYSCALL error: EOF detected", None, True),
        ("disk full", "53100", False),
        ("permission denied for table", "42501", False),
        ("relation does not exist", "42P01", False),
        ("no equivalent in encoding LATIN1", "22P05", False),
        ("cannot execute UPDATE in a read-only transaction", "25006", False),
        ('connection failed: FATAL:  database "x" does not exist', None, False),
        ('connection failed: FATAL:  role "x" does not exist', None, False),
        ("connection failed: FATAL:  password authentication failed", None, False),
        ("connection failed: fe_sendauth: no password supplied", None, False),
        ("connection failed: Too many open files", None, False),
        ("connection failed: root certificate file does not exist", None, False),
    ],
)
def test_only_what_passes_is_waited_for(text: str, state: str | None, passes: bool) -> None:
    assert config.passes(error_of(text, state)) is passes


# ---------------------------------------------------------------- settings of the model's client

UNUSABLE = {
    "a certificate": {"SSL_CERT_FILE": "/no/such/file.pem"},
    "a proxy, #": {"HTTPS_PROXY": "http://me:pass#word@proxy.invalid:8080"},
    "a proxy, /": {"ALL_PROXY": "http://me:pass/word@proxy.invalid:8080"},
    "a proxy, ?": {"https_proxy": "http://me:pass?word@proxy.invalid:8080"},
    "a scheme": {"HTTPS_PROXY": "ftp://me:pass-word@proxy.invalid:8080"},
    "an address, #": {"OPENAI_BASE_URL": "http://me:pass#word@provider.invalid:8080/v1"},
    "an address, /": {"OPENAI_BASE_URL": "http://me:pass/word@provider.invalid:8080/v1"},
    "a port": {"OPENAI_BASE_URL": "http://me:pass-word@provider.invalid:port/v1"},
}


@pytest.mark.parametrize("setting", UNUSABLE.values(), ids=UNUSABLE.keys())
@pytest.mark.parametrize("verbose", [False, True])
def test_what_the_models_client_cannot_use_is_named_without_any_part_of_the_password(
    sqlite_app: App, provider: Provider, setting: dict[str, str], verbose: bool
) -> None:
    [variable] = setting
    environment = {**provider.environment, **setting}
    run = sqlite_app.run("Acme", *["--verbose"] * verbose, **environment)
    assert run.wait() == 2, said(run)
    error = next(line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert error.startswith("error: the model openai-chat:gpt-6-luna cannot be used: ")
    assert variable in error
    assert not re.search(r"pass.?word|:pass|word@", run.stdout + run.stderr)
    assert len(run.stderr.splitlines()) == 1 or verbose
    assert sqlite_app.rows("SELECT * FROM workflow_status") == [], "no run is left behind"
    assert provider.requests == []


def test_a_refused_connection_names_the_address_and_not_the_password(
    app: App, provider: Provider
) -> None:
    url = "http://me:pass-word@127.0.0.1:1/v1"
    failed = app.run("Acme", **{**provider.environment, "OPENAI_BASE_URL": url})
    assert failed.wait() == 1
    assert "Connection error. (127.0.0.1:1)" in failed.stderr
    assert "pass-word" not in failed.stdout + failed.stderr
    assert b"pass-word" not in stored(app)
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr


# ---------------------------------------------------------------- process 1 of a container


def in_a_container() -> list[str]:
    """Return the command that makes a process number 1 of a PID namespace, as a container does."""
    for rights in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *rights, "--pid", "--fork", "--mount-proc"]
        if shutil.which("unshare") and subprocess.run([*command, "true"]).returncode == 0:
            return command
    raise AssertionError(
        "This machine lets nobody make a PID namespace, so what happens to process 1 of a container"
        " was not tested. As root of a Linux machine it is."
    )


@pytest.fixture
def containerized(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The real command as process 1, and its environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "DBOS_SYSTEM_DATABASE_URL": f"sqlite:///{tmp_path / 'research.sqlite'}",
        "DEMO_BILL": str(tmp_path / "service.log"),
        "DEMO_FAILURE_RATE": "0",
        "DEMO_LATENCY": "0",
    }
    return [*in_a_container(), sys.executable, str(PROJECT / "agent.py"), "Acme"], environment


def test_crash_kills_process_1_of_a_container_too(
    containerized: tuple[list[str], dict[str, str]],
) -> None:
    command, environment = containerized
    died = subprocess.run([*command, "--crash"], env=environment, capture_output=True, text=True)
    assert died.returncode == 137, died.stdout + died.stderr
    assert "found nothing to kill" not in died.stdout
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "interrupted, resumes after 2 finished steps" in " ".join(again.stdout.split())


def test_sigterm_ends_process_1_of_a_container_at_once(
    containerized: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    command, environment = containerized
    slow = {**environment, "DEMO_LATENCY": "10"}
    with subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, text=True) as unshare:
        assert unshare.stdout is not None
        next(line for line in unshare.stdout if "asks the model" in line)
        [child] = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)  # as `docker stop` does
    assert unshare.returncode == 143
    assert App(tmp_path, environment["DBOS_SYSTEM_DATABASE_URL"]).status() == "PENDING"
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr


RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "gpt-6-luna",
    "status": "completed",
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}


@pytest.mark.parametrize("odd", [{"arguments": [1]}, {"call_id": 7, "id": 7}])
def test_an_answer_of_other_types_is_asked_for_again_and_not_stored(
    sqlite_app: App, provider: Provider, odd: dict[str, Any]
) -> None:
    """The client of the Responses API lets them through, and cannot send them back."""
    name, arguments = BOTH_TOOLS[0]
    call = {"type": "function_call", "id": "f", "call_id": "c", "name": name}
    answers = [
        [{**call, "arguments": arguments, **odd}],
        [{**call, "name": "final_result", "arguments": json.dumps(REPORT)}],
    ]
    provider.responses = [{**RESPONSE, "output": output} for output in answers]
    environment = {**provider.environment, "MODEL": "openai-responses:gpt-6-luna"}
    done = sqlite_app.run("Acme", **environment)
    assert done.wait() == 0, done.stderr
    assert "in what the provider sent; again in 1.0 s" in done.stdout
    assert done.stderr == ""


def test_an_answer_of_spaces_is_asked_for_again(sqlite_app: App, provider: Provider) -> None:
    """Some providers refuse it in the history of the next request."""
    provider.custom = completion({"role": "assistant", "content": " \n"})
    provider.script = ["custom"]
    done = sqlite_app.run("Acme", **provider.environment)
    assert done.wait() == 0, done.stderr
    assert "GarbledAnswerError" in done.stdout
