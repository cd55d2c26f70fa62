"""The unfinished runs of a question that is about to begin a new run.

A new run acts again, whatever an earlier run of the same question has done. So people are told.
"""

from collections.abc import Mapping
from typing import Any

from durable.claim import Claim
from durable.failures import OPEN

UNFINISHED = [*OPEN, "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
SAME = ("program", "same_words", "tenant_id", "user_id")
"""What two runs of the same question have in common."""


def warn_of_similar(run: Claim[Any], asked: Mapping[str, Any]) -> None:
    """Name the unfinished runs of the same question; in an outage of the database, name none.

    Args:
        run: Claims the run that is about to begin.
        asked: What will be stored beside that run, its attributes.
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
            stored: Any = other.attributes  # another program may have stored anything
            if not isinstance(stored, dict) or any(stored.get(key) != asked[key] for key in SAME):
                continue
            # A fork differs in nothing from its base, and repeats steps on purpose.
            if differences := find_differences(stored, asked):
                run.progress.tell(
                    f"Warning: run {other.workflow_id} has the same question and is unfinished. It"
                    f" has {differences}. A new run begins now, and does again what that one has"
                    " done."
                )


def find_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Say what a stored run has that makes another run of the same question; "" for a fork."""
    names = {
        "prompt": "another prompt",
        "fingerprint": "other instructions or docstrings of tools",
        "model": f"the model {stored.get('model')}",
        "bucket": f"the bucket {stored.get('bucket')!r}",
    }
    return ", ".join(name for key, name in names.items() if stored.get(key) != asked[key])
