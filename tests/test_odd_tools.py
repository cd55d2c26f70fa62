"""A run whose tool or type is unusual is killed one step later, and goes on: see odd_tools.py."""

import functools
import signal
from dataclasses import replace
from typing import Any, cast

import child
import odd_tools
import pytest
from conftest import App
from dbos import StepInfo
from odd_tools import Aliased, Desk, look_up_alias, look_up_in
from pydantic_ai import Agent, Tool
from pydantic_ai.models.test import TestModel

from agent import DEFINITION
from durable import AgentDefinition, UnreadableError


@pytest.fixture(autouse=True)
def odd_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of the app have the agent of odd_tools.py."""
    monkeypatch.setattr(child, "main", odd_tools.main)


@pytest.mark.parametrize("odd", odd_tools.TOOLS)
def test_a_run_that_is_killed_after_an_odd_tool_goes_on_and_acts_once(app: App, odd: str) -> None:
    killed = app.run("Acme", ODD=odd, KILL_AT="after commit 2")
    assert killed.wait() == -signal.SIGKILL, killed.stderr
    again = app.run("Acme", ODD=odd)
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps" in again.stdout
    assert len(app.ledger("effect tool")) == 1
    replayed = app.run("Acme", ODD=odd)
    assert replayed.wait() == 0, replayed.stderr
    assert "finished earlier" in replayed.stdout
    assert app.statuses() == {"SUCCESS": 1}


def having(tool: Any) -> AgentDefinition[Any]:
    """Return the definition of an agent with this tool only."""
    return replace(DEFINITION, tools=[tool], instructions="Look it up.")


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (functools.partial(look_up_in, "eu"), "look_up_in: Look up a company."),
        (functools.partial(look_up_in, region="eu"), "look_up_in: Look up a company."),
        (Desk().look_up, "look_up: Look up a company."),
        (Tool(Desk().look_up, name="other"), "other: Look up a company."),
        (look_up_alias, "look_up_alias: None"),
    ],
)
def test_what_is_told_of_a_tool_is_the_name_that_the_model_reads_and_its_functions_docstring(
    tool: Any, told: str
) -> None:
    definition = having(tool)
    assert definition.prompt_parts[0] == "Look it up."
    assert definition.prompt_parts[1].startswith(told)
    assert definition.fingerprint == replace(definition).fingerprint
    agent = Agent(TestModel(call_tools=[]), tools=definition.tools)
    [name] = agent._function_toolset.tools
    assert told.startswith(f"{name}: ")


def test_a_partial_object_may_have_a_name_of_its_own_and_is_not_changed() -> None:
    europe, asia = functools.partial(look_up_in, "eu"), functools.partial(look_up_in, "asia")
    vars(asia)["__name__"] = "look_up_in_asia"
    definition = replace(DEFINITION, tools=[europe, asia])
    agent = Agent(TestModel(), tools=definition.tools)
    assert [*agent._function_toolset.tools] == ["look_up_in", "look_up_in_asia"]
    assert vars(europe) == {}


@pytest.mark.parametrize(
    ("tool", "step"),
    [
        (functools.partial(look_up_in, "eu"), "look_up_in"),
        (Desk().look_up, "Desk.look_up"),
        (Tool(Desk().look_up, name="other"), "Desk.look_up"),
        (look_up_alias, "look_up_alias"),
        (look_up_alias, "a step that a tool calls"),
    ],
)
def test_what_such_a_tool_has_stored_is_compared_under_the_name_of_its_step(
    tool: Any, step: str
) -> None:
    def stored(output: object) -> list[StepInfo]:
        found = {"function_name": step, "output": output, "error": None, "child_workflow_id": None}
        return [cast(StepInfo, found)]

    definition = having(tool)
    definition.refuse_unreadable("run", stored(Aliased(companyName="a")))
    with pytest.raises(UnreadableError, match=f"the {step} that run run has stored .* name: Field"):
        definition.refuse_unreadable("run", stored(Aliased.model_construct()))
    if step != "a step that a tool calls":
        with pytest.raises(UnreadableError, match="str is stored, today's type is Aliased"):
            definition.refuse_unreadable("run", stored("of an older type"))
