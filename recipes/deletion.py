"""Delete old runs, or all runs of a person: `recipes/runs.py` has the command.

Traps:
- Whoever resumes a failed run holds its lock. So whoever deletes one must hold it, too.
- A worker takes an enqueued run without that lock. So such a run is cancelled before it is deleted.
- A run that its process executes is not deleted: its steps would go on, and act. (The last step of
  a run that was cancelled just now may still go on.)
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from dbos import WorkflowStatus

from agent import DEFINITION
from durable import Database, Executor
from durable.console import print_line, print_wrapped
from durable.failures import OPEN
from recipes.listing import attributes_of

FAILED = ["ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
"""The states in which a run ends without a report. It can be resumed."""


def delete_old(executor: Executor[Any], days: float, failed: bool) -> None:
    """Delete what finished more than so many days ago, and if wished what failed."""
    old = executor.client.list_workflows(
        name=DEFINITION.workflow_name,
        status=["SUCCESS", *(FAILED if failed else [])],
        completed_before=_before(days).isoformat(),
        load_input=False,
        load_output=False,
    )
    deleted, _ = _delete(executor, old)
    _print_deleted(executor.database, deleted)


def forget(executor: Executor[Any], days: float, tenant_id: str, user_id: str) -> int:
    """Delete all that a person has asked more than so many days ago, in whatever state it is.

    Returns:
        How many of these runs are left, because a process has them.
    """
    runs = executor.client.list_workflows(  # of each agent that has stored who asks
        end_time=_before(days).isoformat(), load_input=False, load_output=False
    )
    asker = (tenant_id, user_id)
    asked = [
        (attributes_of(run).get("tenant_id"), attributes_of(run).get("user_id")) for run in runs
    ]
    theirs = [run for run, who in zip(runs, asked, strict=True) if who == asker]
    deleted, left = _delete(executor, theirs)
    _print_deleted(executor.database, deleted)
    if left:
        print_line(f"Left, because a process executes or resumes them: {len(left)}.")
        for run_id in left:
            print_line(f"    {run_id}")
        print_line("Stop these processes, or wait for them, and run the same command again.")
    return len(left)


def _before(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def _delete(executor: Executor[Any], runs: Iterable[WorkflowStatus]) -> tuple[int, list[str]]:
    """Delete runs with the workflows that they have started; return how many, and what is left."""
    finished = [run.workflow_id for run in runs if run.status == "SUCCESS"]
    for start in range(0, len(finished), 200):  # nothing can happen to them any more
        executor.client.delete_workflows(finished[start : start + 200], delete_children=True)
    others = [run for run in runs if run.status != "SUCCESS"]
    left = [run.workflow_id for run in others if not _delete_unfinished(executor, run)]
    return len(finished) + len(others) - len(left), left


def _delete_unfinished(executor: Executor[Any], seen: WorkflowStatus) -> bool:
    """Delete a run that has no report; return False if a process has it."""
    client, run_id = executor.client, seen.workflow_id
    if not executor.locks.take(run_id):
        return False
    try:
        run = executor.find_run(run_id)
        if run and run.status == "ENQUEUED" and seen.status in OPEN:
            client.cancel_workflow(run_id)  # or a worker could take it now
            run = executor.find_run(run_id)
            if run and run.executor_id != seen.executor_id:  # a worker has been quicker
                return False
        if run and (run.status == "SUCCESS" or (run.status in OPEN and seen.status not in OPEN)):
            return False  # it has been resumed since it was seen
        if run and run.status == "PENDING" and executor.locks.find_living([f"{run.executor_id}"]):
            return False
        client.delete_workflows([run_id], delete_children=True)
        return True
    finally:
        executor.locks.free(run_id)


def _print_deleted(database: Database, count: int) -> None:
    print_line(f"Runs deleted: {count}.")
    room = "Postgres uses the room again, after its autovacuum."
    if database.is_sqlite:
        size = Path(f"{database.url.database}").stat().st_size / 1e6
        room = f"{database.label} keeps its size, {size:.1f} MB, until VACUUM; new runs"
        room += " use the room again."
    print_wrapped(room)
