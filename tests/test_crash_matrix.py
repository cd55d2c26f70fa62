"""The promise at every point at which a process can die, judged from outside of it.

`CRASH_ROUNDS=500 uv run pytest -k random` makes the random part long; `CRASH_SEED=…` repeats it.
"""

import json
import os
import random
import signal
import uuid
from collections import Counter
from pathlib import Path

import pytest
from conftest import CRASH_SEED, App, Process

STEPS = (1, 2, 3, 4)
FIRST_RUN = [
    "before start",
    "after start",
    *(
        point
        for step in STEPS
        for point in (
            f"before body {step}",
            f"inside {step}",
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
    "before resume",
    "after resume",
    "before dequeue",
    "after dequeue",
    "after body 1",
    "after body 2",
    "before body 3",
    "inside 3",
]
"""Points of the process that goes on with a run that died before the checkpoint of step 3."""
RETRY = ["before cancel", "after cancel", "before rewind", "after rewind", "after dequeue"]
"""Points of the process that goes on with a run that failed at step 3."""


def report_of(process: Process) -> str:
    """Return the report in what a process printed."""
    return process.stdout[process.stdout.index("company_name") : process.stdout.index("step  ")]


def finish(app: App, *arguments: str) -> Process:
    """Run the same command until it exits with 0, as a person would."""
    for _ in range(5):
        process = app.run(*arguments)
        if process.wait() == 0:
            return process
    raise AssertionError(process.stdout + process.stderr)


def judge(app: App, point: str, last: Process) -> None:
    """Hold what happened outside the processes against the promise, and count it."""
    ledger = app.ledger()
    kills = sum(line.startswith("killed") for line in ledger)
    committed: set[str] = set()
    effects: Counter[str] = Counter()
    repeated = 0
    for line in ledger:
        kind, *rest = line.split()
        if line.startswith("done commit"):
            committed.add(rest[-1])
        elif line == "done rewind":
            committed = {step for step in committed if int(step) < 3}
        elif kind == "effect":
            step = rest[-1].rsplit(":", 1)[1]
            effects[step] += 1
            repeated += step in committed
    finished = app.status() == "SUCCESS"
    tally = {
        "point": point,
        "kills": kills,
        "finished": finished,
        "repeated": repeated,
        "database": "SQLite" if app.database_url.startswith("sqlite") else "PostgreSQL",
    }
    Path(os.environ["CRASH_TALLY"], uuid.uuid4().hex).write_text(json.dumps(tally))
    assert finished
    assert repeated == 0
    assert max(effects.values()) <= 1 + kills
    keys = [line.split()[-1] for line in app.ledger("effect")]
    assert len(set(keys)) == len(STEPS), "a step that ran again carried another idempotency key"
    rows = app.rows("SELECT function_id FROM {dbos}operation_outputs ORDER BY function_id")
    assert rows == [(step,) for step in STEPS]
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


@pytest.mark.parametrize("point", ["before outcome ERROR", "after outcome ERROR"])
def test_a_run_killed_as_its_failure_is_stored_does_not_repeat_the_failure(
    app: App, point: str
) -> None:
    assert app.run("Acme", OUTAGE="1", KILL_AT=point).wait() == -signal.SIGKILL
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "failed at step 3" in again.stdout
    judge(app, f"failure, {point}", again)


def test_a_run_killed_three_times_in_a_row_reaches_its_end(app: App) -> None:
    for step in (2, 3, 4):
        assert app.run("Acme", KILL_AT=f"before commit {step}").wait() == -signal.SIGKILL
    judge(app, "three in a row", finish(app, "Acme"))


def test_a_run_killed_three_times_in_one_step_reaches_its_end(app: App) -> None:
    for _ in range(3):
        assert app.run("Acme", KILL_AT="before commit 3").wait() == -signal.SIGKILL
    judge(app, "three in one step", finish(app, "Acme"))


ROUNDS = int(os.environ.get("CRASH_ROUNDS", "6"))


@pytest.mark.parametrize("number", range(ROUNDS))
def test_random_kills_do_not_break_the_promise(app: App, number: int) -> None:
    """Up to three processes die at a random SQL statement each."""
    seed = f"{CRASH_SEED} {number} {app.database_url.partition(':')[0]}"
    print(f"CRASH_SEED={CRASH_SEED} CRASH_ROUNDS={ROUNDS}: round {number}")
    dice = random.Random(seed)
    for _ in range(3):
        app.run("Acme", KILL_AT_STATEMENT=str(dice.randint(1, 60)))
    judge(app, "random SQL statement", finish(app, "Acme"))
