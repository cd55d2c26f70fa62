"""A test that cannot fail proves nothing: the kill tests are run on variants of the app that are
broken on purpose, and each of them must be caught.

Most of these kill tests are those of the crash matrix. Those below are about two processes of which
none is killed, which lets them repeat steps without an excuse.
"""

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import conftest
import pytest
import test_crash_matrix as matrix
from conftest import App, Process, wait_for

KillTest = Callable[[App], None]


def has_ended(process: Process) -> bool:
    return process.process.exitcode is not None


def effects(app: App) -> Counter[str]:
    """Return how often each step had its effect."""
    return Counter(line.split()[-1] for line in app.ledger("effect"))


def judge_two(app: App, *processes: Process) -> None:
    """Hold what two processes did against the promise: nobody was killed."""
    for process in processes:
        assert process.wait() == 0, process.stderr
    assert app.repeated() == [], f"these ran again: {' '.join(app.repeated())}"
    assert max(effects(app).values()) == 1, "each step runs once if nobody is killed"


def two_processes_execute_a_run_each(app: App) -> None:
    first = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    second = app.start("Globex")
    wait_for(lambda: has_ended(second) or 2 in effects(app).values(), "the second process")
    app.open_gate()
    judge_two(app, first, second)


def two_processes_are_at_a_failed_run(app: App) -> None:
    assert app.run("Acme", OUTAGE="1").wait() == 1
    first = app.start("Acme", WAIT_AT="before rewind")
    app.until("waiting before rewind")
    second = app.start("Acme")
    wait_for(lambda: has_ended(second) or "executes nothing" in second.stdout, "the second process")
    app.open_gate()
    judge_two(app, first, second)


def two_processes_are_at_a_run_in_flight(app: App) -> None:
    first = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    second = app.start("Acme")
    wait_for(lambda: has_ended(second) or "executes nothing" in second.stdout, "the second process")
    app.open_gate()
    judge_two(app, first, second)


def a_run_was_begun_by_another_version(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3", patches={"version": "0"})
    assert app.run("Acme").wait() == 2


def killed(point: str) -> KillTest:
    """Return the kill test of the matrix that kills a run at a point, and runs it again."""
    kill_test = matrix.test_a_run_killed_at_any_point_reaches_its_end_by_the_same_command
    return lambda app: kill_test(app, point)


def failed(point: str) -> KillTest:
    """Return the kill test of the matrix that kills the rerun of a failed run at a point."""
    kill_test = matrix.test_a_failed_run_killed_on_its_way_back_reaches_its_end_by_the_same_command
    return lambda app: kill_test(app, point)


def died_of_a_failure(app: App) -> None:
    kill_test = matrix.test_a_run_killed_as_its_failure_is_stored_does_not_repeat_the_failure
    kill_test(app, "before outcome ERROR")


REPEATED = r"these ran again: research-acme-\w+:{}"
"""What the judge says of committed steps that ran again."""
VARIANTS: dict[str, tuple[KillTest, str]] = {
    "a tool without @DBOS.step": (
        killed("before commit 3"),
        "one idempotency key for each step",
    ),
    "the checkpoint of a step is deleted when its run is resumed": (
        killed("before commit 3"),
        REPEATED.format(2),
    ),
    "all processes have DBOS's default executor ID": (
        two_processes_execute_a_run_each,
        # Or one process takes the other's run for its own, and waits for ever.
        "each step runs once if nobody is killed|still running",
    ),
    "no lock of the run": (
        two_processes_are_at_a_failed_run,
        REPEATED.format(3),
    ),
    "no lock of the process, and that of the run is let go before the execution": (
        two_processes_are_at_a_run_in_flight,
        "each step runs once if nobody is killed",
    ),
    "a dead process is taken for a live one": (
        killed("before commit 3"),
        "still running",
    ),
    "a failed run is resumed, not rewound": (
        failed("before register"),
        "PermissionError: the service is closed today",
    ),
    "a run is resumed whose step has failed, and whose end was not stored": (
        died_of_a_failure,
        "PermissionError: the service is closed today",
    ),
    "a failed run is rewound to one step too early": (
        failed("before register"),
        REPEATED.format(2),
    ),
    "a random run ID": (
        killed("before commit 3"),
        "each lookup is billed once",
    ),
    "a key that changes with each attempt": (
        killed("after effect 3"),
        "each lookup is billed once",
    ),
    "a run of another version is not refused": (
        a_run_was_begun_by_another_version,
        "still running",
    ),
}
"""Each variant of `variants.py`, the kill test that catches it, and what that says."""


@pytest.fixture(autouse=True)
def _not_in_the_figures_of_the_matrix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tally").mkdir()
    monkeypatch.setenv("CRASH_TALLY", str(tmp_path / "tally"))


TALLY = Path(os.environ["CRASH_TALLY"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_broken_variant_of_the_app_is_caught(
    app: App, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_test, said = VARIANTS[variant]
    if said == "still running":
        monkeypatch.setattr(conftest, "PATIENCE", 10)
    app.patches["variant"] = variant
    tally = {"variant": variant, "caught": False}
    try:
        with pytest.raises(AssertionError) as caught:
            kill_test(app)
        tally["caught"] = re.search(said, str(caught.value)) is not None
        assert tally["caught"], caught.value
    finally:
        (TALLY / uuid.uuid4().hex).write_text(json.dumps(tally))


@pytest.mark.parametrize(
    "kill_test",
    [
        two_processes_execute_a_run_each,
        two_processes_are_at_a_failed_run,
        two_processes_are_at_a_run_in_flight,
        a_run_was_begun_by_another_version,
    ],
)
def test_the_app_as_it_is_passes_the_kill_tests_of_this_file(app: App, kill_test: KillTest) -> None:
    kill_test(app)
