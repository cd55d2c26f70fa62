"""Behaviour that fails today (25 Nov, working copy of /work/main). Copy into tests/ to run."""

import signal

import pytest
from conftest import App, Process, wait_for


def start_apart(app: App, name: str, *arguments: str, **environment: str) -> Process:
    """Start a process with a ledger and a gate of its own, so that it can be released alone."""
    process = app.start(*arguments, LEDGER=str(app.folder / name), **environment)
    if "WAIT_AT" in environment:
        line = f"waiting {environment['WAIT_AT']}"
        path = app.folder / name
        wait_for(lambda: path.exists() and line in path.read_text(), line)
    return process


def ledgers(app: App, *names: str) -> str:
    return "".join((app.folder / name).read_text() for name in names)


@pytest.mark.parametrize("point", ["before launch", "before cancel", "before rewind"])
def test_a_process_that_waits_for_another_ones_decision_waits_for_the_end(
    app: App, point: str
) -> None:
    assert app.run("Acme", OUTAGE="1").wait() == 1
    first = start_apart(app, "one", "Acme", WAIT_AT=point)
    second = app.start("Acme").until_prints("executes nothing")
    second.process.join(3)  # two more looks
    early = second.process.exitcode
    (app.folder / "one.gate").touch()
    assert first.wait() == 0
    assert second.wait() == 0, f"ended with {early} before the first went on: {second.stderr}"


def test_a_failed_run_is_resumed_right_after_a_restart_of_postgres(app: App) -> None:
    assert app.run("Acme", OUTAGE="1").wait() == 1
    uptime = "extract(epoch FROM now() - pg_postmaster_start_time())"
    seconds = 0.0 if app.database_url.startswith("sqlite") else app.rows(f"SELECT {uptime}")[0][0]
    again = app.run("Acme", patches={"relock": float(seconds) + 3})  # as if started just now
    assert again.wait() == 0, again.stdout + again.stderr


def test_two_that_go_on_from_a_failure_that_was_not_stored_repeat_no_committed_step(
    app: App,
) -> None:
    died = app.run("Acme", OUTAGE="1", KILL_AT="before outcome ERROR")
    assert died.wait() == -signal.SIGKILL
    one = start_apart(app, "one", "Acme", WAIT_AT="after cancel")
    two = start_apart(app, "two", "Acme", WAIT_AT="before cancel")
    (app.folder / "one.gate").touch()  # it rewinds
    wait_for(lambda: "done commit 3" in ledgers(app, "one", "two"), "step 3 to be stored")
    (app.folder / "two.gate").touch()  # it cancels and rewinds what is live, and past step 3
    codes = [one.wait(), two.wait()]
    assert ledgers(app, "one", "two").count("effect financials") == 1
    assert codes == [0, 0]


def test_a_command_does_not_take_a_run_from_the_live_worker_that_has_begun_it(app: App) -> None:
    batch = app.start("Acme", "Globex", WAIT_AT="before dequeue")
    batch.until_prints("2 waiting").signal(signal.SIGKILL)
    batch.wait()
    alone = start_apart(app, "alone", "Acme", WAIT_AT="before resume")
    app.start("--worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "the worker to be in step 3")
    (app.folder / "alone.gate").touch()
    alone.process.join(5)
    app.open_gate()
    assert alone.wait() == 0
    assert "effect financials" not in ledgers(app, "alone")
