"""Execute the runs of the shared queue, until SIGTERM: `uv run -m recipes.worker`.

Start as many as you like, on machines that share the code, the settings and the Postgres URL.
DBOS's queue hands each run to one process. What a process that has died had begun, a worker puts
into the queue again within seconds. `recipes.many` and `recipes.service` fill the queue, and take
part in the work.
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
from agent import Executor, RunFailed, Waiting
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
    return Executor(settings, brief, build, queue=f"research/{settings.model}/{told[:8]}")


def request_of(run: WorkflowStatus) -> ResearchRequest:
    """Return what was asked, from what is stored beside the run; "" for what older code lacked."""
    asked = run.attributes or {}
    return ResearchRequest(
        **{field.name: asked.get(field.name, "") for field in fields(ResearchRequest)}
    )


def prepare(executor: Executor, run_id: str, request: ResearchRequest | None = None) -> bool:
    """Put a run into the shared queue if nobody has it in hand; tell whether that was done.

    The run's lock is held for this moment only: then the queue decides who executes it. A run that
    is not stored is begun only if a request is given.

    Raises:
        ResearchError: The run cannot go on with this code.
    """
    if not executor.locks.take(run_id):
        return False  # a command brings it to its end, or another worker prepares it
    try:
        run = executor.look(run_id)
        if run and (run.status == "SUCCESS" or executor.is_in_hand(run)):
            return False
        if run is None and request is None:  # it was deleted
            return False
        agent.prepare(executor, request or request_of(run), run)  # type: ignore[arg-type]
        return True
    finally:
        executor.locks.free(run_id)


class Worker:
    """What a process does that serves the shared queue, beside DBOS's own work."""

    def __init__(self, executor: Executor) -> None:
        """Serve the executor's queue, from now on."""
        self.executor, self.waiting = executor, Waiting(executor)
        self.left_alone: dict[str, str] = {}
        """Run ID to reason: runs that cannot go on here. They must not stop the others."""
        self.tries: Counter[str] = Counter()
        executor.make_ready()
        executor.launch()

    def take_over(self) -> None:
        """Put the runs of the queue that nobody executes any more into it again."""
        if not agent.loop_lives():
            raise RunFailed("a step has ended DBOS's event loop: start this program again.")
        begun = self.executor.client.list_workflows(
            status="PENDING", queue_name=self.executor.queue, load_input=False, load_output=False
        )
        for run in begun:
            run_id = run.workflow_id
            if run_id in self.left_alone or self.executor.is_in_hand(run):
                continue
            reason = self.executor.lost.get(run_id)
            try:
                self.tries[run_id] += bool(reason)
                if self.tries[run_id] > 1:
                    raise RunFailed(f"DBOS has given it up twice: {reason}")
                prepare(self.executor, run_id)
            except ResearchError as error:
                self.left_alone[run_id] = str(error)
                agent.print_wrapped(f"run {run_id} is left alone: {error}", indent=4)

    def stop(self) -> None:
        """Finish what this process executes; what takes longer is taken over by others."""
        DBOS.destroy(workflow_completion_timeout_sec=GRACE)


def main() -> int:
    """Serve until SIGTERM arrives."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        # Whatever blocks, a step or a wait for the database, this process ends in time.
        end = threading.Timer(GRACE + 1, os._exit, [0])
        end.daemon = True
        end.start()
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
