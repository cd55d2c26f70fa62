"""Tools and types of which each is unusual in one way, in an agent that processes can be killed of.

`ODD` in the environment names the one that a process's agent has.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import child
from dbos import DBOS
from odd_future import look_up_later
from pydantic import BaseModel, ConfigDict, Field, computed_field, field_serializer, model_validator
from pydantic_ai import Tool
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo

import demo.script
from agent import DEFINITION


class Aliased(BaseModel):
    name: str = Field(alias="companyName")


class Excluded(BaseModel):
    name: str
    secret: str = Field(exclude=True)


class Serialized(BaseModel):
    employees: int

    @field_serializer("employees")
    def write(self, employees: int) -> str:
        return f"{employees} people"


class Computed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str

    @computed_field
    def size(self) -> int:
        return len(self.name)


class Before(BaseModel):
    name: str

    @model_validator(mode="before")
    @classmethod
    def unwrap(cls, payload: Any) -> Any:
        return payload["data"]


@dataclass
class Money:
    amount: Decimal


class Text(str):
    """A class that pydantic makes no schema of, although its values can be sent to a model."""


@dataclass
class Holder:
    name: str
    text: Text | None = None


def step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make it a tool that notes that it acts."""

    @functools.wraps(function)
    async def noted(*args: Any, **kwargs: Any) -> Any:
        child.note(f"effect tool {DBOS.workflow_id}:{DBOS.step_id}")
        return await function(*args, **kwargs)

    decorated: Callable[..., Any] = DBOS.step()(noted)
    return decorated


@step
async def look_up_alias(company_name: str) -> Aliased:
    return Aliased(companyName=company_name)


@step
async def look_up_excluded(company_name: str) -> Excluded:
    return Excluded(name=company_name, secret="x")


@step
async def look_up_serialized(company_name: str) -> Serialized:
    return Serialized(employees=len(company_name))


@step
async def look_up_computed(company_name: str) -> Computed:
    return Computed(name=company_name)


@step
async def look_up_before(company_name: str) -> Before | None:
    return Before.model_validate({"data": {"name": company_name}})


@step
async def look_up_untyped(company_name: str):  # type: ignore[no-untyped-def]
    return Aliased(companyName=company_name)


@step
async def look_up_text(company_name: str) -> Text:
    return Text(company_name)


@step
async def look_up_holder(company_name: str) -> Holder:
    return Holder(company_name)


@step
async def look_up_in_vain(company_name: str) -> Aliased:
    return {"name": company_name}  # type: ignore[return-value]


@step
async def look_up_money(company_name: str) -> dict[str, Money]:
    return {company_name: Money(Decimal(1))}


@step
async def look_up_in(region: str, company_name: str) -> Aliased:
    """Look up a company.

    Args:
        region: Where.
        company_name: Its name.
    """
    return Aliased(companyName=f"{region} {company_name}")


class Desk:
    """What a tool that is a method belongs to."""

    @step
    async def look_up(self, company_name: str) -> Aliased:
        """Look up a company."""
        return Aliased(companyName=company_name)


TOOLS: dict[str, Any] = {
    "alias": look_up_alias,
    "exclude": look_up_excluded,
    "serializer": look_up_serialized,
    "computed": look_up_computed,
    "before": look_up_before,
    "future": look_up_later,
    "no annotation": look_up_untyped,
    "plain class": look_up_text,
    "arbitrary type": look_up_holder,
    "wrong annotation": look_up_in_vain,
    "dataclass": look_up_money,
    "partial": functools.partial(look_up_in, "eu"),
    "method": Desk().look_up,
    "named tool": Tool(look_up_alias, name="another_name"),
    "named tool of a method": Tool(Desk().look_up, name="another_name"),
    "alias in the output type": look_up_alias,
}


async def script(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Call the tool, then report."""
    if len(messages) == 1:
        call = ai.ToolCallPart(info.function_tools[0].name, {"company_name": "Acme"})
        return ai.ModelResponse(parts=[call])
    if info.output_tools:
        report = ai.ToolCallPart(info.output_tools[0].name, {"companyName": "Acme"})
        return ai.ModelResponse(parts=[report])
    return ai.ModelResponse(parts=[ai.TextPart("a report")])


def main(
    arguments: list[str], environment: dict[str, str], output: str, patches: dict[str, Any]
) -> None:
    """Run the app's command line with that agent."""
    odd = environment["ODD"]
    output_type: Any = Aliased if odd == "alias in the output type" else str
    definition = replace(DEFINITION, tools=[TOOLS[odd]], output_type=output_type)
    object.__setattr__(DEFINITION, "tools", definition.tools)
    object.__setattr__(DEFINITION, "output_type", definition.output_type)
    demo.script.offline_script = script
    child.main(arguments, environment, output, patches)
