"""The durable agent in this process, with a scripted model: as a service would use it."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from dbos import DBOS, StepInfo
from pydantic_ai import ModelRetry, UnexpectedModelBehavior
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from sqlalchemy import URL

import agent
import tools
from agent import Executor, RunFailed, find_failure, research
from config import ResearchError, Settings, derive_run_id
from tools import ResearchReport, SimulatedService

Script = Callable[[list[ai.ModelMessage], AgentInfo], AsyncIterator[DeltaToolCalls]]


class Scripted:
    """The scripts of the tests, by company: one durable agent serves the whole process."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.requests: list[str] = []

    async def play(
        self, messages: list[ai.ModelMessage], info: AgentInfo
    ) -> AsyncIterator[DeltaToolCalls]:
        prompt = str(messages[0].parts[0].content)  # type: ignore[union-attr]
        company = prompt.split('"')[1]
        self.requests.append(company)
        async for delta in self.scripts.get(company, agent.offline_script)(messages, info):
            yield delta


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    path = tmp_path_factory.mktemp("agent") / "research.sqlite"
    return Settings("scripted", URL.create("sqlite", database=str(path)), "t", "u", 0, 0)


@pytest.fixture(scope="session")
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture(scope="session")
def durable(settings: Settings, scripted: Scripted) -> Iterator[Executor]:
    """The launched agent. DBOS allows one of a name in a process."""
    with pytest.MonkeyPatch.context() as patch:
        model = FunctionModel(stream_function=scripted.play, model_name="scripted")
        patch.setattr(agent, "build_model", lambda _name: model)
        yield agent.launch(settings)
    DBOS.destroy()


@pytest.fixture(autouse=True)
def no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "service", SimulatedService())


async def test_a_service_awaits_research_as_often_as_it_likes(
    durable: Executor, settings: Settings
) -> None:
    requests = [settings.request(f"Company {number}") for number in range(5)]
    runs = await asyncio.gather(*(research(durable, request) for request in requests))
    assert [run.report.company_name for run in runs] == [request.company for request in requests]
    assert all(run.attempts == {1: 1, 2: 1, 3: 1, 4: 1} for run in runs)
    again = await research(durable, requests[0])
    assert again.report == runs[0].report
    assert again.attempts == {}
    assert tools.attempts == {}


async def test_two_calls_for_one_request_in_one_process_execute_it_once(
    durable: Executor, settings: Settings, scripted: Scripted
) -> None:
    request = settings.request("Once")
    runs = await asyncio.gather(*(research(durable, request) for _ in range(3)))
    assert runs[0].report == runs[1].report == runs[2].report
    assert scripted.requests.count("Once") == 2


async def test_a_caller_that_is_cancelled_does_not_stop_the_run(
    durable: Executor, settings: Settings, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()

    class Slow(SimulatedService):
        async def overview(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
            entered.set()
            await go_on.wait()
            return await super().overview(company_name, idempotency_key)

    monkeypatch.setattr(tools, "service", Slow())
    request = settings.request("Cancelled")
    caller = asyncio.create_task(research(durable, request))
    await entered.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    run = await research(durable, request)
    assert run.report.company_name == "Cancelled"
    assert scripted.requests.count("Cancelled") == 2


async def test_a_tool_call_that_the_model_can_mend_goes_back_to_it_without_a_retry(
    durable: Executor, settings: Settings, scripted: Scripted
) -> None:
    async def misspell_first(
        messages: list[ai.ModelMessage], info: AgentInfo
    ) -> AsyncIterator[DeltaToolCalls]:
        if len(messages) == 1:
            arguments = json.dumps({"company_name": "???"})
            yield {0: DeltaToolCall("fetch_company_overview", arguments)}
        else:
            async for delta in agent.offline_script(messages, info):
                yield delta

    scripted.scripts["Misspelt"] = misspell_first
    run = await research(durable, settings.request("Misspelt"))
    assert run.report.company_name == "Misspelt"
    assert run.attempts[2] == 1
    steps = await DBOS.list_workflow_steps_async(run.run_id)
    assert isinstance(steps[1]["error"], ModelRetry)


async def test_a_permanent_failure_is_not_retried_and_the_next_call_goes_on_from_it(
    durable: Executor, settings: Settings, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Closed(SimulatedService):
        async def financials(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
            calls.append(f"{company_name} {idempotency_key}")
            raise PermissionError("the subscription has ended")

    monkeypatch.setattr(tools, "service", Closed())
    request = settings.request("Closed")
    with pytest.raises(RunFailed, match="PermissionError: the subscription has ended"):
        await research(durable, request)
    assert calls == [f"Closed {derive_run_id(request)}:3"]
    monkeypatch.setattr(tools, "service", SimulatedService())
    run = await research(durable, request)
    assert set(run.attempts) == {3, 4}
    assert scripted.requests.count("Closed") == 2


async def test_a_tool_call_that_the_model_never_mends_fails_and_then_asks_the_model_anew(
    durable: Executor, settings: Settings, scripted: Scripted
) -> None:
    request = settings.request("???")
    with pytest.raises(RunFailed, match="fetch_company_overview"):
        await research(durable, request)
    asked = scripted.requests.count("???")
    assert asked <= 4

    async def give_up_on_tools(
        _messages: list[ai.ModelMessage], info: AgentInfo
    ) -> AsyncIterator[DeltaToolCalls]:
        report = ResearchReport(
            company_name="unknown",
            revenue_usd_millions=0,
            revenue_growth_percent=0,
            net_margin_percent=0,
            industry="unknown",
            summary="No such company.",
            strengths=["none"],
            risks=["none"],
        )
        yield {0: DeltaToolCall(info.output_tools[0].name, report.model_dump_json())}

    scripted.scripts["???"] = give_up_on_tools
    run = await research(durable, request)
    assert run.report.company_name == "unknown"
    assert scripted.requests.count("???") == asked + 1


def step(number: int, name: str, error: Exception | None = None) -> StepInfo:
    return StepInfo(
        function_id=number,
        function_name=name,
        output=None,
        error=error,
        child_workflow_id=None,
        child_shard_key=None,
        started_at_epoch_ms=0,
        completed_at_epoch_ms=0,
    )


async def test_the_failed_step_is_the_first_with_an_error_that_the_model_did_not_get(
    durable: Executor, settings: Settings
) -> None:
    await research(durable, settings.request("Status"))
    stored = await DBOS.get_workflow_status_async(derive_run_id(settings.request("Status")))
    assert stored is not None
    model, outage = "research_agent__model.request_stream", TimeoutError()
    mended = [step(1, model), step(2, "overview", ModelRetry("")), step(3, model)]
    assert find_failure(stored, mended) is None
    assert find_failure(stored, [*mended, step(4, "financials", outage)]) == (4, outage)
    stored.status, stored.error = "ERROR", outage
    assert find_failure(stored, mended) == (4, outage), "nothing that finished is dropped"
    assert find_failure(stored, []) == (1, outage)
    stored.error = gave_up = UnexpectedModelBehavior("nonsense")
    assert find_failure(stored, mended) == (3, gave_up), "the model is asked again"
    assert find_failure(stored, []) == (1, gave_up)


def test_a_token_without_logfire_is_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "logfire", None)
    with pytest.raises(ResearchError, match="uv sync --extra logfire"):
        agent.trace_to_logfire()
