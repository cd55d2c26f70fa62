"""Research many companies, ten at a time: `uv run -m recipes.many Acme Globex Initech`.

Without names it reads them from standard input, one a line; blank lines and those that start with #
do not count. Each name is the same run as when it is given alone. They go into the shared queue, so
every worker and every other batch helps. This process is a worker, too, until its own runs have
ended. One that fails stops nobody.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterable

from dbos import WorkflowStatus

import agent
import config
import tools
from agent import OPEN, Executor, Waiting
from config import ResearchRequest, Settings
from recipes import worker
from recipes.worker import Worker
from tools import BRIEF, ResearchError, print_line


def read_requests(settings: Settings, names: list[str], bucket: str) -> list[ResearchRequest]:
    """Return what is asked; raise `ResearchError` with the number of a name that is unfit."""
    requests = []
    for number, text in enumerate(names or sys.stdin.buffer, 1):
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8-sig").strip()  # Windows puts a mark before the first line
                if not text or text.startswith("#"):
                    continue
            requests.append(settings.request(BRIEF, text, bucket))
        except (ResearchError, UnicodeError) as error:
            raise ResearchError(f"{'name' if names else 'line'} {number}: {error}") from None
    if not requests:
        raise ResearchError("there are no names: give some, or lines of standard input.")
    return requests


class Batch:
    """Runs that this process brings to their ends."""

    def __init__(self, executor: Executor, requests: Iterable[ResearchRequest]) -> None:
        """Begin with none of them prepared."""
        self.executor = executor
        self.requests: dict[str, ResearchRequest] = {}
        for request in requests:
            self.requests.setdefault(request.run_id, request)
        self.outcomes: dict[str, str] = {}
        """Run ID to how it has ended: "finished", or what went wrong."""
        self.begun: set[str] = set()
        """IDs of runs that somebody had in hand, or got from here: if one of them fails, that is
        its outcome. One that had failed before is resumed."""
        self.running = 0

    def look(self, run_ids: Iterable[str]) -> dict[str, WorkflowStatus]:
        """Return what is stored of these runs."""
        ids, found = list(run_ids), dict[str, WorkflowStatus]()
        for start in range(0, len(ids), 200):  # a statement takes only so many parameters
            runs = self.executor.client.list_workflows(
                workflow_ids=ids[start : start + 200], load_input=False
            )
            found |= {run.workflow_id: run for run in runs}
        return found

    def enqueue_new(self) -> None:
        """Put those into the queue that are not stored: quickly, while this process executes none.

        That needs no lock of the run: if somebody has stored it meanwhile, DBOS changes nothing.
        """
        stored = self.look(self.requests)
        for run_id, request in self.requests.items():
            if run_id not in stored:
                request.enqueue(self.executor.client, self.executor.queue)
                self.begun.add(run_id)

    def step(self) -> None:
        """Look at all runs that have not ended, and put those into the queue that nobody has."""
        left = [run_id for run_id in self.requests if run_id not in self.outcomes]
        stored = self.look(left)
        self.running = sum(run.status == "PENDING" for run in stored.values())
        for run_id in left:
            try:
                self._deal_with(run_id, stored.get(run_id))
            except ResearchError as error:  # it stops nobody else
                self.outcomes[run_id] = str(error)

    def _deal_with(self, run_id: str, run: WorkflowStatus | None) -> None:
        if run and run.status == "SUCCESS":
            self.executor.brief.read_report(run_id, run.output)
            self.outcomes[run_id] = "finished"
        elif run and self.executor.is_in_hand(run):
            self.begun.add(run_id)
        elif run and run.status not in OPEN and run_id in self.begun:
            self.outcomes[run_id] = agent.describe_end(self.executor, run).splitlines()[0]
        elif run_id in self.executor.lost:
            pass  # the worker in this process puts it into the queue again, or cancels it
        elif worker.prepare(self.executor, run_id, self.requests[run_id]):
            self.begun.add(run_id)

    def finish(self, serving: Worker) -> None:
        """Bring all runs to their ends, as a worker, and print how many have ended."""
        told, printed, looked = "", 0.0, 0.0
        while len(self.outcomes) < len(self.requests):
            with serving.waiting.while_the_database_is_away():
                self.step()
                if time.monotonic() > looked + worker.LOOK:
                    serving.take_over()
                    looked = time.monotonic()
            line = self._count()
            if line != told or time.monotonic() > printed + 15:  # a sign of life
                print_line(line)
                told, printed = line, time.monotonic()
            time.sleep(0.2)

    def _count(self) -> str:
        ended = len(self.outcomes)
        done = sum(outcome == "finished" for outcome in self.outcomes.values())
        running = min(self.running, len(self.requests) - ended)
        waiting = len(self.requests) - ended - running
        return f"{done} done, {running} running, {waiting} waiting, {ended - done} failed"


def print_outcomes(batch: Batch) -> None:
    """Print how each run ended, and the command that resumes it."""
    print_line(f"\n{'company':<40}outcome")
    for run_id, request in batch.requests.items():
        outcome = batch.outcomes[run_id]
        agent.print_wrapped(f"{request.company[:38]:<40}{outcome}", indent=4)
        if run_id in batch.begun and outcome != "finished":  # or it was refused
            words = [f"--bucket={request.bucket}"] if request.bucket else []
            words += ["--", request.company] if request.company[0] == "-" else [request.company]
            print_line(f"    resume it: uv run agent.py {shlex.join(words)}")


def main() -> int:
    """Bring the run of each name to its end; return 1 if one has no report that fits."""
    parser = argparse.ArgumentParser(description="Research many companies, ten at a time.")
    parser.add_argument("company", nargs="*", help="without any: one a line of standard input")
    parser.add_argument("--bucket", default="", help="any text: a new one is a new run")
    options = parser.parse_args()
    tools.output.show = "nothing"
    settings = config.load_settings()
    requests = read_requests(settings, options.company, options.bucket)
    executor = worker.make_executor(settings)
    batch = Batch(executor, requests)
    with Waiting(executor).while_the_database_is_away():  # what was not enqueued then, is later
        executor.make_ready()
        batch.enqueue_new()
    serving = Worker(executor)
    batch.finish(serving)
    print_outcomes(batch)
    code = int(any(outcome != "finished" for outcome in batch.outcomes.values()))
    worker.end_in_time(code)
    serving.stop()  # this process may execute runs that others have asked for
    return code


if __name__ == "__main__":
    sys.exit(agent.run_command(main))
