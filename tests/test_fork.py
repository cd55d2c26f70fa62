"""Runs that are forked with --from-step, and runs that another program cancels or deletes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import App, Process, wait_for
from dbos import DBOSClient
from sqlalchemy import make_url

import config
from config import ResearchRequest, Settings, derive_run_id

FORK = ["Acme", "--from-step", "3"]


def words(process: Process) -> str:
    """Return what a process has printed, without line breaks."""
    return " ".join(process.stdout.split())


def run_id(company: str, bucket: str = "") -> str:
    return derive_run_id(ResearchRequest("local", "local", company, "offline", bucket))


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


def another_program(app: App) -> DBOSClient:
    """Connect to the database without executing anything."""
    url = make_url(app.database_url)
    if url.drivername != "sqlite":
        url = url.set(drivername="postgresql+psycopg")
    # It also makes DBOS work where Python is linked to an old SQLite.
    return config.open_database(Settings("offline", url, "local", "local", 0, 0, 0))


# ---------------------------------------------------------------- forks


def test_a_fork_repeats_the_steps_from_there_and_restores_those_before(app: App) -> None:
    app.run("Acme")
    base, fork = run_id("Acme"), f"{run_id('Acme')}-from-3"
    before = stored(app)
    forked = app.run(*FORK)
    assert forked.wait() == 0, forked.stderr
    assert steps_of(app, fork) == ALL_STEPS[2:]
    assert steps_of(app, base) == ALL_STEPS
    assert stored(app, base) == before
    told = words(forked)
    assert told.startswith(
        f"Run {fork}: new. It is run {base} again from step 3. Process {forked.pid}. Model: "
    )
    assert forked.stdout.count("restored\n") == 2
    assert "Saved by checkpoints: model requests 1, tokens 69, " in told
    assert forked.stdout.splitlines()[-1] == f"Steps before step 3 are those of run {base}."
    assert app.rows("SELECT name FROM {dbos}queues") == []


def test_a_fork_that_has_just_run_is_not_said_to_have_finished_earlier(app: App) -> None:
    app.run("Acme")
    forked = app.run(*FORK)
    assert forked.wait() == 0
    assert "finished earlier" not in words(forked)


def test_the_same_command_again_replays_the_fork_and_executes_nothing(app: App) -> None:
    app.run("Acme")
    first = app.run(*FORK)
    before, ledger = stored(app), app.ledger()
    again = app.run(*FORK)
    assert again.wait() == 0
    assert "finished earlier, so its stored report is replayed. It is run" in words(again)
    assert again.stdout.count("restored\n") == 4
    assert first.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]
    assert stored(app) == before
    assert app.ledger() == ledger, "not even launched"


@pytest.mark.parametrize(
    "point",
    [
        "before fork",
        "after fork",
        "after dequeue",
        "inside 3",
        "after effect 3",
        "after commit 3",
        "before outcome SUCCESS",
    ],
)
def test_a_fork_that_is_killed_goes_on_by_the_same_command(app: App, point: str) -> None:
    app.run("Acme")
    assert app.run(*FORK, KILL_AT=point).wait() == -signal.SIGKILL
    again = app.run(*FORK)
    assert again.wait() == 0, again.stderr
    fork = f"{run_id('Acme')}-from-3"
    twice = [ALL_STEPS[2]] if point == "after effect 3" else []
    assert steps_of(app, fork) == twice + ALL_STEPS[2:]
    assert app.statuses() == {"SUCCESS": 2}
    assert app.repeated() == []


def test_two_equal_forks_at_the_same_time_are_one_run(app: App) -> None:
    app.run("Acme")
    first = app.start(*FORK, WAIT_AT="before fork")
    app.until("waiting before fork")
    second = app.start(*FORK)
    wait_for(lambda: len(app.rows("SELECT 1 FROM {dbos}workflow_status")) == 2, "the fork")
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert steps_of(app, f"{run_id('Acme')}-from-3") == ALL_STEPS[2:]


def test_a_fork_crashes_on_request_and_resumes(app: App) -> None:
    app.run("Acme")
    crashed = app.run("Acme", "--from-step", "2", "--crash")
    assert crashed.wait() == -signal.SIGKILL
    assert "this process now kills itself" in crashed.stdout
    again = app.run("Acme", "--from-step", "2")
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps. It is run" in words(again)
    assert steps_of(app, f"{run_id('Acme')}-from-2") == ALL_STEPS[1:]


@pytest.mark.parametrize(
    ("options", "base"),
    [
        (["--bucket", "2026-Q4"], run_id("Acme", "2026-Q4")),
        (["--run-id", "mine"], "mine"),
        (["--run-id", "mine", "--bucket", "2026-Q4"], "mine"),
    ],
)
def test_a_run_of_a_bucket_or_with_an_id_of_its_own_can_be_forked(
    app: App, options: list[str], base: str
) -> None:
    app.run("Acme", *options)
    forked = app.run("Acme", *options, "--from-step", "4")
    assert forked.wait() == 0, forked.stderr
    assert steps_of(app, f"{base}-from-4") == ALL_STEPS[3:]


@pytest.mark.parametrize("step", ["1", "4"])
def test_a_fork_can_be_forked(app: App, step: str) -> None:
    app.run("Acme")
    app.run(*FORK)
    fork = f"{run_id('Acme')}-from-3"
    again = app.run("Acme", "--run-id", fork, "--from-step", step)
    assert again.wait() == 0, again.stderr
    assert steps_of(app, f"{fork}-from-{step}") == ALL_STEPS[int(step) - 1 :]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Acme", "--from-step", "0"], "--from-step takes a number from 1 to 1000."),
        (["Acme", "--from-step", "-1"], "--from-step takes a number from 1 to 1000."),
        (["Acme", "--from-step", "1001"], "--from-step takes a number from 1 to 1000."),
        (["Acme", "--from-step", "5"], f"there is no step 5 in run {run_id('Acme')}: see --list."),
        (["Acme", "--from-step", "99"], f"there is no step 99 in run {run_id('Acme')}"),
        (["Killed", "--from-step", "3"], f"there is no step 3 in run {run_id('Killed')}"),
        (["Globex", "--from-step", "1"], f"there is no step 1 in run {run_id('Globex')}"),
        (["Old", "--from-step", "2"], f"run {run_id('Old')} belongs to version old of this app"),
        (["Globex", "--run-id", "mine", "--from-step", "2"], "run mine is stored for another"),
        (["Damaged", "--from-step", "3"], "the fetch_company_overview that run research-damaged"),
    ],
)
def test_what_cannot_be_forked_is_an_error_and_nothing_is_stored(
    app: App, arguments: list[str], told: str
) -> None:
    app.run("Acme")
    app.run("Acme", "--run-id", "mine")
    app.run("Old", patches={"version": "old"})
    app.run("Killed", KILL_AT="before commit 3")
    app.run("Damaged")
    step = f"workflow_uuid = '{run_id('Damaged')}' AND function_id = 2"
    app.rows(f"UPDATE {{dbos}}operation_outputs SET output = 'x' WHERE {step}")
    before, ledger = stored(app), app.ledger()
    refused = app.run(*arguments)
    assert refused.wait() == 2
    assert refused.stderr.startswith(f"error: {told}")
    assert len(refused.stderr.splitlines()) <= 2
    assert refused.stdout == ""
    assert stored(app) == before
    assert app.ledger() == ledger, "nothing was launched"


def test_a_run_that_has_the_name_of_a_fork_and_is_none_is_not_taken_for_it(app: App) -> None:
    assert app.run("Acme", "--run-id", "mine-from-3").wait() == 0
    refused = app.run("Acme", "--run-id", "mine", "--from-step", "3")
    assert refused.wait() == 2
    assert "stored, but not as a fork" in refused.stderr
    assert refused.stdout == ""


def test_a_failed_run_can_be_forked_and_goes_on_itself(app: App) -> None:
    app.run("Acme", OUTAGE="1")
    base = run_id("Acme")
    before = stored(app)
    assert app.run(*FORK).wait() == 0
    assert steps_of(app, f"{base}-from-3") == ALL_STEPS[2:]
    assert stored(app, base) == before
    again = app.run("Acme")
    assert "failed at step 3" in words(again)
    assert steps_of(app, base) == ALL_STEPS


def test_an_interrupted_run_can_be_forked_and_goes_on_itself(app: App) -> None:
    app.run("Acme", KILL_AT="after commit 2")
    base = run_id("Acme")
    before = stored(app)
    assert app.run("Acme", "--from-step", "2").wait() == 0
    assert steps_of(app, f"{base}-from-2") == ALL_STEPS[1:]
    assert stored(app, base) == before
    again = app.run("Acme")
    assert "interrupted, resumes after 2 finished steps" in words(again)
    assert steps_of(app, base) == ALL_STEPS


def test_a_fork_of_a_run_that_a_live_process_executes_does_not_disturb_it(app: App) -> None:
    live = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    base = run_id("Acme")
    before = stored(app)
    forked = app.run("Acme", "--from-step", "2")
    assert forked.wait() == 0, forked.stderr
    assert steps_of(app, f"{base}-from-2") == ALL_STEPS[1:]
    assert stored(app, base) == before
    app.open_gate()
    assert live.wait() == 0, live.stderr
    assert steps_of(app, base) == ALL_STEPS
    assert "Saved by checkpoints: nothing" in live.stdout


# ---------------------------------------------------------------- cancelled from outside


def is_stopped_and_resumes(app: App, *stopped: Process) -> None:
    """Expect commands to say that the run was cancelled, and the same command to resume it."""
    for process in stopped:
        assert process.wait() == 1
        assert process.stderr.startswith("error: the run ")
        assert "cancelled" in process.stderr
        assert "Run the same command to resume" in process.stderr
        assert len(process.stderr.splitlines()) == 2
    assert app.status() == "CANCELLED"
    assert ALL_STEPS[3] not in steps_of(app, run_id("Acme")), "no other step has begun"
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "cancelled, resumes after 2 finished steps" in words(again)
    assert app.status() == "SUCCESS"
    steps = steps_of(app, run_id("Acme"))
    # The step in flight may or may not have had its effect before its process ended.
    assert steps[:2] + steps[-2:] == ALL_STEPS
    assert len(steps) <= 5
    assert app.repeated() == []


def test_a_run_that_another_program_cancels_stops_by_the_next_step_and_can_be_resumed(
    app: App,
) -> None:
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    waiting = app.start("Acme").until_prints("being executed by")
    client = another_program(app)
    client.cancel_workflow(run_id("Acme"))
    client.destroy()
    app.open_gate()
    is_stopped_and_resumes(app, first, waiting)


# On SQLite, the command needs a newer one than some interpreters that this project runs on have.
@pytest.mark.parametrize("app", ["postgres"], indirect=True)
def test_a_run_is_cancelled_by_the_command_of_dbos(app: App) -> None:
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    command = Path(sys.executable).with_name("dbos")
    subprocess.run(
        [command, "workflow", "cancel", run_id("Acme"), "-s", app.database_url],
        cwd=app.folder,
        capture_output=True,
        check=True,
    )
    app.open_gate()
    is_stopped_and_resumes(app, first)


def test_a_run_that_is_resumed_while_the_cancelled_process_still_lives_stores_each_step_once(
    app: App,
) -> None:
    """A worker lives on when one of its runs is cancelled, and so does the step in flight."""
    app.start("Acme", "Globex", WAIT_AT="before dequeue").until_prints("2 waiting").signal(
        signal.SIGKILL
    )
    worker = app.start("--worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "two calls")
    client = another_program(app)
    client.cancel_workflow(run_id("Acme"))
    client.destroy()
    assert app.run("Acme").wait() == 0
    app.open_gate()
    wait_for(lambda: app.statuses() == {"SUCCESS": 2}, "both runs to finish")
    assert steps_of(app, run_id("Acme")) == [*ALL_STEPS[:3], *ALL_STEPS[2:]]
    assert app.repeated() == []
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr


# ---------------------------------------------------------------- deleted from outside


def test_commands_are_told_of_a_run_that_is_deleted_and_start_it_anew(app: App) -> None:
    first = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    waiting = app.start("Acme").until_prints("being executed by")
    client = another_program(app)
    client.delete_workflows([run_id("Acme")])
    client.destroy()
    for process in (waiting, first):
        assert process.wait() == 1
        assert "deleted meanwhile. The same command starts it anew." in process.stderr
        assert len(process.stderr.splitlines()) == 1
    assert app.statuses() == {}
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert ": new." in words(again)
    assert app.status() == "SUCCESS"


def test_a_worker_goes_on_when_one_of_its_runs_is_deleted(app: App) -> None:
    app.start("Acme", "Globex", WAIT_AT="before dequeue").until_prints("2 waiting").signal(
        signal.SIGKILL
    )
    worker = app.start("--worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "two calls")
    client = another_program(app)
    client.delete_workflows([run_id("Acme")])
    client.destroy()
    app.open_gate()
    wait_for(lambda: app.statuses() == {"SUCCESS": 1}, "the other run to finish")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    assert steps_of(app, run_id("Globex")) == ALL_STEPS
