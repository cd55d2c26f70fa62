"""Forks of a run from one of its steps, and runs that another program cancels or deletes."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import App, Process, wait_for
from dbos import DBOSClient
from sqlalchemy import make_url

import config
from config import Settings
from tools import BRIEF, SimulatedService


def words(process: Process) -> str:
    """Return what a process has printed, without line breaks."""
    return " ".join(process.stdout.split())


def settings_of(app: App) -> Settings:
    url = make_url(app.database_url)
    if url.drivername != "sqlite":
        url = url.set(drivername="postgresql+psycopg")
    return Settings("offline", url, "", "local", "local", 0, SimulatedService())


def run_id(app: App, company: str, bucket: str = "") -> str:
    return settings_of(app).request(BRIEF, company, bucket).run_id


def fork(app: App, *arguments: str, **environment: Any) -> Process:
    """Run the command that forks, to its end."""
    return app.run(*arguments, recipe="from_step", **environment)


def stored(app: App, run: str = "%") -> dict[str, list[tuple[Any, ...]]]:
    """Return everything that is stored of a run, or of all."""
    tables = ["workflow_status", "workflow_input", "workflow_output", "operation_outputs"]
    # DBOS marks the base of a fork. Marked already, not one byte of it may change.
    app.rows("UPDATE {dbos}workflow_status SET was_forked_from = TRUE")
    return {
        table: sorted(
            app.rows(f"SELECT * FROM {{dbos}}{table} WHERE workflow_uuid LIKE '{run}'"), key=str
        )
        for table in tables
    }


def steps_of(app: App, run: str) -> list[tuple[str, str]]:
    """Return the effects of a run's steps: what they did, and the number of the step."""
    effects = [line.split()[1:] for line in app.ledger("effect")]
    return [(what, key.split(":")[1]) for what, key in effects if key.split(":")[0] == run]


ALL_STEPS = [("model", "1"), ("overview", "2"), ("financials", "3"), ("model", "4")]


@contextmanager
def another_program(app: App) -> Iterator[DBOSClient]:
    """Connect to the database without executing anything."""
    # It also makes DBOS work where Python is linked to an old SQLite.
    client, locks = config.open_database(settings_of(app))
    yield client
    client.destroy()
    locks.rest()


# ---------------------------------------------------------------- forks
# Forks that are killed are in test_crash_matrix.py.


def test_a_fork_repeats_the_steps_from_there_and_restores_those_before(app: App) -> None:
    app.run("Acme")
    base = run_id(app, "Acme")
    before = stored(app)
    forked = fork(app, "Acme", "3")
    assert forked.wait() == 0, forked.stderr
    assert steps_of(app, f"{base}-from-3") == ALL_STEPS[2:]
    assert steps_of(app, base) == ALL_STEPS
    assert stored(app, base) == before
    assert words(forked).startswith(
        f"This is run {base} again from step 3, as a run of its own: side effects from that step"
        f" on happen again, under other idempotency keys. Run {base}-from-3: new. Process"
    )
    assert forked.stdout.count("restored\n") == 2
    assert "Saved by checkpoints: model requests 1, tokens 69, " in words(forked)
    assert max(map(len, forked.stdout.splitlines())) <= 80
    assert app.rows("SELECT name FROM {dbos}queues") == []


def test_side_effects_happen_again_under_other_keys_as_the_fork_says(app: App) -> None:
    app.run("Acme")
    fork(app, "Acme", "3")
    bill = [line.split() for line in (app.folder / "service.log").read_text().splitlines()]
    keys = [key for key, *_ in bill if ":fetch_financial_metrics:" in key]
    assert [did for _, *did in bill] == [["billed"]] * 3
    assert [key.split(":")[0] for key in keys] == [
        run_id(app, "Acme"),
        f"{run_id(app, 'Acme')}-from-3",
    ]


def test_the_same_command_again_replays_the_fork_and_executes_nothing(app: App) -> None:
    app.run("Acme")
    first = fork(app, "Acme", "3")
    before, ledger = stored(app), app.ledger()
    again = fork(app, "Acme", "3")
    assert again.wait() == 0
    assert "finished earlier, so its stored report is replayed." in words(again)
    assert "finished earlier" not in words(first)
    assert again.stdout.count("restored\n") == 4
    assert stored(app) == before
    assert app.ledger() == ledger, "not even launched"


def test_two_equal_forks_at_the_same_time_are_one_run(app: App) -> None:
    app.run("Acme")
    first = app.start("Acme", "3", recipe="from_step", WAIT_AT="before fork")
    app.until("waiting before fork")
    second = app.start("Acme", "3", recipe="from_step").until_prints("executes nothing")
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert steps_of(app, f"{run_id(app, 'Acme')}-from-3") == ALL_STEPS[2:]


def test_a_fork_waits_in_the_queue_of_its_own_process_alone(app: App) -> None:
    app.run("Acme")
    assert fork(app, "Acme", "3", KILL_AT="after fork").wait() == -signal.SIGKILL
    name = f"{run_id(app, 'Acme')}-from-3"
    where = f"WHERE workflow_uuid = '{name}'"
    [(queue,)] = app.rows(f"SELECT queue_name FROM {{dbos}}workflow_status {where}")
    # DBOS's internal queue is served by every process, whatever its model and instructions.
    assert config.is_executor_id(queue)


def test_a_fork_crashes_on_request_and_resumes(app: App) -> None:
    app.run("Acme")
    crashed = fork(app, "Acme", "2", "--crash")
    assert crashed.wait() == -signal.SIGKILL
    again = fork(app, "Acme", "2")
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps." in words(again)
    late = fork(app, "Acme", "2", "--crash")
    assert late.wait() == 0
    assert "--crash found nothing to kill" in late.stdout
    bill = (app.folder / "service.log").read_text().splitlines()
    did = [line.split(" ", 1)[1] for line in bill if line.startswith(f"{run_id(app, 'Acme')}-from")]
    assert did == ["billed", "billed", "answered from the record"]


def test_a_fork_that_fails_goes_on_from_its_failed_step_by_the_same_command(app: App) -> None:
    app.run("Acme")
    failed = fork(app, "Acme", "2", OUTAGE="1")
    assert failed.wait() == 1
    assert "the service is closed today" in failed.stderr
    again = fork(app, "Acme", "2")
    assert again.wait() == 0, again.stderr
    assert "resumes at step 3" in words(again)
    assert steps_of(app, f"{run_id(app, 'Acme')}-from-2") == ALL_STEPS[1:]
    assert app.repeated() == []


def test_the_run_of_a_bucket_can_be_forked_from_any_step(app: App) -> None:
    app.run("Acme", "--bucket", "2026-Q4")
    base = run_id(app, "Acme", "2026-Q4")
    for step in (1, 4):
        forked = fork(app, "Acme", f"{step}", "--bucket", "2026-Q4")
        assert forked.wait() == 0, forked.stderr
        assert steps_of(app, f"{base}-from-{step}") == ALL_STEPS[step - 1 :]


def test_what_cannot_be_forked_is_an_error_and_nothing_is_stored(app: App) -> None:
    app.run("Acme")
    app.run("Old", patches={"version": "old"})
    app.run("Killed", KILL_AT="before commit 3")
    app.run("Damaged")
    step = f"workflow_uuid = '{run_id(app, 'Damaged')}' AND function_id = 2"
    app.rows(f"UPDATE {{dbos}}operation_outputs SET output = 'x' WHERE {step}")
    app.rows("DELETE FROM {dbos}queues")  # that of the killed one
    before, ledger = stored(app), app.ledger()
    for arguments, told in [
        (["Acme", "0"], f"there is no step 0 in run {run_id(app, 'Acme')}."),
        (["Acme", "-1"], "there is no step -1"),
        (["Acme", "5"], "there is no step 5"),
        (["Killed", "3"], "there is no step 3"),
        (["Globex", "1"], "there is no step 1"),
        (["Acme", "3", "--bucket", "x"], "there is no step 3"),
        (["Old", "2"], f"run {run_id(app, 'Old')} belongs to version old of this app"),
        (["Damaged", "3"], "the fetch_company_overview that run research-damaged"),
    ]:
        refused = fork(app, *arguments)
        assert refused.wait() == 2, arguments
        assert refused.stderr.startswith(f"error: {told}")
        assert len(refused.stderr.splitlines()) <= 2
        assert refused.stdout == ""
        assert stored(app) == before
        assert app.rows("SELECT name FROM {dbos}queues") == []
        assert app.ledger() == ledger, "nothing was launched"
    for arguments in (["Acme"], ["Acme", "three"], ["Acme", "3", "4"]):
        refused = fork(app, *arguments)
        assert refused.wait() == 2
        assert "usage: " in refused.stderr
    assert fork(app, "Damaged", "2").wait() == 0, "step 2 is made anew"


def test_a_base_that_is_deleted_before_it_is_forked_is_an_error(app: App) -> None:
    app.run("Acme")
    late = app.start("Acme", "3", recipe="from_step", WAIT_AT="before register")
    app.until("waiting before register")
    app.rows("DELETE FROM {dbos}workflow_status")
    app.open_gate()
    assert late.wait() == 2
    assert late.stderr.startswith("error: there is no step 3 in run ")


def test_a_fork_outlives_its_base(app: App) -> None:
    app.run("Acme")
    assert fork(app, "Acme", "3", KILL_AT="before commit 4").wait() == -signal.SIGKILL
    app.rows(f"DELETE FROM {{dbos}}workflow_status WHERE workflow_uuid = '{run_id(app, 'Acme')}'")
    again = fork(app, "Acme", "3")
    assert again.wait() == 0, again.stderr
    assert app.repeated() == []


def test_a_failed_run_can_be_forked_and_goes_on_itself(app: App) -> None:
    app.run("Acme", OUTAGE="1")
    base = run_id(app, "Acme")
    before = stored(app)
    assert fork(app, "Acme", "3").wait() == 0
    assert steps_of(app, f"{base}-from-3") == ALL_STEPS[2:]
    assert stored(app, base) == before
    assert "resumes at step 3" in words(app.run("Acme"))
    assert steps_of(app, base) == ALL_STEPS


def test_an_interrupted_run_can_be_forked_and_goes_on_itself(app: App) -> None:
    app.run("Acme", KILL_AT="after commit 2")
    base = run_id(app, "Acme")
    before = stored(app)
    assert fork(app, "Acme", "2").wait() == 0
    assert steps_of(app, f"{base}-from-2") == ALL_STEPS[1:]
    assert stored(app, base) == before
    assert "interrupted, resumes after 2 finished steps" in words(app.run("Acme"))
    assert steps_of(app, base) == ALL_STEPS


def test_a_fork_of_a_run_that_a_live_process_executes_does_not_disturb_it(app: App) -> None:
    live = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    base = run_id(app, "Acme")
    before = stored(app)
    forked = fork(app, "Acme", "2")
    assert forked.wait() == 0, forked.stderr
    assert steps_of(app, f"{base}-from-2") == ALL_STEPS[1:]
    assert stored(app, base) == before
    app.open_gate()
    assert live.wait() == 0, live.stderr
    assert steps_of(app, base) == ALL_STEPS
    assert "Saved by checkpoints: nothing" in live.stdout


# ---------------------------------------------------------------- cancelled from outside


def is_stopped_and_resumes(app: App, stopped: Process) -> None:
    """Expect a command to say that the run was cancelled, and the same command to resume it."""
    assert stopped.wait() == 1
    assert stopped.stderr == (
        "error: the run was cancelled\nFinished steps are stored. Run the same command to resume.\n"
    )
    assert app.status() == "CANCELLED"
    assert steps_of(app, run_id(app, "Acme")) == ALL_STEPS[:2], "the step in flight was stopped"
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "cancelled, resumes after 2 finished steps" in words(again)
    assert app.status() == "SUCCESS"
    assert steps_of(app, run_id(app, "Acme")) == ALL_STEPS


def test_a_run_that_another_program_cancels_stops_in_mid_step_and_can_be_resumed(app: App) -> None:
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    with another_program(app) as client:
        client.cancel_workflow(run_id(app, "Acme"))
    is_stopped_and_resumes(app, first)


# On SQLite, the command needs a newer one than some interpreters that this project runs on have.
@pytest.mark.parametrize("app", ["postgres"], indirect=True)
def test_a_run_is_cancelled_by_the_command_of_dbos(app: App) -> None:
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    command = Path(sys.executable).with_name("dbos")
    subprocess.run(
        [command, "workflow", "cancel", run_id(app, "Acme"), "-s", app.database_url],
        cwd=app.folder,
        capture_output=True,
        check=True,
    )
    is_stopped_and_resumes(app, first)


# ---------------------------------------------------------------- deleted from outside


def test_a_run_that_is_deleted_while_it_is_executed_starts_anew_in_the_same_command(
    app: App,
) -> None:
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    waiting = app.start("Acme").until_prints("executes nothing")
    with another_program(app) as client:
        client.delete_workflows([run_id(app, "Acme")])
    wait_for(lambda: first.stdout.count(": new.") == 2, "the run to begin again")
    app.open_gate()
    assert first.wait() == 0, first.stderr
    assert waiting.wait() == 0, waiting.stderr
    assert app.status() == "SUCCESS"
    assert "finished earlier" in words(waiting)


def test_a_worker_goes_on_when_one_of_its_runs_is_deleted(app: App) -> None:
    batch = app.start("Acme", "Globex", recipe="many", WAIT_AT="before dequeue")
    batch.until_prints("2 waiting").signal(signal.SIGKILL)
    worker = app.start(recipe="worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "two calls")
    with another_program(app) as client:
        client.delete_workflows([run_id(app, "Acme")])
    app.open_gate()
    wait_for(lambda: app.statuses() == {"SUCCESS": 1}, "the other run to finish")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    assert steps_of(app, run_id(app, "Globex")) == ALL_STEPS
