# ruff: noqa: ARG001 - the model gives each tool an argument, and the tools need none
"""An agent that delegates: each way in which a tool can start other workflows is a KIND of it.

`test_children.py` and `test_lost.py` run this module as `child.py` runs a recipe.

The steps of all these workflows are calls of `act`, which has an effect. A test names the step in
which the process dies or waits (KILL_AT, WAIT_AT), which fails (FAIL), or which raises what is no
Exception (RAISE, in the step RAISE_IN).
"""

import asyncio
import logging
import logging.config
import os
import threading
import warnings
from typing import Any

from child import note, reach, reach_async
from dbos import DBOS
from pydantic_ai import Agent
from pydantic_ai import exceptions as ai_error
from pydantic_ai import messages as ai
from pydantic_ai.durable_exec.dbos import DBOSAgent, DBOSDurability
from pydantic_ai.models.function import AgentInfo, FunctionModel

import agent
from config import Settings, load_settings
from durable import AgentDefinition

RAISED = {
    "BaseExceptionGroup": BaseExceptionGroup("two ends", [KeyboardInterrupt(), ValueError("one")]),
    "CancelledError": asyncio.CancelledError(),
    "GeneratorExit": GeneratorExit(),
}


def stop_here(name: str) -> None:
    """Fail, if the test says so."""
    if os.environ.get("FAIL") == name:
        raise PermissionError(f"{name} is closed today")
    if os.environ.get("RAISE_IN") == name:
        raise RAISED[os.environ["RAISE"]]


@DBOS.step()
async def act(name: str) -> str:
    await reach_async(f"inside {name}")
    if seconds := os.environ.get("BLOCK"):
        threading.Event().wait(float(seconds))  # as a tool that blocks the event loop does
    stop_here(name)
    note(f"effect {name} {DBOS.workflow_id}:{DBOS.step_id}")
    await reach_async(f"after effect {name}")
    return f"{name} of {DBOS.workflow_id}"


@DBOS.workflow()
async def audit(company: str) -> str:
    """Audit a company."""
    await act("child 1")
    return await act("child 2")


@DBOS.workflow()
async def oversee(company: str) -> str:
    """Oversee the audit of a company."""
    await act("middle 1")
    return await audit(company)


async def do_both(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Be the model of the second agent: call its two tools, one after the other, and answer."""
    note(f"effect model {DBOS.workflow_id}:{DBOS.step_id}")
    if os.environ.get("FAIL") == "model of child":
        raise PermissionError("the model is closed today")
    called = sum(isinstance(message, ai.ModelResponse) for message in messages)
    if called < 2:
        return ai.ModelResponse(parts=[ai.ToolCallPart("act", {"name": f"child {called + 1}"})])
    return ai.ModelResponse(parts=[ai.TextPart("audited")])


helper: Any = None
"""The second agent."""


async def ask_helper(company: str) -> str:
    """Ask another agent to audit a company."""
    return str((await helper.run(f"Audit {company}")).output)


async def begin(company: str) -> str:
    """Begin an audit."""
    return (await DBOS.start_workflow_async(audit, company)).workflow_id


async def collect(company: str) -> str:
    """Collect the result of the audit that has begun."""
    run_id = (await DBOS.list_workflow_steps_async(f"{DBOS.workflow_id}"))[1]["child_workflow_id"]
    handle: Any = await DBOS.retrieve_workflow_async(f"{run_id}")
    return str(await handle.get_result())


async def act_alone(company: str) -> str:
    """Act without any child."""
    stop_here("tool")
    return await act("alone 1")


async def act_last(company: str) -> str:
    """Act after everything else."""
    return await act("last")


KINDS: dict[str, list[Any]] = {
    "workflow": [audit],
    "agent": [ask_helper],
    "later": [begin, collect],
    "durability": [ask_helper],
    "nested": [oversee],
    "alone": [act_alone],
}


async def call_all(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Be the model: call one tool after the other, and answer."""
    note(f"effect model {DBOS.workflow_id}:{DBOS.step_id}")
    called = sum(isinstance(message, ai.ModelResponse) for message in messages)
    if os.environ.get("FAIL") == "history" and called:  # the provider refuses what a tool returned
        raise ai_error.ModelHTTPError.for_category(
            ai_error.ModelRequestRejectedError, status_code=400, model_name="offline", body=None
        )
    if called < len(info.function_tools):
        name = info.function_tools[called].name
        return ai.ModelResponse(parts=[ai.ToolCallPart(name, {"company": "Acme"})])
    results = [
        str(part.content)
        for message in messages
        for part in message.parts
        if isinstance(part, ai.ToolReturnPart)
    ]
    return ai.ModelResponse(parts=[ai.TextPart(" and ".join(results))])


def define() -> AgentDefinition[str]:
    return AgentDefinition(
        name="chief",
        instructions="Call each tool.",
        tools=[*KINDS[os.environ["KIND"]], act_last],
        output_type=str,
        program="-m family",
        offline_script=call_all,
    )


def build(settings: Settings, definition: AgentDefinition[Any]) -> object:
    """Build both agents, as a program does that delegates."""
    global helper
    durability = os.environ["KIND"] == "durability"
    capabilities = [DBOSDurability()] if durability else []
    plain = Agent(FunctionModel(do_both), name="helper", tools=[act], capabilities=capabilities)
    if durability:
        helper = plain
    elif "WITHOUT_HELPER" not in os.environ:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")
            helper = DBOSAgent(plain, parallel_execution_mode="sequential")
    return agent.build_agent(settings, definition)


def limit_threads() -> None:
    """Let no thread be started after so many, as where a limit of the system is reached."""
    left = int(os.environ.get("THREADS", "1000"))
    start = threading.Thread.start

    def start_or_fail(self: threading.Thread) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    threading.Thread.start = start_or_fail  # type: ignore[method-assign]


def set_up_logging() -> None:
    """Log as a program does, in one of three ways."""
    match os.environ.get("LOGGING"):
        case "on":
            logging.basicConfig(level=logging.INFO)
        case "dictConfig":  # which disables the loggers that exist
            logging.config.dictConfig({"version": 1})
        case "disable":
            logging.disable()


def research_all(names: list[str]) -> int:
    """Bring the runs of many companies to their ends at once, in one process."""
    settings, definition = load_settings(), define()
    failed: list[str] = []

    def research_one(name: str) -> None:
        question = agent.parse_question(settings, definition, [name])
        try:
            agent.research(executor, question)
        except Exception as error:
            failed.append(name)
            note(f"failed {name}: {error}")

    with agent.make_executor(settings, definition, build) as executor:
        threads = [threading.Thread(target=research_one, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reach("the end")
    return int(bool(failed))


def main() -> int:
    """Bring the run of one company, or of many with commas between them, to its end."""
    set_up_logging()
    limit_threads()
    options = agent.make_parser("Delegate.").parse_args()
    if "," in options.company:
        return research_all(options.company.split(","))
    return agent.answer(options, define(), build)
