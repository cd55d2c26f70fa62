"""A script that stands in for a model, so that everything runs without a key."""

import asyncio
from typing import Any

from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo

from demo.service import service
from durable.errors import DurableError


async def offline_script(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Call each tool, then report what the tools have returned; it knows only its own question."""
    await asyncio.sleep(service.latency)
    parts = [part for message in messages for part in message.parts]
    prompt = next(str(part.content) for part in parts if isinstance(part, ai.UserPromptPart))
    company = prompt.partition('"')[2].rpartition('"')[0]
    results = {
        part.tool_name: part.model_response_object()
        for part in parts
        if isinstance(part, ai.ToolReturnPart) and part.outcome != "retried"
    }
    missing = [tool.name for tool in info.function_tools if tool.name not in results]
    if company and missing:
        calls = [ai.ToolCallPart(name, {"company_name": company}) for name in missing]
        return ai.ModelResponse(parts=calls)
    facts: dict[str, Any] = {}
    for result in results.values():
        facts |= result
    known = {"company_name", "industry", "employees", "founded_year", "net_margin_percent"}
    if not (company and info.output_tools and known <= facts.keys()):
        raise DurableError(
            "the offline script knows only its own question: see AgentDefinition.offline_script"
        )
    employees, founded = facts.pop("employees"), facts.pop("founded_year")
    report = {
        **facts,
        "summary": f"{company} works in {facts['industry']} with {employees} people.",
        "strengths": [f"in business since {founded}"],
        "risks": [f"a net margin of {facts['net_margin_percent']} % may not last"],
    }
    return ai.ModelResponse(parts=[ai.ToolCallPart(info.output_tools[0].name, report)])
