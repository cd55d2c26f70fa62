"""Execute the runs of the shared queue, until SIGTERM: `uv run -m recipes.worker`.

Start as many as you like, on machines that share the code, the settings and the Postgres URL.
DBOS's queue hands each run to one process. What a process that has died had begun, a worker puts
into the queue again within seconds. `recipes.many` and `recipes.service` fill the queue, and take
part in the work.

Traps:
- Nobody holds the lock of a run while a worker executes it. That the worker lives is enough.
- A run that DBOS has given up stays PENDING, and everybody would wait for the process that had it.
- A tool that calls `sys.exit()` ends DBOS's event loop, and with it each worker that takes its run.
"""

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import fields

from dbos import DBOS, WorkflowStatus

import agent
import config
import tools
from agent import Executor, Prepared, RunFailed, Waiting
from config import ResearchRequest, Settings
from tools import BRIEF, Brief, ResearchError

LOOK = 5.0
"""Seconds between two looks for runs that dead processes have left."""
GRACE = 8
"""Seconds to finish what has begun. A container platform kills ten seconds after SIGTERM."""


def make_executor(
    settings: Settings,
    brief: Brief = BRIEF,
    build: Callable[[Settings, Brief], object] = agent.build_agent,
) -> Executor:
    """Become an executor of the queue of everybody who has this model, brief and version.

    A run that is queued under other instructions, or for another model, is another question.
    """
    told = config.digest_of([*brief.told, config.APP_VERSION])
    # With a slash there, it never looks like an executor ID: such queues are deleted.
    return Executor(settings, brief, build, queue=f"research/{settings.model}/{told[:8]}")


def request_of(run: WorkflowStatus) -> ResearchRequest:
    """Return what was asked, from what is stored beside the run; "" for what older code lacked."""
    asked = run.attributes or {}
    return ResearchRequest(
        **{field.name: asked.get(field.name, "") for field in fields(ResearchRequest)}
    )


def prepare(
    executor: Executor, run_id: str, request: ResearchRequest | None = None
) -> Prepared | None:
    """Put a run into the shared queue if nobody has it in hand; return None if somebody has.

    The run's lock is held for this moment only: then the queue decides who executes it. A run that
    is not stored is begun only if a request is given.

    Raises:
        ResearchError: The run cannot go on with this code.
    """
    if not executor.locks.take(run_id):
        return None  # a command brings it to its end, or another worker prepares it
    try:
        run = executor.look(run_id)
        if run and (run.status == "SUCCESS" or executor.is_in_hand(run)):
            return None
        request = request_of(run) if run else request
        return agent.prepare(executor, request, run) if request else None
    finally:
        executor.locks.free(run_id)


class Worker:
    """What a process does that serves the shared queue, beside DBOS's own work."""

    def __init__(self, executor: Executor) -> None:
        """Serve the executor's queue, from now on."""
        self.executor, self.waiting = executor, Waiting(executor)
        self.refused: set[str] = set()
        """IDs of runs that cannot go on here: they must not stop the others."""
        self.losses: Counter[str] = Counter()
        while not executor.launched:
            with self.waiting.while_the_database_is_away():
                executor.make_ready()
                executor.launch()

    def take_over(self) -> None:
        """Put the runs of the queue that nobody executes any more into it again.

        Raises:
            RunFailed: This process cannot execute anything any more.
        """
        agent.raise_trouble(self.executor)
        if not agent.loop_lives():
            raise RunFailed("a step has ended DBOS's event loop: start this program again.")
        client, lost = self.executor.client, self.executor.lost
        for run in client.list_workflows(
            status="PENDING", queue_name=self.executor.queue, load_input=False, load_output=False
        ):
            run_id = run.workflow_id
            if run_id in self.refused or self.executor.is_in_hand(run):
                continue
            self.losses[run_id] += run_id in lost
            try:
                if self.losses[run_id] > 1:
                    raise RunFailed(f"DBOS has given it up twice: {lost[run_id]}")
                if prepared := prepare(self.executor, run_id):
                    agent.print_wrapped(f"run {run_id}: {prepared.found}", indent=4)
            except ResearchError as error:
                agent.print_wrapped(f"run {run_id} is left alone: {error}", indent=4)
                if run.executor_id == self.executor.id:
                    # Everybody would wait for this process. What is cancelled can be resumed.
                    client.cancel_workflow(run_id)
                    lost.pop(run_id, None)  # it may come back to this process
                    self.losses[run_id] = 0
                else:
                    self.refused.add(run_id)

    def stop(self) -> None:
        """Finish what this process executes; what takes longer is taken over by others."""
        DBOS.destroy(workflow_completion_timeout_sec=GRACE)


def end_in_time(code: int) -> None:
    """End this process soon, whatever blocks: a step, or a wait for the database."""
    timer = threading.Timer(GRACE + 1, os._exit, [code])
    timer.daemon = True
    timer.start()


def main() -> int:
    """Serve until SIGTERM arrives."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        end_in_time(0)
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    tools.output.show = "many runs"
    settings = config.load_settings()
    worker = Worker(make_executor(settings))
    agent.print_wrapped(
        f"A worker serves the queue {worker.executor.queue}. Process {os.getpid()}. Database:"
        f" {settings.database_label}."
    )
    while not stopped.wait(LOOK):
        with worker.waiting.while_the_database_is_away():
            worker.take_over()
    tools.print_line("Asked to stop: taking no more runs, and finishing what has begun.")
    worker.stop()
    return 0


if __name__ == "__main__":
    sys.exit(agent.run_command(main))
