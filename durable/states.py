"""The states in which a run can be found, and what a claim needs to know of a question.

The `match` of `research()` in agent.py says which move fits which state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from dbos import DBOSClient, EnqueueOptions, StepInfo, WorkflowStatus

from durable.database import DATABASE_ERRORS
from durable.definition import AgentDefinition, Report
from durable.errors import DurableError, RunFailed
from durable.failures import describe


@dataclass(frozen=True)
class New:
    """The run is not stored."""


@dataclass(frozen=True)
class Running:
    """A live process executes the run, or this process is about to."""


@dataclass(frozen=True)
class Finished(Generic[Report]):
    """The run has its report."""

    run: WorkflowStatus
    report: Report
    steps: list[StepInfo]
    restored: list[StepInfo]
    """The steps that were stored when this claim last put the run into the queue."""


@dataclass(frozen=True)
class Failed:
    """The run, or its last step, has failed. Resumed as it is, it would raise that error again."""

    step: int
    """The number of the step from which the run must go on."""
    error: object


@dataclass(frozen=True)
class Interrupted:
    """Nobody executes the run: it was interrupted, cancelled, lost, or is in another's queue."""


@dataclass(frozen=True)
class Ended:
    """The run has ended without a report since this claim put it into the queue."""

    error: DurableError


State = New | Running | Finished[Report] | Failed | Interrupted | Ended


class Claimable(Protocol):
    """What a claim needs to know of a question."""

    @property
    def run_id(self) -> str:
        """The ID of the question's run."""

    def enqueue(self, client: DBOSClient, options: EnqueueOptions) -> None:
        """Store the run, which is new, in the queue that the options name."""


def refuse_other_code(run: WorkflowStatus, version: str, definition: AgentDefinition[Any]) -> None:
    """Raise `DurableError` if DBOS would wait for another program to execute a run, for ever."""
    refuse_other_version(run, version, definition)
    if run.name != definition.workflow_name:
        raise DurableError(
            f"run {run.workflow_id} is one of another workflow, {run.name}.\n"
            f"Finish it with the program that began it, or {definition.to_start_anew}."
        )


def refuse_other_version(
    run: WorkflowStatus, version: str, definition: AgentDefinition[Any]
) -> None:
    """Raise `DurableError` if a run, or a workflow that a run has started, is of other code."""
    if run.app_version != version:
        raise DurableError(
            f"run {run.workflow_id} belongs to version {run.app_version} of this app, which is"
            f" version {version}.\n"
            f"Finish it with that version, or {definition.to_start_anew}."
        )


@contextmanager
def raise_as_outcome() -> Iterator[None]:
    """Raise whatever one run raises as a `DurableError`: it is that run's outcome, and no more.

    What a run has stored can make today's code raise anything. The database's errors pass, because
    the caller decides whether to wait, and so does Ctrl-C.
    """
    try:
        yield
    except (DurableError, *DATABASE_ERRORS):
        raise
    except Exception as error:
        raise RunFailed(f"this code cannot go on with the run: {describe(error)}") from error
