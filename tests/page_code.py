# ruff: noqa: ARG001, F401 - the code of the page finds its names here
"""The code of docs/operations.md, with what it needs around it: an agent that uses it.

`test_pages.py` runs this module as `child.py` runs a recipe. PART says which code.
"""

import os
import re
import sqlite3
from pathlib import Path
from typing import Any

from child import note, reach_async
from dbos import DBOS
from pydantic_ai import Agent, ModelSettings, RunContext
from pydantic_ai import messages as ai
from pydantic_ai.durable_exec.dbos import DBOSDurability
from pydantic_ai.models.function import AgentInfo

import agent
from config import Settings, load_settings
from durable import MODEL_STEP, AgentDefinition, LimitsOfTheProcess, durable_model

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "operations.md").read_text()
STARTS = {
    "a helper": "from pydantic_ai import Agent, ModelSettings, RunContext",
    "no keys": "@DBOS.step(timeout_seconds=30)\nasync def wire",
}
CALLS: dict[str, dict[str, Any]] = {
    "audit": {"company_name": "Acme"},
    "wire": {"invoice": "17", "account": "DE02", "cents": 100},
}


class OutcomeUnknownError(Exception):
    """Nobody knows whether the call has acted."""


class Attempts:
    """The table of those calls that have begun."""

    def do(self, sql: str, *values: str) -> sqlite3.Cursor:
        with sqlite3.connect(Path(os.environ["HOME"]) / "attempts.sqlite") as file:
            file.execute("CREATE TABLE IF NOT EXISTS attempts (key TEXT PRIMARY KEY, result TEXT)")
            return file.execute(sql, values)

    async def begin(self, key: str) -> bool:
        sql = "INSERT INTO attempts (key) VALUES (?) ON CONFLICT DO NOTHING"
        return self.do(sql, key).rowcount == 1

    async def result(self, key: str) -> str | None:
        row = self.do("SELECT result FROM attempts WHERE key = ?", key).fetchone()
        return row[0] if row else None


class Bank:
    """A service that knows no keys."""

    async def wire(self, account: str, cents: int) -> str:
        note(f"effect wire {DBOS.workflow_id}:{DBOS.step_id}")
        await reach_async("after effect wire")
        return f"sent {cents} to {account}"


attempts, bank = Attempts(), Bank()


async def helper_script(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Be the helper's model: answer at once."""
    await reach_async("inside helper")
    note(f"effect helper {DBOS.workflow_id}:{DBOS.step_id}")
    return ai.ModelResponse(parts=[ai.TextPart("audited")])


async def call_tool(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Be the model: call the tool, once or as often as CALLS says, and answer with its result."""
    await reach_async(f"inside {len(messages)}")
    note(f"effect model {DBOS.workflow_id}:{DBOS.step_id}")
    parts = [part for message in messages for part in message.parts]
    results = [str(part.content) for part in parts if isinstance(part, ai.ToolReturnPart)]
    if len(results) >= int(os.environ.get("CALLS", "1")):
        return ai.ModelResponse(parts=[ai.TextPart(results[-1])])
    [tool] = info.function_tools
    return ai.ModelResponse(parts=[ai.ToolCallPart(tool.name, CALLS[tool.name])])


[code] = [
    block
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if block.startswith(STARTS[os.environ["PART"]])
]
if "OWN_USAGE" in os.environ:  # the page says what the argument is for
    code = code.replace(", usage=ctx.usage)", ")")
exec(code, globals())


def build(settings: Settings, definition: AgentDefinition[Any]) -> object:
    if "make_helper" in globals():
        globals()["helper"] = globals()["make_helper"](settings)
    return agent.build_agent(settings, definition)


def main() -> int:
    """Bring the run of one company to its end."""
    [tool] = [globals()[name] for name in CALLS if name in globals()]
    definition = AgentDefinition(
        name="chief",
        instructions="Call the tool.",
        tools=[tool],
        output_type=str,
        program="-m page_code",
        offline_script=call_tool,
    )
    return agent.answer(agent.make_parser("Try a page.").parse_args(), definition, build)
