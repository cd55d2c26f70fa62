"""Workflows that a run's tools start (sub-agents, child workflows) move with their run."""

import signal

import pytest
from conftest import App, Process, wait_for

FAMILY = {"module": "family"}
DELEGATING = ["workflow", "agent", "later", "durability", "nested"]


def start(app: App, kind: str, company: str = "Acme", **environment: str) -> Process:
    """Start the agent that delegates, which is in `family.py`."""
    return app.start(company, patches=FAMILY, KIND=kind, **environment)


def run(app: App, kind: str, company: str = "Acme", **environment: str) -> Process:
    process = start(app, kind, company, **environment)
    process.wait()
    return process


def kill(app: App, kind: str, point: str, **environment: str) -> None:
    """Run it until it dies at a point, which it must reach."""
    killed = run(app, kind, KILL_AT=point, **environment)
    assert code_of(killed) == -signal.SIGKILL, words(killed)


def code_of(process: Process) -> int:
    return process.wait()


def words(process: Process) -> str:
    return " ".join((process.stdout + process.stderr).split())


def effects(app: App, name: str) -> int:
    return len(app.ledger(f"effect {name} "))


def assert_finished(app: App, again: Process) -> None:
    """The run and its children have finished, and no stored step was executed again."""
    assert code_of(again) == 0, words(again)
    assert set(app.statuses()) == {"SUCCESS"}
    assert app.repeated() == []
    assert effects(app, "last") == 1


@pytest.mark.parametrize("kind", DELEGATING)
@pytest.mark.parametrize("point", ["inside child 2", "after effect child 2"])
def test_a_run_that_is_killed_while_its_child_executes_finishes(
    app: App, kind: str, point: str
) -> None:
    kill(app, kind, point)
    again = run(app, kind)
    assert_finished(app, again)
    assert effects(app, "child 1") == 1
    assert effects(app, "child 2") == (2 if point.startswith("after") else 1)


def test_a_run_that_is_killed_again_while_its_moved_child_executes_finishes(app: App) -> None:
    kill(app, "nested", "inside child 1")
    kill(app, "nested", "inside child 2")
    assert_finished(app, run(app, "nested"))
    assert effects(app, "middle 1") == effects(app, "child 1") == 1


@pytest.mark.parametrize("point", ["after outcome SUCCESS", "inside last"])
def test_a_run_that_is_killed_after_its_child_has_finished_gets_the_stored_result(
    app: App, point: str
) -> None:
    """Before the run has stored that result, and after that."""
    kill(app, "workflow", point)
    assert_finished(app, run(app, "workflow"))
    assert effects(app, "child 2") == 1


@pytest.mark.parametrize("kind", DELEGATING)
def test_a_child_that_has_failed_goes_on_at_its_failed_step_once_the_cause_is_mended(
    app: App, kind: str
) -> None:
    failed = run(app, kind, FAIL="child 2")
    assert code_of(failed) == 1, words(failed)
    assert "child 2 is closed today" in failed.stderr
    again = run(app, kind)
    assert_finished(app, again)
    assert effects(app, "child 1") == effects(app, "child 2") == 1


@pytest.mark.parametrize(
    "point", ["before commit 2", "after commit 2", "before outcome ERROR", "after outcome ERROR"]
)
def test_a_run_that_is_killed_as_its_child_fails_goes_on_at_the_childs_failed_step(
    app: App, point: str
) -> None:
    kill(app, "workflow", point, FAIL="child 2")
    assert_finished(app, run(app, "workflow"))
    assert effects(app, "child 1") == effects(app, "child 2") == 1


def test_a_child_agent_whose_model_fails_asks_its_model_again(app: App) -> None:
    assert code_of(run(app, "agent", FAIL="model of child")) == 1
    assert_finished(app, run(app, "agent"))


def test_an_answer_that_is_dropped_takes_the_child_that_it_has_started_along(app: App) -> None:
    """A child's ID is that of its step. Started again, the old child's result would come back."""
    refused = run(app, "workflow", FAIL="history")
    assert code_of(refused) == 1, words(refused)
    again = run(app, "workflow")
    assert code_of(again) == 0, words(again)
    assert app.statuses() == {"SUCCESS": 2}
    assert effects(app, "child 1") == effects(app, "child 2") == 2
    assert effects(app, "last") == 1


def test_a_child_whose_workflow_is_not_registered_is_a_sentence_and_moves_nothing(app: App) -> None:
    kill(app, "agent", "inside child 2")
    before = app.statuses()
    refused = run(app, "agent", WITHOUT_HELPER="1")
    assert code_of(refused) == 2, words(refused)
    assert "is a workflow that this program has not registered: helper.run" in words(refused)
    assert "Traceback" not in refused.stderr
    assert app.statuses() == before
    assert_finished(app, run(app, "agent"))


def test_ten_runs_wait_for_ten_children_and_all_finish(app: App) -> None:
    """A queue executes ten runs at once, the oldest first. In it, children would wait for ever."""
    names = ",".join(f"Company {number}" for number in range(10))
    killed = start(app, "workflow", names, WAIT_AT="inside child 2")
    stored = "SELECT count(*) FROM {dbos}operation_outputs WHERE function_name = 'act'"
    wait_for(lambda: app.rows(stored) == [(10,)], "ten children")
    killed.signal(signal.SIGKILL)
    killed.wait()
    # As if all runs had begun before the first child. And DBOS sees all twenty at once.
    later = "created_at = created_at + 60000 WHERE parent_workflow_id IS NOT NULL"
    app.rows(f"UPDATE {{dbos}}workflow_status SET {later}")
    again = start(app, "workflow", names, WAIT_AT="before dequeue")
    wait_for(lambda: app.statuses() == {"ENQUEUED": 20}, "all runs and children in queues")
    app.open_gate()
    assert code_of(again) == 0, words(again)
    assert app.statuses() == {"SUCCESS": 20}
    assert app.repeated() == []
    assert effects(app, "child 1") == 10


def test_children_are_deleted_with_their_run(app: App) -> None:
    assert code_of(run(app, "nested")) == 0
    assert app.statuses() == {"SUCCESS": 3}
    app.rows(
        "UPDATE {dbos}workflow_status SET name = 'research_agent.run' WHERE name = 'chief.run'"
    )
    deleted = app.run("--delete-older-than", "0", recipe="runs")
    assert code_of(deleted) == 0, words(deleted)
    assert app.statuses() == {}


def test_children_are_deleted_with_the_unfinished_run_of_a_person(app: App) -> None:
    kill(app, "nested", "inside child 2")
    assert app.statuses() == {"PENDING": 3}
    person = ["--tenant", "local", "--user", "local"]
    deleted = app.run("--delete-older-than", "0", *person, recipe="runs")
    assert code_of(deleted) == 0, words(deleted)
    assert "Runs deleted: 1." in deleted.stdout
    assert app.statuses() == {}


def test_a_child_in_a_queue_that_nobody_serves_is_told(app: App) -> None:
    kill(app, "later", "inside child 2")
    app.rows(
        "UPDATE {dbos}workflow_status SET status = 'ENQUEUED', queue_name = 'theirs'"
        " WHERE parent_workflow_id IS NOT NULL"
    )
    waiting = start(app, "later")
    wait_for(lambda: "in the queue theirs" in words(waiting), "the reason of the wait")
    app.rows("UPDATE {dbos}workflow_status SET queue_name = NULL WHERE queue_name = 'theirs'")
    assert code_of(waiting) == 0, words(waiting)
