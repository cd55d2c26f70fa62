"""Lasting errors of the database end a command, passing ones are waited out; DBOS's own queue."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import PROJECT, App, start_postgres, wait_for
from provider import Provider
from sqlalchemy import make_url
from test_service import ask, serve


def words(text: str) -> str:
    return " ".join(text.split())


def error_of(app: App, company: str, code: int = 2, **environment: str) -> str:
    """Run the command; return its error, which is one or two lines."""
    process = app.run(company, **environment)
    assert process.wait() == code, process.stdout + process.stderr
    assert process.stderr.startswith("error: ")
    assert len(process.stderr.splitlines()) <= 2, process.stderr
    return process.stderr


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL of its own, whose users and databases a test may change."""
    server = start_postgres(tmp_path_factory)
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.cleanup()


def admin(server: Any, *statements: str) -> None:
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"


def app_as_user(server: Any, folder: Path) -> App:
    """Return the app as a user of its own, whose password the server asks for."""
    admin(
        server,
        "CREATE ROLE app LOGIN PASSWORD 'one'",
        "CREATE DATABASE mine OWNER app",
    )
    (server.pgdata / "pg_hba.conf").write_text("local all app scram-sha-256\nlocal all all trust\n")
    admin(server, "SELECT pg_reload_conf()")
    url = make_url(server.get_uri()).set(username="app", password="one", database="mine")
    return App(folder, url.render_as_string(hide_password=False))


def test_a_role_without_rights_on_one_table_is_told_the_table(server: Any, tmp_path: Path) -> None:
    app = app_as_user(server, tmp_path)
    assert app.run("Globex").wait() == 0
    url = make_url(server.get_uri()).set(database="mine").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE dbos.operation_outputs OWNER TO postgres")
        connection.execute("GRANT SELECT ON dbos.operation_outputs TO app")
    told = error_of(app, "Acme")
    assert "permission denied for table operation_outputs" in told


def test_the_reason_of_a_wait_for_the_database_is_told_when_it_changes(
    server: Any, tmp_path: Path
) -> None:
    app = app_as_user(server, tmp_path)
    run = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    admin(server, "ALTER ROLE app CONNECTION LIMIT 0", CUT)
    run.until_prints("the database does not answer, so this waits")
    wait_for(lambda: "too many connections for role" in words(run.stdout), "the reason")
    admin(server, "ALTER ROLE app CONNECTION LIMIT -1")
    app.open_gate()
    assert run.wait() == 0, run.stdout + run.stderr
    assert len(app.ledger("effect")) == 4


def test_a_history_that_is_refused_after_the_tools_costs_the_answer_that_called_them(
    app: App, provider: Provider
) -> None:
    provider.script = ["both tools", "422"]
    error_of(app, "Acme", code=1, **provider.environment)
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    # The calls are made again, and the service knows their keys.
    assert again.stdout.count("the service knows this key") == 2


def test_a_run_that_dbos_own_command_resumed_keeps_the_promise_whoever_executes_it(
    app: App,
) -> None:
    """Every live process of the app serves the queue of `dbos workflow resume`."""
    app.run("Foo", KILL_AT="before commit 3")
    [(run_id,)] = app.rows("SELECT workflow_uuid FROM {dbos}workflow_status")
    bar = app.start("Bar", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    dbos = [str(Path(sys.executable).with_name("dbos")), "workflow", "resume", run_id]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    subprocess.run([*dbos, "-s", app.database_url], check=True, env=environment)
    app.until_effects(3 + 3 + 1)  # Bar's process executes Foo's third step
    foo = app.start("Foo").until_prints("executes nothing")
    assert f":{bar.pid}:" in words(foo.stdout)
    bar.signal(9)
    assert foo.wait() == 0, foo.stderr
    assert app.run("Bar").wait() == 0
    assert app.statuses() == {"SUCCESS": 2}
    assert app.repeated() == []


def test_a_write_that_dbos_cannot_make_for_now_is_no_silent_wait(sqlite_app: App) -> None:
    run = sqlite_app.start("Acme", WAIT_AT="inside 3")
    sqlite_app.until("waiting inside 3")
    with contextlib.closing(sqlite3.connect(sqlite_app.folder / "research.sqlite")) as other:
        other.execute("BEGIN IMMEDIATE")
        sqlite_app.open_gate()
        wait_for(lambda: "waits: database is locked" in words(run.stdout), "the reason")
    assert run.wait() == 0, run.stdout + run.stderr
    assert len(sqlite_app.ledger("effect")) == 4


def test_a_batch_that_waits_for_the_database_says_so(server: Any, tmp_path: Path) -> None:
    app = app_as_user(server, tmp_path)
    batch = app.start("Acme", recipe="many", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    admin(server, "ALTER ROLE app CONNECTION LIMIT 0", CUT)
    batch.until_prints("the database does not answer, so this waits")
    admin(server, "ALTER ROLE app CONNECTION LIMIT -1")
    app.open_gate()
    assert batch.wait() == 0, batch.stdout + batch.stderr


def test_the_service_answers_503_while_the_database_is_away(server: Any, tmp_path: Path) -> None:
    app = app_as_user(server, tmp_path)
    with serve(app) as (_, url):
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert code == 202
        wait_for(lambda: ask("GET", url + answer["report"])[0] == 200, "the report")
        admin(server, "ALTER ROLE app CONNECTION LIMIT 0", CUT)
        away = (503, {"detail": "the database cannot be used now: ask again"})
        assert ask("POST", f"{url}/reports/Globex") == away
        assert ask("GET", url + answer["report"]) == away
        assert ask("GET", url + answer["events"]) == away
        admin(server, "ALTER ROLE app CONNECTION LIMIT -1")
        assert ask("GET", url + answer["report"])[0] == 200


def test_an_error_of_the_database_that_has_passed_ends_no_later_call(
    sqlite_app: App, tmp_path: Path
) -> None:
    code = """
import logging, os, threading
import agent, config

class Listener(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("Exception"):
            logged.set()

def rename(old, new):
    with sqlalchemy.create_engine(os.environ["DBOS_SYSTEM_DATABASE_URL"]).begin() as connection:
        connection.execute(sqlalchemy.text(f"ALTER TABLE {old} RENAME TO {new}"))

import sqlalchemy
logged = threading.Event()
executor = agent.Executor(config.load_settings())
agent.research(executor, executor.request("Acme"))
logging.getLogger("dbos").addHandler(Listener())
rename("workflow_status", "away")
assert logged.wait(60)
rename("away", "workflow_status")
print(agent.research(executor, executor.request("Globex")).run.status, flush=True)
os._exit(0)
"""
    settings = {"DBOS_SYSTEM_DATABASE_URL": sqlite_app.database_url, "DEMO_LATENCY": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "DEMO_BILL": str(tmp_path / "bill"), **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("SUCCESS\n"), done.stdout + done.stderr


REFUSE = {
    "sqlite": (
        "CREATE TRIGGER refuse BEFORE UPDATE ON workflow_status WHEN NEW.status = 'PENDING'"
        " BEGIN SELECT RAISE(ABORT, 'no run may begin'); END",
        "DROP TRIGGER refuse",
    ),
    "postgresql": (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no run may begin'; END $$;"
        " CREATE TRIGGER refuse BEFORE UPDATE ON dbos.workflow_status"
        " FOR EACH ROW WHEN (NEW.status = 'PENDING') EXECUTE FUNCTION refuse()",
        "DROP FUNCTION refuse CASCADE",
    ),
}


@pytest.mark.parametrize("recipe", ["", "many"])
def test_a_queue_from_which_dbos_can_take_no_run_is_no_silent_wait(app: App, recipe: str) -> None:
    """DBOS tells only its log, and tries again for ever."""
    refuse, allow = REFUSE[make_url(app.database_url).get_backend_name()]
    app.rows(refuse)
    try:
        stopped = app.run("Acme", recipe=recipe, patches={"look": 0.1})
    finally:
        app.rows(allow)
    assert stopped.wait() == 2, stopped.stdout
    assert "cannot be used: no run may begin" in words(stopped.stderr)
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert len(app.ledger("effect")) == 4
