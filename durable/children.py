"""The workflows that the tools of a run have started: the run's children. They move with their run.

A tool starts a child by calling a `@DBOS.workflow`, or a second `DBOSAgent`. A run that is resumed
does not start its children again. It waits for them, or gets the stored error of one that has
failed. So the children that nobody executes are put into a queue before their run is.
"""

from collections.abc import Sequence
from typing import Any

from dbos import StepInfo, WorkflowStatus

from durable.console import Progress
from durable.dbos_internals import INTERNAL_QUEUE, find_known_workflows
from durable.errors import DurableError
from durable.executor import CHILDREN, Executor
from durable.failures import OPEN, find_awaited, find_restart_step, find_started
from durable.locks import is_executor_id
from durable.states import refuse_other_version


def resume(
    executor: Executor[Any], run: WorkflowStatus, steps: Sequence[StepInfo], queue: str
) -> None:
    """Put a run into a queue with all its checkpoints, after its children.

    The caller holds the run's lock, and knows that nobody executes the run.
    """
    move_children(executor, steps)
    # Without queue_name, the run would go to DBOS's internal queue, from which any process may take
    # the run.
    executor.client.resume_workflow(run.workflow_id, queue_name=queue)


def rewind(
    executor: Executor[Any],
    run: WorkflowStatus,
    steps: Sequence[StepInfo],
    start_step: int,
    queue: str,
) -> None:
    """Delete a run's checkpoints from a step on, and put it into a queue, after its children.

    The children that were started in the deleted steps are deleted, too. A child's ID is made of
    the run's ID and the step's number, so the old child's result would be taken for a new child's.
    The caller holds the run's lock, and knows that nobody executes the run.
    """
    client, run_id = executor.client, run.workflow_id
    kept = [step for step in steps if step["function_id"] < start_step]
    move_children(executor, kept)
    if dropped := set(find_started(steps)) - set(find_started(kept)):
        children = client.list_workflows(
            parent_workflow_id=run_id, load_input=False, load_output=False
        )
        ids = [child.workflow_id for child in children if child.workflow_id in dropped]
        client.delete_workflows(ids, delete_children=True)
    if run.status in OPEN:  # its process died before the end was stored
        client.cancel_workflow(run_id)  # because DBOS rewinds only what has ended
    client.rewind_workflow(run_id, start_step=start_step, queue_name=queue)


def move_children(executor: Executor[Any], steps: Sequence[StepInfo]) -> None:
    """Put the children for which a run with these steps will wait into the queue of children.

    Raises:
        DurableError: A child cannot go on in this program, so the run cannot, either.
    """
    for run_id in find_awaited(steps):
        move_child(executor, run_id)


def move_child(executor: Executor[Any], run_id: str) -> None:
    """Put a child into the queue of children, unless somebody executes or moves the child."""
    if not executor.locks.take(run_id):
        return  # its holder moves the child at this moment
    try:
        run = executor.find_run(run_id)
        if run is None:
            raise DurableError(f"{run_id}, for which the run waits, is not stored any more.")
        if run.status == "SUCCESS" or is_left_to_others(run) or executor.is_being_executed(run):
            return
        refuse_other_version(run, executor.version, executor.definition)
        if run.name not in find_known_workflows():
            raise DurableError(
                f"{run_id}, for which the run waits, is a workflow that this program has not"
                f" registered: {run.name}."
            )
        steps = executor.client.list_workflow_steps(run_id)
        executor.definition.refuse_unreadable(run_id, steps)
        executor.losses.forget(run_id)
        executor.register_queue_of_children()
        queue = find_own_queue(run) or executor.queue_of_children
        if restart := find_restart_step(run, steps):
            rewind(executor, run, steps, restart[0], queue)
        else:
            resume(executor, run, steps, queue)
    finally:
        executor.locks.free(run_id)


def find_own_queue(run: WorkflowStatus) -> str:
    """Return the queue that the tool has chosen for a child, because of its limits; "" if none."""
    queue = run.queue_name or INTERNAL_QUEUE
    return "" if queue == INTERNAL_QUEUE or queue.endswith(CHILDREN) else queue


def is_left_to_others(run: WorkflowStatus) -> bool:
    """Tell whether processes that serve the child's own queue must execute the child.

    Whether they live is not known, unless they are executors of this module's kind.
    """
    waits = run.status == "ENQUEUED"
    is_theirs = run.status == "PENDING" and not is_executor_id(f"{run.executor_id}")
    return bool(find_own_queue(run)) and (waits or is_theirs)


def look_after_children(executor: Executor[Any], run_id: str, progress: Progress) -> None:
    """Put the children that nobody executes any more into the queue of children.

    A child that this process loses twice is cancelled. Then the run that waits for the child gets
    an error.

    Args:
        executor: This process.
        run_id: A run that this process executes.
        progress: Is told for what the run waits, and which child is cancelled.

    Raises:
        DurableError: A child cannot go on in this program.
    """
    elsewhere, parents = [], [run_id]
    while parents:
        children = executor.client.list_workflows(
            parent_workflow_id=parents, status=[*OPEN], load_input=False, load_output=False
        )
        parents = [child.workflow_id for child in children]
        for child in children:
            if is_left_to_others(child):
                elsewhere.append(f"{child.workflow_id} in the queue {child.queue_name}")
            elif child.queue_name is None and child.executor_id == executor.id:
                pass  # executed as a part of its parent
            elif not executor.is_being_executed(child):
                _move_again(executor, child, progress)
            elif child.status == "PENDING" and child.executor_id != executor.id:
                elsewhere.append(f"{child.workflow_id} executed by {child.executor_id}")
    if elsewhere:
        progress.tell(f"Run {run_id} waits for {', '.join(elsewhere)}.")


def _move_again(executor: Executor[Any], child: WorkflowStatus, progress: Progress) -> None:
    counts, run_id = executor.losses.counts, child.workflow_id
    counts[run_id] += executor.is_lost(child)
    if counts[run_id] < 2:
        move_child(executor, run_id)
        return
    reason = executor.why_lost(child)
    executor.cancel(child)
    progress.warn(f"DBOS has given up {run_id} twice, so this process cancels it: {reason}")
