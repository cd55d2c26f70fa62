"""Runs that DBOS has given up in this process, and a DBOS that cannot do its work.

Neither depends on DBOS's log, which a program may have switched off.
"""

import signal

import pytest
from conftest import App, wait_for
from sqlalchemy import make_url
from test_children import assert_finished, code_of, effects, run, start, words
from test_reasons import REFUSE

LOUD = ["on", "dictConfig", "disable"]
"""How a program logs: everything, or so that the loggers that exist are silent, or nothing."""


@pytest.mark.parametrize(
    ("raised", "log"),
    [
        *(("BaseExceptionGroup", log) for log in LOUD),
        ("CancelledError", "dictConfig"),
        ("CancelledError", "disable"),
        ("GeneratorExit", "dictConfig"),
    ],
)
def test_a_tool_that_raises_what_is_no_exception_fails_the_command_and_a_rerun_finishes(
    app: App, raised: str, log: str
) -> None:
    failed = run(app, "alone", RAISE=raised, RAISE_IN="tool", LOGGING=log)
    assert code_of(failed) == 1, words(failed)
    assert "error: DBOS has given the run up: " in failed.stderr
    assert app.statuses() == {"CANCELLED": 1}, "or others would wait for a process that lives on"
    again = run(app, "alone", LOGGING=log)
    assert_finished(app, again)
    assert effects(app, "alone 1") == 1


@pytest.mark.parametrize("place", ["child 2", "last"])
def test_a_step_that_raises_what_is_no_exception_fails_the_command_and_a_rerun_finishes(
    app: App, place: str
) -> None:
    """Also a step of a child, which is lost with its parent first, and then alone."""
    failed = run(app, "workflow", RAISE="BaseExceptionGroup", RAISE_IN=place, LOGGING="dictConfig")
    assert code_of(failed) == 1, words(failed)
    assert len(failed.stderr.splitlines()) == 2, failed.stderr
    again = run(app, "workflow")
    assert_finished(app, again)
    assert effects(app, "child 1") == 1


def test_a_run_that_a_living_program_has_lost_twice_is_finished_by_another_process(
    app: App,
) -> None:
    program = start(
        app,
        "alone",
        "Acme,Globex",
        RAISE="BaseExceptionGroup",
        RAISE_IN="alone 1",
        LOGGING="disable",
        WAIT_AT="the end",
    )
    app.until("waiting the end")
    again = run(app, "alone")
    assert code_of(again) == 0, words(again)
    assert app.statuses() == {"SUCCESS": 1, "CANCELLED": 1}
    app.open_gate()
    assert code_of(program) == 1


@pytest.mark.parametrize("kind", ["alone", "workflow"])
def test_runs_are_not_taken_for_lost_while_a_tool_blocks_the_event_loop(
    app: App, kind: str
) -> None:
    names = ",".join(f"Company {number}" for number in range(12))
    done = run(app, kind, names, BLOCK="0.3")
    assert code_of(done) == 0, words(done)
    assert app.ledger("try resume") == []
    assert app.repeated() == []
    assert effects(app, "last") == 12


@pytest.mark.parametrize("point", ["after dequeue", "before begin"])
def test_a_run_that_was_taken_from_the_queue_and_has_not_begun_is_not_taken_for_lost(
    app: App, point: str
) -> None:
    """At the second point, the event loop is blocked, and DBOS goes on to look into its queue."""
    app.run("Acme", recipe="many", KILL_AT="after enqueue")
    worker = app.start(recipe="worker", patches={"look": 0.1}, WAIT_AT=point)
    app.until(f"waiting {point}")
    app.until("done look", times=len(app.ledger("done look")) + 4)
    app.open_gate()
    wait_for(lambda: app.statuses() == {"SUCCESS": 1}, "the run to finish")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    assert app.ledger("try resume") == []


@pytest.mark.parametrize("log", LOUD)
def test_a_queue_from_which_dbos_can_take_no_run_is_told_whatever_the_program_logs(
    app: App, log: str
) -> None:
    refuse, allow = REFUSE[make_url(app.database_url).get_backend_name()]
    app.rows(refuse)
    try:
        stopped = run(app, "alone", LOGGING=log)
    finally:
        app.rows(allow)
    assert code_of(stopped) == 2, words(stopped)
    assert "cannot be used: no run may begin" in words(stopped)
    assert_finished(app, run(app, "alone"))


@pytest.mark.parametrize("threads", range(12))
def test_a_process_that_can_start_no_more_threads_says_so_and_ends(app: App, threads: int) -> None:
    stopped = run(app, "workflow", THREADS=f"{threads}")
    moved = bool(app.ledger("done enqueue"))
    assert code_of(stopped) in ({0, 1} if moved else {2}), words(stopped)
    assert "Traceback" not in stopped.stderr
    if code_of(stopped):
        assert stopped.stderr.startswith("error: ")
        assert "can't start new thread" in stopped.stderr
        assert len(stopped.stderr.splitlines()) <= 2, stopped.stderr
    again = run(app, "workflow")
    assert code_of(again) == 0, words(again)
    assert app.repeated() == []
    wait_for(lambda: set(app.statuses()) == {"SUCCESS"}, "both runs to finish")
