"""The promise at every point at which a process can die, judged from outside of it.

`CRASH_ROUNDS=500 uv run pytest -k random` makes the random part long; `CRASH_SEED=…` repeats it.
"""

import json
import os
import random
import signal
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CRASH_SEED, App, Process, wait_for

STEPS = (1, 2, 3, 4)
TOOLS = ["fetch_company_overview", "fetch_financial_metrics"]
READY = ["before register", "after register"]
"""Points of a process that makes ready to execute runs, which it does before it stores any work."""
LAUNCH = ["before launch", "after launch", "before dequeue", "after dequeue"]
"""Points of a process that has put a run into its queue."""
FIRST_RUN = [
    *READY,
    "before enqueue",
    "after enqueue",
    *LAUNCH,
    *(
        point
        for step in STEPS
        for point in (
            f"before body {step}",
            f"inside {step}",
            f"after effect {step}",
            f"before commit {step}",
            f"after commit {step}",
        )
    ),
    "before outcome SUCCESS",
    "after outcome SUCCESS",
]
"""Points of a run that nothing has disturbed: the body of a step comes after DBOS's look for a
stored result, and its side effect before the commit."""
RECOVERY = [
    *READY,
    "before resume",
    "after resume",
    *LAUNCH,
    "after body 1",
    "after body 2",
    "before body 3",
    "inside 3",
]
"""Points of the process that goes on with a run that died before the checkpoint of step 3."""
RETRY = [*READY, "before rewind", "after rewind", *LAUNCH]
"""Points of the process that goes on with a run that failed at step 3."""
UNSTORED = ["before cancel", "after cancel", *RETRY]
"""Points of the process that goes on with a run that died when step 3 had failed, but before the
failure of the run was stored."""
FORK = [
    *READY,
    "before fork",
    "after fork",
    *LAUNCH,
    "after body 2",
    "inside 3",
    "after effect 3",
    "before commit 3",
    "after commit 4",
    "before outcome SUCCESS",
]
"""Points of the process that forks a finished run from step 3."""
BATCH = ["before enqueue", "after enqueue", "before dequeue", "after dequeue", "before commit 3"]
"""Points of a batch, which puts new runs into the shared queue and then is a worker as well."""
TAKE_OVER = ["before resume", "after resume"]
"""Points of a worker that puts what a dead process had begun into the queue again."""
TWO = [
    *(("new", point) for point in [*READY, "before enqueue", "after enqueue", "before dequeue"]),
    *(("interrupted", point) for point in [*READY, "before resume", "after resume", *LAUNCH]),
    *(("failed", point) for point in [*READY, "before rewind", "after rewind", *LAUNCH]),
    *(("failed, not stored", point) for point in ["before cancel", "after cancel", *RETRY]),
]
"""How a run was left, and the point at which the first of two processes waits until it is killed,
while the second one waits for it."""


def report_of(process: Process) -> str:
    """Return the report in what a process printed."""
    return process.stdout[process.stdout.index("company_name") : process.stdout.index("step  ")]


def finish(app: App, *arguments: str, recipe: str = "") -> Process:
    """Run the same command until it exits with 0, as a person would."""
    for _ in range(5):
        process = app.run(*arguments, recipe=recipe)
        if process.wait() == 0:
            return process
    raise AssertionError(process.stdout + process.stderr)


def judge(app: App, point: str, last: Process, executed: Sequence[int] = STEPS) -> None:
    """Hold what happened outside the processes against the promise, and count it.

    The run that is judged is the one that the last process told of.
    """
    run_id = last.stdout[last.stdout.index("Run ") :].split()[1].rstrip(":")
    where = f"WHERE workflow_uuid = '{run_id}'"
    finished = app.rows(f"SELECT status FROM {{dbos}}workflow_status {where}") == [("SUCCESS",)]
    kills = sum(process.process.exitcode == -signal.SIGKILL for process in app.processes)
    tally = {
        "point": point,
        "kills": kills,
        "finished": finished,
        "repeated": len(app.repeated()),
        "database": "SQLite" if app.database_url.startswith("sqlite") else "PostgreSQL",
    }
    Path(os.environ["CRASH_TALLY"], uuid.uuid4().hex).write_text(json.dumps(tally))
    assert finished
    assert app.repeated() == [], f"these ran again: {' '.join(app.repeated())}"
    effects = Counter(line.split()[-1] for line in app.ledger("effect"))
    assert max(effects.values()) <= 1 + kills
    keys = {key for key in effects if key.rpartition(":")[0] == run_id}
    assert keys == {f"{run_id}:{step}" for step in executed}, "one idempotency key for each step"
    rows = app.rows(f"SELECT function_id FROM {{dbos}}operation_outputs {where} ORDER BY 1")
    assert rows == [(step,) for step in STEPS]
    bill = (app.folder / "service.log").read_text().splitlines()
    billed = [line.split(":")[1] for line in bill if line.endswith(" billed")]
    if executed == STEPS:
        assert sorted(billed) == TOOLS, "each lookup is billed once"
    assert report_of(last) == UNDISTURBED


UNDISTURBED = """\
company_name            Acme
data_notice             Invented for this tutorial: not facts about a real
                        company.
revenue_usd_millions    4541.8
revenue_growth_percent  -9.2
net_margin_percent      -1.2
industry                quantum hardware
summary                 Acme works in quantum hardware with 14586 people.
strengths               in business since 1967
risks                   a net margin of -1.2 % may not last

"""


@pytest.mark.parametrize("point", FIRST_RUN)
def test_a_run_killed_at_any_point_reaches_its_end_by_the_same_command(
    app: App, point: str
) -> None:
    assert app.run("Acme", KILL_AT=point).wait() == -signal.SIGKILL
    judge(app, f"run, {point}", finish(app, "Acme"))


@pytest.mark.parametrize("point", RECOVERY)
def test_a_recovery_killed_at_any_point_reaches_its_end_by_the_same_command(
    app: App, point: str
) -> None:
    assert app.run("Acme", KILL_AT="before commit 3").wait() == -signal.SIGKILL
    assert app.run("Acme", KILL_AT=point).wait() == -signal.SIGKILL
    judge(app, f"recovery, {point}", finish(app, "Acme"))


@pytest.mark.parametrize("point", RETRY)
def test_a_failed_run_killed_on_its_way_back_reaches_its_end_by_the_same_command(
    app: App, point: str
) -> None:
    assert app.run("Acme", OUTAGE="1").wait() == 1
    assert app.run("Acme", KILL_AT=point).wait() == -signal.SIGKILL
    judge(app, f"after a failure, {point}", finish(app, "Acme"))


@pytest.mark.parametrize("point", UNSTORED)
def test_a_run_whose_failure_was_not_stored_killed_on_its_way_back_reaches_its_end(
    app: App, point: str
) -> None:
    died = app.run("Acme", OUTAGE="1", KILL_AT="before outcome ERROR")
    assert died.wait() == -signal.SIGKILL
    assert app.run("Acme", KILL_AT=point).wait() == -signal.SIGKILL
    judge(app, f"after a failure that was not stored, {point}", finish(app, "Acme"))


@pytest.mark.parametrize("point", ["before outcome ERROR", "after outcome ERROR"])
def test_a_run_killed_as_its_failure_is_stored_does_not_repeat_the_failure(
    app: App, point: str
) -> None:
    assert app.run("Acme", OUTAGE="1", KILL_AT=point).wait() == -signal.SIGKILL
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "resumes at step 3" in " ".join(again.stdout.split())
    judge(app, f"failure, {point}", again)


@pytest.mark.parametrize("point", FORK)
def test_a_fork_killed_at_any_point_reaches_its_end_by_the_same_command(
    app: App, point: str
) -> None:
    assert app.run("Acme").wait() == 0
    before = rows_of_the_base(app)
    killed = app.run("Acme", "3", recipe="from_step", KILL_AT=point)
    assert killed.wait() == -signal.SIGKILL
    last = finish(app, "Acme", "3", recipe="from_step")
    judge(app, f"fork, {point}", last, executed=(3, 4))
    assert rows_of_the_base(app) == before


def rows_of_the_base(app: App) -> list[list[tuple[Any, ...]]]:
    """Return everything that is stored of the run that is forked."""
    # DBOS marks it. Marked already, not one byte of it may change.
    app.rows("UPDATE {dbos}workflow_status SET was_forked_from = TRUE")
    where = "WHERE workflow_uuid NOT LIKE '%-from-3'"
    tables = ["workflow_status", "workflow_input", "workflow_output", "operation_outputs"]
    return [app.rows(f"SELECT * FROM {{dbos}}{table} {where} ORDER BY 1, 2") for table in tables]


@pytest.mark.parametrize("point", BATCH)
def test_a_batch_killed_at_any_point_reaches_its_end_by_the_same_command(
    app: App, point: str
) -> None:
    assert app.run("Acme", recipe="many", KILL_AT=point).wait() == -signal.SIGKILL
    finish(app, "Acme", recipe="many")
    judge(app, f"batch, {point}", finish(app, "Acme"))


@pytest.mark.parametrize("point", TAKE_OVER)
def test_a_worker_killed_as_it_takes_over_leaves_the_run_to_the_next_one(
    app: App, point: str
) -> None:
    killed = app.run("Acme", recipe="many", KILL_AT="before commit 3")
    assert killed.wait() == -signal.SIGKILL
    look = {"look": 0.1}
    killed = app.run(recipe="worker", patches=look, KILL_AT=point)
    assert killed.wait() == -signal.SIGKILL
    worker = app.start(recipe="worker", patches=look)
    wait_for(lambda: app.status() == "SUCCESS", "the next worker to finish the run")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    judge(app, f"take-over by a worker, {point}", finish(app, "Acme"))


@pytest.mark.parametrize(("left", "point"), TWO)
def test_of_two_processes_at_one_run_the_first_can_be_killed_and_the_second_goes_on(
    app: App, left: str, point: str
) -> None:
    if left == "interrupted":
        assert app.run("Acme", KILL_AT="before commit 3").wait() == -signal.SIGKILL
    elif left == "failed":
        assert app.run("Acme", OUTAGE="1").wait() == 1
    elif left == "failed, not stored":
        died = app.run("Acme", OUTAGE="1", KILL_AT="before outcome ERROR")
        assert died.wait() == -signal.SIGKILL
    first = app.start("Acme", WAIT_AT=point)
    app.until(f"waiting {point}")
    second = app.start("Acme").until_prints("executes nothing")
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert second.wait() == 0, second.stderr
    judge(app, f"two at a {left} run, {point}", second)


def test_a_run_killed_three_times_in_a_row_reaches_its_end(app: App) -> None:
    for step in (2, 3, 4):
        assert app.run("Acme", KILL_AT=f"before commit {step}").wait() == -signal.SIGKILL
    judge(app, "three in a row", finish(app, "Acme"))


def test_a_run_killed_three_times_in_one_step_reaches_its_end(app: App) -> None:
    for _ in range(3):
        assert app.run("Acme", KILL_AT="before commit 3").wait() == -signal.SIGKILL
    judge(app, "three in one step", finish(app, "Acme"))


ROUNDS = int(os.environ.get("CRASH_ROUNDS", "6"))
STATEMENTS = 80
"""How many SQL statements a process makes that executes a whole run, counted in all its threads:
about 60 on SQLite and 70 on PostgreSQL, where it also looks for a pooler, and some more while it
waits. Those that are killed at a later one than their last are not killed: they finish."""


@pytest.mark.parametrize("number", range(ROUNDS))
def test_random_kills_do_not_break_the_promise(app: App, number: int) -> None:
    """Up to three processes die at a random SQL statement each."""
    seed = f"{CRASH_SEED} {number} {app.database_url.partition(':')[0]}"
    print(f"CRASH_SEED={CRASH_SEED} CRASH_ROUNDS={ROUNDS}: round {number}")
    dice = random.Random(seed)
    for _ in range(3):
        app.run("Acme", KILL_AT_STATEMENT=str(dice.randint(1, STATEMENTS)))
    judge(app, "random SQL statement", finish(app, "Acme"))
