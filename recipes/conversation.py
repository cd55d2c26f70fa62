"""A conversation: `uv run -m recipes.conversation chat "What is Acme?" "And its revenue?"`.

Each turn is a run of its own. Its ID is derived from the conversation's name and from all that was
said so far; its history is what the run of the turn before has stored. So the same command goes on
in the turn in which it was killed, and one more text at its end is the next turn. Turns that have
finished are replayed: they cost nothing.

Traps:
- Another word in an early turn is another conversation from there on: later turns are asked anew.
- The history is stored once more with each turn, and sent with each request. A provider bills it,
  and COST_LIMIT_USD counts what the earlier turns have cost as well.
- A turn needs the one before. If that is deleted, the same command asks it again.
"""

import argparse
import asyncio
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from dbos import DBOSClient, EnqueueOptions, WorkflowStatus
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo
from pydantic_ai.run import AgentRunResult

import agent
import config
import tools
from agent import Executor
from config import ResearchRequest
from tools import Brief, Invented, ResearchError


async def offline_script(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Stand in for a model: look up one thing in each turn, and tell what is known by then."""
    await asyncio.sleep(tools.service.latency)
    parts = [part for message in messages for part in message.parts]
    said = [str(part.content) for part in parts if isinstance(part, ai.UserPromptPart)]
    found = [part for part in parts if isinstance(part, ai.ToolReturnPart)]
    unused = [tool.name for tool in info.function_tools][len(found) :]
    if unused and isinstance(parts[-1], ai.UserPromptPart):
        company = said[0].split()[-1].strip("?.!")  # the last word of the first turn
        return ai.ModelResponse([ai.ToolCallPart(unused[0], {"company_name": company})])
    facts = [fact for part in found if isinstance(part.content, Invented) for fact in part.content]
    known = [f"{name} {value}" for name, value in facts if name not in Invented.model_fields]
    return ai.ModelResponse([ai.TextPart(f"Turn {len(said)}, I know: {', '.join(known)}.")])


BRIEF = Brief(
    instructions="""\
You talk about companies. Look up with the tools what you have not yet been told in this
conversation, and answer in a sentence or two from that, and from nothing else.""",
    tools=tools.BRIEF.tools,
    output_type=str,
    recipe="conversation",
    stand_in=offline_script,
)


@dataclass(frozen=True)
class Turn(ResearchRequest):
    """What a person says, after all that was said before; `company` is the conversation's name."""

    turns: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return self.turns[-1]

    @property
    def run_id(self) -> str:
        """The same text after the same texts, in the same conversation, is the same run."""
        parts = [self.tenant_id, self.user_id, self.model, self.told, self.company, *self.turns]
        digest = config.digest_of([config.normalize(part) for part in parts])
        return f"conversation-{digest}-turn-{len(self.turns)}"

    def enqueue(self, client: DBOSClient, queue: str) -> None:
        """Store this turn, which is new, in a queue, with the history that it goes on from."""
        history = list[ai.ModelMessage]()
        if len(self.turns) > 1:
            before = replace(self, turns=self.turns[:-1]).run_id
            runs = client.list_workflows(workflow_ids=[before], load_input=False)
            if not runs:
                raise ResearchError(f"run {before}, the turn before, was deleted: start again.")
            history = history_of(runs[0])
        options: EnqueueOptions = {
            "workflow_name": config.WORKFLOW_NAME,
            "workflow_id": self.run_id,
            "queue_name": queue,
            "app_version": config.APP_VERSION,
            "attributes": asdict(self),  # recipes.runs makes the command of it
        }
        client.enqueue(options, self.prompt, deps=None, message_history=history)


def history_of(run: WorkflowStatus) -> list[ai.ModelMessage]:
    """Return all that was said up to the end of a turn; `UnreadableError` if it does not fit."""
    result = run.output
    messages = result.all_messages() if isinstance(result, AgentRunResult) else result
    history: list[ai.ModelMessage] = tools.read_stored(
        run.workflow_id, "history", messages, list[ai.ModelMessage]
    )
    return history


def main() -> int:
    """Bring the turns of a conversation to their ends, one after the other, and print them."""
    parser = argparse.ArgumentParser(description="Talk with an agent that survives being killed.")
    parser.add_argument("name", help="of the conversation")
    parser.add_argument("turn", nargs="+", help="what you say, from the first turn on")
    options = parser.parse_args()
    settings = config.load_settings()
    asked = settings.request(BRIEF, options.name)
    turns = tuple(
        config.clean_text(f"turn {number}", text, longest=5000)
        for number, text in enumerate(options.turn, 1)
    )
    executor = Executor(settings, BRIEF)
    for number, text in enumerate(turns, 1):
        finished = agent.research(executor, Turn(**vars(asked), turns=turns[:number]))
        history_of(finished.run)  # what cannot be gone on from is not shown as an answer
        agent.print_wrapped(f"You: {text}", indent=4)
        agent.print_wrapped(f"Agent: {finished.report}", indent=4)
    with suppress(*config.DATABASE_ERRORS):  # the next process that launches does it, too
        executor.client.delete_queue(executor.id)
    return 0


if __name__ == "__main__":  # it defines no step and no stored type, so it may run as `__main__`
    sys.exit(agent.run_command(main))
