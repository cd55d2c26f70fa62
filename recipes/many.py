"""Research many companies, ten at a time: `uv run -m recipes.many Acme Globex Initech`.

Without names it reads them from standard input, one a line. Each name is the same run as when it is
given alone. They go into the shared queue, so every worker and every other batch helps, and this
process helps them until its own runs have ended. One that fails stops nobody.
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
from agent import OPEN, Executor
from config import ResearchRequest
from recipes import worker
from recipes.worker import Worker
from tools import ResearchError, print_line


class Batch:
    """Runs that this process brings to their ends."""

    def __init__(self, executor: Executor, requests: Iterable[ResearchRequest]) -> None:
        """Begin with none of them prepared."""
        self.executor = executor
        self.requests = {request.run_id: request for request in requests}
        self.outcomes: dict[str, str] = {}
        """Run ID to how it has ended: "finished", or what went wrong."""
        self.tries: dict[str, int] = {}
        """Run ID to how often it was put into the queue, or 1 if it was in hand: if a run that is
        named here fails, that is its outcome. One that had failed before is resumed."""
        self.running = 0

    def look(self, run_ids: Iterable[str]) -> dict[str, WorkflowStatus]:
        """Return what is stored of these runs, without their results."""
        ids, found = list(run_ids), dict[str, WorkflowStatus]()
        for start in range(0, len(ids), 200):  # a statement takes only so many parameters
            runs = self.executor.client.list_workflows(
                workflow_ids=ids[start : start + 200], load_input=False, load_output=False
            )
            found |= {run.workflow_id: run for run in runs}
        return found

    def step(self) -> None:
        """Look at all runs that have not ended, and put those into the queue that nobody has."""
        left = self.requests.keys() - self.outcomes.keys()
        stored = self.look(left)
        self.running = sum(run.status == "PENDING" for run in stored.values())
        for run_id in left:
            try:
                self._deal_with(run_id, stored.get(run_id))
            except ResearchError as error:  # it stops nobody else
                self.outcomes[run_id] = f"not resumed: {error}"

    def _deal_with(self, run_id: str, run: WorkflowStatus | None) -> None:
        if run and run.status == "SUCCESS":
            whole = self.executor.look(run_id)
            self.executor.brief.read_report(run_id, whole and whole.output)
            self.outcomes[run_id] = "finished"
        elif run and run.status in OPEN and self.executor.is_in_hand(run):
            self.tries.setdefault(run_id, 1)
        elif run and run_id in self.tries and agent.is_over(self.executor, run, self.tries[run_id]):
            whole = self.executor.look(run_id) or run
            self.outcomes[run_id] = agent.describe_end(self.executor, whole).splitlines()[0]
        elif worker.prepare(self.executor, run_id, self.requests[run_id]):
            self.tries[run_id] = self.tries.get(run_id, 0) + 1


def print_outcomes(batch: Batch) -> None:
    """Print how each run ended, and the command that resumes it."""
    print_line(f"\n{'company':<40}outcome")
    for run_id, request in batch.requests.items():
        outcome = batch.outcomes[run_id]
        agent.print_wrapped(f"{request.company[:38]:<40}{outcome}", indent=4)
        if outcome != "finished":
            words = [f"--bucket={request.bucket}"] if request.bucket else []
            words += ["--", request.company] if request.company[0] == "-" else [request.company]
            print_line(f"    resume it: uv run agent.py {shlex.join(words)}")


def main() -> int:
    """Bring the run of each name to its end; return 1 if one has no report."""
    parser = argparse.ArgumentParser(description="Research many companies, ten at a time.")
    parser.add_argument("company", nargs="*", help="without any: one a line of standard input")
    parser.add_argument("--bucket", default="", help="any text: a new one is a new run")
    options = parser.parse_args()
    # What is not UTF-8 becomes a character that no name may have.
    data = b"" if options.company else sys.stdin.buffer.read()
    names = options.company or data.decode("utf-8-sig", "surrogateescape").split("\n")
    tools.output.show = "nothing"
    executor = worker.make_executor(config.load_settings())
    names = [name for name in names if name.strip()]
    batch = Batch(executor, [executor.request(name, options.bucket) for name in names])
    help_others, told, looked = Worker(executor), "", 0.0
    while len(batch.outcomes) < len(batch.requests):
        with help_others.waiting.while_the_database_is_away():
            batch.step()
            if time.monotonic() > looked + worker.LOOK:
                help_others.take_over()
                looked = time.monotonic()
        done = sum(outcome == "finished" for outcome in batch.outcomes.values())
        waiting = len(batch.requests) - len(batch.outcomes) - batch.running
        line = f"{done} done, {batch.running} running, {max(waiting, 0)} waiting,"
        line += f" {len(batch.outcomes) - done} failed"
        if line != told:
            print_line(line)
            told = line
        time.sleep(0.2)
    print_outcomes(batch)
    help_others.stop()  # this process may be executing runs that others have asked for
    return int(any(outcome != "finished" for outcome in batch.outcomes.values()))


if __name__ == "__main__":
    sys.exit(agent.run_command(main))
