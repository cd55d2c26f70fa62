"""The same runs with `DBOSDurability`: `uv run -m recipes.durability "Acme"`.

Pydantic AI 3 will have no `DBOSAgent`. `DBOSDurability` is a capability *of* an agent, and you
write the workflow that calls it. The workflow and its steps keep their names, so a run that
`DBOSAgent` has begun goes on here, and the other way round: it is the same run, and the two
commands may take turns.

To build another recipe's agent in this way, give its command this `build`, for example
`approval.main(durability.build)`.

Traps:
- The capability alone makes nothing durable: outside a workflow the agent runs without checkpoints.
- A workflow of another name would be another workflow, and runs in flight would be refused.
- The workflow must be there before DBOS is launched. Here the executor calls `build()` before that.
"""

import sys
from collections.abc import Sequence
from typing import Any

from dbos import DBOS
from pydantic_ai import Agent, ModelSettings
from pydantic_ai import messages as ai
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.durable_exec.dbos import DBOSDurability
from pydantic_ai.run import AgentRunResult

import agent
import config
from config import Settings
from tools import BRIEF, Brief


def build(
    settings: Settings, brief: Brief, capabilities: Sequence[AbstractCapability[None]] = ()
) -> Agent[None, Any]:
    """Build the durable agent, and register the workflow that runs it."""
    durability = DBOSDurability[None](
        model_step_config=agent.MODEL_STEP, parallel_execution_mode="sequential"
    )
    research_agent = Agent(
        config.build_model(settings, brief.stand_in),
        name=config.AGENT_NAME,
        instructions=brief.instructions,
        output_type=brief.output_type,
        tools=brief.tools,
        capabilities=[*capabilities, durability],
        retries=2,  # how often a bad answer or tool call goes back to the model
        # DBOS retries. Most providers' clients do too, and the attempts would multiply.
        model_settings=ModelSettings(max_retries=0),
    )

    @DBOS.workflow(name=config.WORKFLOW_NAME)
    async def run(
        prompt: str, *, deps: None = None, message_history: list[ai.ModelMessage] | None = None
    ) -> AgentRunResult[Any]:
        return await research_agent.run(prompt, deps=deps, message_history=message_history)

    return research_agent


def main() -> int:
    """Bring the run of one company to its end, and print its report."""
    options = agent.make_parser("Research a company, with DBOSDurability.").parse_args()
    return agent.research_company(options, BRIEF, build)


if __name__ == "__main__":  # it defines no step and no stored type, so it may run as `__main__`
    sys.exit(agent.run_command(main))
