"""The program around an executor: what it must not do, because a process has only one DBOS."""

import asyncio
import os

from durable.dbos_internals import is_dbos_made
from durable.errors import DurableError

makers: dict[int, object] = {}
"""Process number to the executor that this process has made. A forked child inherits its parent's
entry, and may make its own executor."""


def refuse_second_executor(executor: object) -> None:
    """Raise `DurableError` if this process has made another executor."""
    # One operation, because two threads may make executors at the same time.
    if makers.setdefault(os.getpid(), executor) is not executor:
        raise DurableError(
            "this process has made an executor before, and a process can have only one.\n"
            "Share the first one: any number of threads may use it, also after its `with` block."
        )


def allow_another_try() -> None:
    """Let this process make an executor again, because the first one could not be made."""
    del makers[os.getpid()]


def refuse_event_loop() -> None:
    """Raise `DurableError` if an event loop runs in this thread, as in a notebook.

    DBOS would execute its runs in that loop, and who waits for a run would block that loop for
    ever.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise DurableError(
        "an event loop runs in this thread, and would be blocked until the run has ended.\n"
        "Use another thread: await asyncio.to_thread(research, executor, question)"
    )


def refuse_other_dbos() -> None:
    """Raise `DurableError` if DBOS would be launched on the database of somebody else's DBOS."""
    if is_dbos_made():
        raise DurableError(
            "this program has made a DBOS of its own, and a process can have only one.\n"
            "Run the agent in a process of its own, or call DBOS.destroy() before."
        )
