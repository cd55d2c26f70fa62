"""The unfinished runs of a question that is about to begin a new run.

A new run acts again, whatever an earlier run of the same question has done. So people are told.
"""

from collections.abc import Callable, Mapping
from typing import Any

from durable.claim import Claim
from durable.failures import OPEN

UNFINISHED = [*OPEN, "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]


def warn_of_similar(run: Claim[Any], differences: Callable[[Mapping[str, Any]], str]) -> None:
    """Name the unfinished runs of the same question; in an outage of the database, name none.

    Args:
        run: Claims the run that is about to begin.
        differences: Gets what is stored beside another run, its attributes. Returns in words what
            that run has and the new one has not; "" if the other run has another question.
    """
    executor = run.executor
    with executor.database.pause_at_outage(run.progress.warn):
        others = executor.client.list_workflows(
            name=executor.definition.workflow_name,
            status=UNFINISHED,
            load_input=False,
            load_output=False,
        )
        for other in others:
            if unlike := differences(other.attributes or {}):
                run.progress.tell(
                    f"Warning: run {other.workflow_id} has the same question and is unfinished. It"
                    f" has {unlike}. A new run begins now, and does again what that one has done."
                )
