"""Who takes a run over, and when: killed, stopped, cut off, cancelled and resumed processes.

In each of these some process waited for ever, or a step ran that should not have, in the first
version of this design. Nobody waits for ever here, and no committed step is repeated.
"""

import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import EMPTY, PROJECT, App, Process, start_postgres, wait_for
from dbos import DBOSClient
from sqlalchemy import make_url
from test_adversity import holds_its_lock, migrated
from test_crash_matrix import report_of


def said(process: Process) -> str:
    """Return what a process printed, in one line: it folds its lines."""
    return " ".join((process.stdout + process.stderr).split())


def assert_end(app: App, *processes: Process, twice: str = "") -> None:
    """Assert that all end with the same report, that no committed step was repeated, and more.

    Each step had its effect once, but for the one whose number is given, which was in flight.
    """
    for process in processes:
        assert process.wait() == 0, said(process)
    assert len({report_of(process) for process in processes}) == 1
    assert app.repeated() == []
    effects = Counter(line.rpartition(":")[2] for line in app.ledger("effect"))
    assert {step: count for step, count in effects.items() if step != twice} == dict.fromkeys(
        sorted({*"1234"} - {twice}), 1
    )
    assert effects[twice] <= 2
    assert app.rows("SELECT count(*) FROM {dbos}operation_outputs") == [(4,)]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A PostgreSQL of its own, to be stopped and changed."""
    server = start_postgres(tmp_path_factory)
    yield server
    server.cleanup()


@pytest.fixture
def postgres_app(postgres: str, tmp_path: Path) -> Iterator[App]:
    """The app on PostgreSQL, for what SQLite has not: sessions."""
    url = make_url(postgres).set(database="migrated")
    app = App(tmp_path, url.render_as_string(hide_password=False))
    app.rows(EMPTY)
    yield app
    app.close()


def run_id_of(app: App, company: str) -> str:
    """Return the ID of a company's run."""
    [(run_id,)] = app.rows(
        "SELECT workflow_uuid FROM {dbos}workflow_status"
        f" WHERE workflow_uuid LIKE 'research-{company.lower()}-%'"
    )
    return str(run_id)


def dbos(app: App, *words: str) -> None:
    """Run DBOS's own command on the database."""
    command = [str(Path(sys.executable).with_name("dbos")), *words, "-s", app.database_url]
    environment = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(PROJECT)}
    subprocess.run(command, env=environment, check=True, capture_output=True)


SESSIONS = """SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""


def cut(app: App, sessions: list[tuple[Any, ...]]) -> None:
    """End these sessions, as a cut network does."""
    for (session,) in sessions:
        app.rows(f"SELECT pg_terminate_backend({session})")


# ---------------------------------------------------------------- a restart of the server


def test_a_second_command_that_waits_goes_on_waiting_when_postgres_is_restarted(
    server: Any, tmp_path: Path
) -> None:
    """The restart frees the run's lock, which the second one then has, and all other locks."""
    app = App(tmp_path, migrated(server))
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    second = app.start("Acme").until_prints("executes nothing")
    server.stop()
    second.until_prints("the database does not answer, so this waits:")
    server.start()
    wait_for(lambda: holds_its_lock(app), "the lock of the first process")
    wait_for_three_looks(app)
    app.open_gate()
    assert_end(app, first, second)
    assert ": asks the model" not in second.stdout


LOOKS = """SELECT pid, query_start FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE '%%pg_try_advisory_xact_lock%%'
    AND pid <> pg_backend_pid()"""


def wait_for_three_looks(app: App) -> None:
    """Wait until a process has asked three times whether the one that executes the run is dead."""
    looks: set[tuple[Any, ...]] = set()

    def looked() -> bool:
        looks.update(app.rows(LOOKS))
        return len(looks) > 3

    wait_for(looked, "three looks of a waiting process")


def test_a_workers_own_sessions_are_cut_while_a_command_waits_for_its_run(
    postgres_app: App,
) -> None:
    app = postgres_app
    app.run("Acme", recipe="many", KILL_AT="after enqueue")
    worker = app.start(recipe="worker", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    sessions = app.rows(SESSIONS)
    command = app.start("Acme").until_prints("executes nothing")
    cut(app, sessions)
    wait_for(lambda: holds_its_lock(app), "the lock of the worker")
    wait_for_three_looks(app)
    app.open_gate()
    assert_end(app, command)
    assert ": asks the model" not in command.stdout, "it waited all the time"
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr


# ---------------------------------------------------------------- a process that was stopped


@pytest.mark.parametrize("third", [False, True], ids=["two", "and a third one waits"])
def test_a_stopped_process_whose_run_was_taken_over_goes_on_when_its_successor_has_died(
    postgres_app: App, third: bool
) -> None:
    app, impatient = postgres_app, {"patience": 1}
    first = app.start("Acme", patches=impatient, WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    first.signal(signal.SIGSTOP)
    cut(app, app.rows(SESSIONS))
    second = app.start("Acme", patches=impatient, WAIT_AT="inside 4")
    app.until("waiting inside 4")
    assert "resumes after 2 finished steps" in said(second)
    others = []
    if third:
        others.append(app.start("Acme", patches=impatient).until_prints("executes nothing"))
    second.signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    first.signal(signal.SIGCONT)
    app.open_gate()
    assert [process.wait() for process in (first, *others)] == [0] * (1 + len(others))
    assert len({report_of(process) for process in (first, *others)}) == 1
    assert app.repeated() == []
    effects = Counter(line.rpartition(":")[2] for line in app.ledger("effect"))
    assert (effects["1"], effects["2"], effects["3"]) == (1, 1, 2)
    assert effects["4"] <= 1 + third, "both may begin the step that the second one left"


# ---------------------------------------------------------------- locks that are lost


def test_the_folder_of_locks_is_deleted_in_mid_run(tmp_path: Path, migrated_sqlite: Path) -> None:
    """Then nobody can show that it lives, so the step in flight runs once more, and not more."""
    shutil.copy(migrated_sqlite, tmp_path / "research.sqlite")
    app = App(tmp_path, f"sqlite:///{tmp_path / 'research.sqlite'}")
    first = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    waiting = [app.start("Acme").until_prints("executes nothing") for _ in range(2)]
    shutil.rmtree(tmp_path / "research.sqlite.locks")
    app.until_effects(4)
    app.open_gate()
    assert_end(app, first, *waiting, twice="3")


LYING = [
    "CREATE SCHEMA lies",
    *[
        f"CREATE FUNCTION lies.{name}() RETURNS timestamptz LANGUAGE sql AS"
        f" $$ SELECT timestamptz '{time}' $$"
        for name, time in {
            "now": "2001-01-01",
            "clock_timestamp": "2001-01-01",
            "statement_timestamp": "2001-01-01",
            "transaction_timestamp": "2001-01-01",
            "pg_postmaster_start_time": "2030-01-01",
        }.items()
    ],
    "ALTER DATABASE migrated SET search_path = lies, pg_catalog, public",
]
"""What makes the clock of a server stand still, years before its own start."""


@pytest.mark.parametrize("machine", ["this", "another"])
def test_a_clock_of_the_server_that_was_set_back_strands_nobody(
    server: Any, tmp_path: Path, machine: str
) -> None:
    """Every wait ends by the waiting process's own clock."""
    url = migrated(server)
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in LYING:
            connection.execute(statement.encode())
    app = App(tmp_path, url)
    assert app.rows("SELECT now() < pg_postmaster_start_time()") == [(True,)]
    app.run("Acme", KILL_AT="before commit 3")
    if machine == "another":
        app.rows("UPDATE dbos.workflow_status SET executor_id = 'elsewhere:7:0123abcd'")
    again = app.run("Acme", patches={"patience": 1000 if machine == "this" else 1})
    assert_end(app, again, twice="3")
    assert ("executed by elsewhere:7:0123abcd" in said(again)) == (machine == "another")


# ---------------------------------------------------------------- cancelled, and resumed


def test_a_cancelled_run_is_resumed_while_its_step_is_in_flight(app: App) -> None:
    """That one step may run twice: a cancel reaches it within about two seconds."""
    app.run("Acme", recipe="many", KILL_AT="after enqueue")
    worker = app.start(recipe="worker", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    client = DBOSClient(system_database_url=app.database_url)
    client.cancel_workflow(run_id_of(app, "Acme"))
    client.destroy()
    command = app.run("Acme")
    app.open_gate()
    assert "cancelled, resumes after 2 finished steps" in said(command)
    assert_end(app, command, twice="3")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    assert app.status() == "SUCCESS"
    assert_end(app, command, twice="3")


# ---------------------------------------------------------------- DBOS's own command


@pytest.mark.parametrize("dies", [True, False], ids=["which is killed", "which lives"])
def test_a_run_that_dbos_own_command_resumed_is_executed_by_any_live_process(
    app: App, dies: bool
) -> None:
    """It goes to a queue that every live process of this app serves, whatever it was started for.

    Whoever executes it, and whoever comes next, keeps the promise.
    """
    app.run("Foo", KILL_AT="before commit 3")
    foo = run_id_of(app, "Foo")
    bar = app.start("Bar", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    dbos(app, "workflow", "resume", foo)
    effect = f"effect financials {foo}:3"
    app.until(effect, times=2)
    command = app.start("Foo").until_prints("executes nothing")
    assert f":{bar.pid}:" in said(command)
    if dies:
        bar.signal(signal.SIGKILL)
        assert bar.wait() == -signal.SIGKILL
    app.open_gate()
    assert command.wait() == 0, command.stderr
    assert app.run("Bar").wait() == 0
    assert app.statuses() == {"SUCCESS": 2}
    assert app.repeated() == []
    assert len(app.ledger(effect)) == (3 if dies else 2), "once for each kill"
    assert len(app.ledger("effect overview")) == 2
    assert app.rows("SELECT count(*) FROM {dbos}operation_outputs") == [(8,)]


# ---------------------------------------------------------------- what piles up


def test_a_waiting_command_keeps_no_session_between_its_looks(postgres_app: App) -> None:
    """So a hundred may wait at a server of a hundred sessions."""
    app = postgres_app
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    before = set(app.rows(SESSIONS))
    waiting = [app.start("Acme").until_prints("executes nothing") for _ in range(5)]
    # The first one's own come and go, too.
    wait_for(lambda: len(app.rows(SESSIONS)) <= len(before) + 2, "a moment at which none looks")
    app.open_gate()
    assert_end(app, first, *waiting)


QUEUES = "SELECT name FROM {dbos}queues"


def test_the_queues_of_ended_and_killed_commands_do_not_pile_up(app: App) -> None:
    for number in range(3):
        assert app.run("Acme", KILL_AT="before commit 3").wait() == -signal.SIGKILL
        assert app.run("Globex", f"--bucket={number}", OUTAGE="1").wait() == 1
        assert len(app.rows(QUEUES)) <= 2, "that of the last one that was killed, and of this one"
    assert app.run("Initech").wait() == 0
    assert app.rows(QUEUES) == []


def test_the_queues_of_processes_that_died_on_other_machines_do_not_pile_up(
    postgres_app: App,
) -> None:
    """Each container has a host name of its own, and nobody can ask its system who lives."""
    app = postgres_app
    for number in range(3):
        killed = app.run("Acme", f"--bucket={number}", KILL_AT="before commit 3")
        app.rows(
            f"UPDATE dbos.queues SET name = 'elsewhere:{number}:0123abcd'"
            f" WHERE name LIKE '%:{killed.pid}:%'"
        )
    assert len(app.rows(QUEUES)) == 3
    assert app.run("Initech", patches={"patience": 0.2}, DEMO_LATENCY="0.3").wait() == 0
    assert app.rows(QUEUES) == []
