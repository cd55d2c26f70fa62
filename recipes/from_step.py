"""Run a stored run again from one of its steps: `uv run -m recipes.from_step "Acme" 3`.

This is a DBOS *fork*, a run of its own: its ID is that of the base run and "-from-3". The results
of the steps before that one are copied from the base, which stays as it is, whatever state it is
in. The same command resumes or replays the fork.

Traps:
- Side effects from that step on happen again, under other idempotency keys: no service can know
  that they are repeated on purpose.
- Without `application_version`, a fork that is killed before a process has taken it belongs to no
  version, and would be refused. Without `queue_name`, any process of this app would take it,
  whatever its model and instructions.
- A copied step counts as restored, though no command has executed it for this run.
"""

import sys
from contextlib import suppress
from dataclasses import dataclass

from dbos import DBOSClient, SetWorkflowID

import agent
import config
import tools
from agent import Executor
from config import ResearchRequest
from tools import BRIEF, ResearchError


@dataclass(frozen=True)
class Fork(ResearchRequest):
    """The run of a request, again from one step on."""

    step: int = 1

    @property
    def base_id(self) -> str:
        """The ID of the run whose earlier steps are taken."""
        return super().run_id

    @property
    def run_id(self) -> str:
        """The same base and the same step are the same fork."""
        return f"{self.base_id}-from-{self.step}"

    def enqueue(self, client: DBOSClient, queue: str) -> None:
        """Store the fork, which is new, in a queue; raise `ResearchError` for an unfit base."""
        self.refuse_unfit_base(client)
        with SetWorkflowID(self.run_id):
            client.fork_workflow(
                self.base_id,
                self.step,
                application_version=config.APP_VERSION,
                queue_name=queue,
            )

    def refuse_unfit_base(self, client: DBOSClient) -> None:
        """Raise `ResearchError` without such a run and step, or if this code cannot go on there."""
        runs = client.list_workflows(
            workflow_ids=[self.base_id], load_input=False, load_output=False
        )
        steps = client.list_workflow_steps(self.base_id)
        if not runs or self.step not in [step["function_id"] for step in steps]:
            raise ResearchError(f"there is no step {self.step} in run {self.base_id}.")
        agent.refuse_other_code(runs[0])
        copied = [step for step in steps if step["function_id"] < self.step]
        BRIEF.refuse_unreadable(self.base_id, copied)


def main() -> int:
    """Bring the fork of one company's run to its end, and print its report."""
    parser = agent.make_parser("Run a company's run again from one of its steps, as another run.")
    parser.add_argument("step", type=int, metavar="N", help="the number of the first one again")
    options = parser.parse_intermixed_args()  # or no option could stand between the two
    settings = config.load_settings()
    settings.service.crash = options.crash
    request = settings.request(BRIEF, options.company, options.bucket)
    fork = Fork(**vars(request), step=options.step)
    executor = Executor(settings)
    try:
        if executor.look(fork.run_id) is None:  # refused before a model is built
            fork.refuse_unfit_base(executor.client)
    except config.DATABASE_ERRORS as error:
        raise config.database_error(settings, error) from error
    agent.print_wrapped(
        f"This is run {fork.base_id} again from step {fork.step}, as a run of its own: side effects"
        " from that step on happen again, under other idempotency keys."
    )
    finished = agent.research(executor, fork)
    copied = [step for step in finished.steps if step["function_id"] < fork.step]
    agent.print_report(finished.report)
    agent.print_steps(finished.steps, finished.restored or copied)
    if options.crash:
        tools.print_line("--crash found nothing to kill: the flaky tool was not called.")
    with suppress(*config.DATABASE_ERRORS):  # the next process that launches does it, too
        executor.client.delete_queue(executor.id)
    return 0


if __name__ == "__main__":  # it defines no step and no stored type, so it may run as `__main__`
    sys.exit(agent.run_command(main))
