"""Tools of an MCP server: `uv run --group mcp -m recipes.mcp_tools "Acme"`.

`DBOSAgent` makes two steps of a server that has an `id`: one asks which tools there are, and each
call of a tool is another. No `@DBOS.step` is needed, and none is possible: the code is elsewhere.
Here the server is demo/mcp_server.py, which this process starts when a step first needs it.

What of the server is part of the run ID: its name and a version, because they stand in the
instructions, and nothing else. What its tools are called, how they are described and what they do
can change at any time, and to ask for that would mean to start the server before it is known which
run this is. So a run keeps the tools that its first step has stored, and a question that has been
answered stays answered. Raise the version in `SERVER` to ask all questions anew.

Traps:
- Without `id`, the agent cannot be built. The ID is in the names of the steps: after a rename, DBOS
  refuses to go on with unfinished runs.
- A tool's error (`isError`) goes to the model, which can mend it. An error of the protocol is an
  outage here. Pydantic AI's default hands both to the model, and nothing is retried.
- A server that dies during a run is not started again by this process. The attempts that are left
  fail, the run fails, and the next process, which starts a new server, resumes the run.
- A server that is started by this process may outlive its SIGKILL for a moment, and act. The
  idempotency key covers that, if the server honours it.
- A checkpoint holds Pydantic AI's own object around the server's answer, and `durable` does not
  check it: finish all runs before you raise the major version of Pydantic AI.
"""

import os
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from dbos import error as dbos_error
from fastmcp.client.transports import StdioTransport
from fastmcp.exceptions import ToolError
from mcp.shared.exceptions import MCPError
from pydantic import BaseModel
from pydantic_ai import ModelRetry, RunContext
from pydantic_ai.capabilities import Toolset
from pydantic_ai.durable_exec.dbos import DBOSAgent, StepConfig
from pydantic_ai.mcp import CallToolFunc, MCPToolset, ToolResult

import agent
import tools
from agent import DEFINITION
from config import PROJECT, Settings
from demo.service import service
from durable import (
    MODEL_STEP,
    AgentDefinition,
    MalformedPayloadError,
    attempt,
    idempotency_key,
    parse,
    print_in_step,
    retry,
)
from durable.console import run_command
from durable.definition import Report

if __name__ == "__main__":
    # Run with -m, this file is `__main__`, and no other program could load what is stored of its
    # types. So it imports itself by its own name, before anything is defined.
    name = __spec__.name if __spec__ else Path(__file__).stem
    sys.exit(run_command(import_module(name).main))

SERVER = "company-data, version 1"
"""Which server is meant, and a version that is raised if its answers should be asked for anew."""

ANSWERS: dict[str, type[BaseModel]] = {
    "fetch_company_overview": tools.CompanyOverview,
    "fetch_financial_metrics": tools.FinancialMetrics,
}
"""What the server's tools promise to answer."""


class UnavailableError(Exception):
    """The server could not be reached, or wants to be asked later."""


# As for the other tools. StepConfig does not list all options of @DBOS.step, but takes them.
MCP_STEP = cast(
    StepConfig,
    {
        "timeout_seconds": 90,
        "preemptible": True,
        **retry(
            (
                UnavailableError,
                MalformedPayloadError,
                dbos_error.DBOSStepTimeoutError,
                RuntimeError,  # the client's, if the server does not start
            ),
            attempts=10,
            first_wait=0.5,
            backoff=1.5,
        ),
    },
)


async def call_with_key(
    context: RunContext[None], call_tool: CallToolFunc, name: str, arguments: dict[str, Any]
) -> ToolResult:
    """Call a tool of the server inside its step, with a key that the server can know it by."""
    del context  # it is the run's, and this process needs nothing of it
    print_in_step(f"{name} calls the MCP server{attempt()}")
    key = idempotency_key(name, **arguments)
    try:
        result = await call_tool(name, arguments, metadata={"idempotency_key": key})
    except ToolError as error:  # it goes back to the model, which can mend it: no retry
        raise ModelRetry(str(error)) from None
    except MCPError as error:  # an error of the protocol, or the connection is gone
        raise UnavailableError(f"{error}") from None
    if name == "fetch_financial_metrics":
        service.crash_if_told()
    if name in ANSWERS:
        parse(ANSWERS[name], result)
    return result


MCP_RESEARCHER = AgentDefinition(
    name=DEFINITION.name,
    instructions=f"""\
You research companies with the tools of the server {SERVER}.
Call fetch_company_overview first and fetch_financial_metrics second.
Then write the report from what they returned, and from nothing else.""",
    tools=[],  # the server's are read when the run is executed
    output_type=tools.ResearchReport,
    offline_script=DEFINITION.offline_script,
    program="-m recipes.mcp_tools",
    to_start_anew=DEFINITION.to_start_anew,
)


def server_tools() -> MCPToolset[None]:
    """Return the tools of the server, which is started when they are first used."""
    command = StdioTransport(
        sys.executable,
        ["-m", "demo.mcp_server"],
        cwd=str(Path(__file__).resolve().parent.parent),
        # A server gets what it needs of the environment, and no API key.
        env={key: value for key, value in os.environ.items() if key.startswith("DEMO_")},
        log_file=PROJECT / "mcp_server.log",  # its standard error
    )
    return MCPToolset(
        command,
        id="company-data",
        process_tool_call=call_with_key,
        tool_error_behavior="error",
        init_timeout=60,  # seconds until a server that is started must answer
    )


def build(settings: Settings, definition: AgentDefinition[Report]) -> DBOSAgent[None, Report]:
    """Make the agent durable, as agent.py does, with the server's tools and their retries."""
    with_tools = replace(
        definition, capabilities=[*definition.capabilities, Toolset(server_tools())]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")  # see agent.build_agent()
        return DBOSAgent(
            agent.build_plain_agent(settings, with_tools),
            model_step_config=MODEL_STEP,
            mcp_step_config=MCP_STEP,
            parallel_execution_mode="sequential",
        )


def main() -> int:
    """Bring the run of one company to its end, and print its report."""
    options = agent.make_parser("Research a company, with the tools of an MCP server.").parse_args()
    return agent.answer(options, MCP_RESEARCHER, build)
