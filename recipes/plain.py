"""The plain pattern, as it is found in many places: `uv run -m recipes.plain`.

It survives a kill: run again, it goes on after the last stored step. These are its gaps, and what
closes each of them in this project.

- It raises the error of a failed run again, for ever: `prepare()` rewinds the run.
- It lets two processes execute one run: the two locks.
- It lets any process that starts resume every unfinished run, perhaps with another model: each
  `Executor` has an ID and a queue of its own.
- It gives the old answer to a new question, because DBOS compares only the ID: `run_id` is made of
  all that makes two questions different.
- It never resumes after a library upgrade, because by default the version is a hash of library
  code: `APP_VERSION`.
- It leaves retries to the provider's client, and stores what error texts quote, an API key among
  them: `MODEL_STEP` and `ModelInStep`.
- It hands on stored objects of older classes, which lack new fields: `read_stored()`.
- It can act twice on the outside world: `idempotency_key()`.
"""

import asyncio
from pathlib import Path

from dbos import DBOS, SetWorkflowID
from pydantic_ai import Agent
from pydantic_ai.durable_exec.dbos import DBOSAgent
from pydantic_ai.models.function import FunctionModel

import tools

DATABASE = Path(__file__).parent.parent / "plain.sqlite"


async def main() -> None:
    """Research one company, and print the report."""
    model = FunctionModel(tools.offline_script)
    agent = Agent(model, name="plain", output_type=tools.ResearchReport, tools=tools.BRIEF.tools)
    durable_agent = DBOSAgent(agent)  # it warns: recipes/durability.py is what comes after it
    DBOS(config={"name": "plain", "system_database_url": f"sqlite:///{DATABASE}"})
    DBOS.launch()  # resumes what this program left unfinished; it logs a lot
    with SetWorkflowID("acme-1"):
        result = await durable_agent.run('Write a research report on the company "Acme".')
    print(result.output)


if __name__ == "__main__":
    asyncio.run(main())
