"""The durable agent in this process, with a scripted model, as a service would use it.

And what a process that has nothing to execute leaves undone.
"""

import asyncio
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import App, Process
from dbos import DBOS, StepInfo, WorkflowStatus
from provider import Provider
from pydantic_ai import ModelRetry, UnexpectedModelBehavior
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo, FunctionModel
from sqlalchemy import URL
from sqlalchemy.exc import OperationalError

import agent
import config
import tools
from agent import Executor, Outcome, find_failure, research
from config import Settings, derive_run_id
from tools import ResearchReport, SimulatedService

Script = Callable[[list[ai.ModelMessage], AgentInfo], Awaitable[ai.ModelResponse]]


class Scripted:
    """The scripts of the tests, by company: one durable agent serves the whole process."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.requests = Counter[str]()

    async def play(self, messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
        prompt = str(messages[0].parts[0].content)  # type: ignore[union-attr]
        company = prompt.split('"')[1]
        self.requests[company] += 1
        return await self.scripts.get(company, tools.offline_script)(messages, info)


@pytest.fixture(scope="session")
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture(scope="session")
def durable(tmp_path_factory: pytest.TempPathFactory, scripted: Scripted) -> Iterator[Executor]:
    """An executor, whose agent is the only one: DBOS allows one of a name in a process."""
    path = tmp_path_factory.mktemp("agent") / "research.sqlite"
    url = URL.create("sqlite", database=str(path), query={"timeout": "30"})
    settings = Settings("scripted", url, "t", "u", failure_rate=0, latency=0, cost_limit=1)
    with pytest.MonkeyPatch.context() as patch:
        model = FunctionModel(scripted.play, model_name="scripted")
        patch.setattr(config, "build_model", lambda _name: model)
        executor = Executor(settings, settings.queue)
        executor.launch()
        yield executor
    DBOS.destroy()


@pytest.fixture(autouse=True)
def service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that always works, for agents that print nothing."""
    monkeypatch.setattr(tools, "service", SimulatedService())
    monkeypatch.setattr(tools.progress, "show", "nothing")


def run_id_of(durable: Executor, company: str) -> str:
    return derive_run_id(durable.settings.request(company))


def research_one(
    durable: Executor, company: str, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Research one company, as a service does for each of its requests."""
    request = durable.settings.request(company)
    [outcome] = research(durable, {derive_run_id(request): request}, tell).values()
    return outcome


def report_on(durable: Executor, company: str) -> ResearchReport:
    """Research one company, and return the report."""
    outcome = research_one(durable, company)
    assert isinstance(outcome, WorkflowStatus)
    assert outcome.status == "SUCCESS"
    [run] = durable.look([outcome.workflow_id], load_output=True).values()
    report = getattr(run.output, "output", None)
    assert isinstance(report, ResearchReport)
    return report


def failure_on(durable: Executor, company: str) -> str:
    """Research one company, and return how that failed."""
    outcome = research_one(durable, company)
    assert isinstance(outcome, WorkflowStatus)
    assert outcome.status == "ERROR"
    return agent.describe_state(durable, outcome)


def test_a_service_calls_research_as_often_as_it_likes_and_from_several_threads_at_once(
    durable: Executor, scripted: Scripted
) -> None:
    companies = [f"Company {number}" for number in range(5)]
    with ThreadPoolExecutor(len(companies)) as threads:
        reports = list(threads.map(lambda company: report_on(durable, company), companies))
    assert [report.company_name for report in reports] == companies
    for company in companies:
        run_id = run_id_of(durable, company)
        assert tools.progress.attempts[run_id] == {1: 1, 2: 1, 3: 1, 4: 1}
    assert report_on(durable, companies[0]) == reports[0]
    assert scripted.requests[companies[0]] == 2, "the second call got what is stored"


def test_several_calls_for_one_request_in_one_process_execute_it_once(
    durable: Executor, scripted: Scripted
) -> None:
    with ThreadPoolExecutor(3) as threads:
        reports = list(threads.map(lambda _: report_on(durable, "Once"), range(3)))
    assert reports[0] == reports[1] == reports[2]
    assert scripted.requests["Once"] == 2


def test_a_caller_that_gives_up_does_not_stop_the_run(
    durable: Executor, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(SimulatedService):
        async def overview(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
            entered.set()
            await asyncio.to_thread(go_on.wait)
            return await super().overview(company_name, idempotency_key)

    def give_up(_: str) -> None:
        if entered.is_set():
            raise TimeoutError("this takes too long")

    monkeypatch.setattr(tools, "service", Slow())
    with pytest.raises(TimeoutError):
        research_one(durable, "Given up", give_up)
    go_on.set()
    assert report_on(durable, "Given up").company_name == "Given up"
    assert scripted.requests["Given up"] == 2


def test_a_tool_call_that_the_model_can_mend_goes_back_to_it_without_a_retry(
    durable: Executor, scripted: Scripted
) -> None:
    async def misspell_first(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
        if len(messages) == 1:
            call = ai.ToolCallPart("fetch_financial_metrics", {"company_name": "???"})
            return ai.ModelResponse(parts=[call])
        return await tools.offline_script(messages, info)

    scripted.scripts["Misspelt"] = misspell_first
    assert report_on(durable, "Misspelt").company_name == "Misspelt"
    run_id = run_id_of(durable, "Misspelt")
    assert tools.progress.attempts[run_id][2] == 1
    assert isinstance(durable.client.list_workflow_steps(run_id)[1]["error"], ModelRetry)


def test_a_permanent_failure_is_not_retried_and_the_next_call_goes_on_from_it(
    durable: Executor, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Closed(SimulatedService):
        async def financials(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
            calls.append(f"{company_name} {idempotency_key}")
            raise PermissionError("the subscription has ended")

    monkeypatch.setattr(tools, "service", Closed())
    told = failure_on(durable, "Closed")
    assert told == "failed: PermissionError: the subscription has ended"
    run_id = run_id_of(durable, "Closed")
    assert calls == [f"Closed {run_id}:3"]
    monkeypatch.setattr(tools, "service", SimulatedService())
    monkeypatch.setattr(tools.progress, "attempts", {})
    report_on(durable, "Closed")
    assert tools.progress.attempts[run_id] == {3: 1, 4: 1}
    assert scripted.requests["Closed"] == 2


def test_a_tool_call_that_the_model_never_mends_fails_and_then_asks_the_model_anew(
    durable: Executor, scripted: Scripted
) -> None:
    assert "fetch_company_overview" in failure_on(durable, "???")
    assert scripted.requests["???"] == 3, "two answers went back to the model"

    async def give_up_on_tools(_: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
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
        answer = ai.ToolCallPart(info.output_tools[0].name, report.model_dump())
        return ai.ModelResponse(parts=[answer])

    scripted.scripts["???"] = give_up_on_tools
    assert report_on(durable, "???").company_name == "unknown"
    assert scripted.requests["???"] == 4


def test_a_process_that_executes_looks_again_when_the_database_is_away_for_a_moment(
    durable: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failures = agent.decide, [OperationalError("SELECT 1", {}, Exception("too many clients"))]

    def decide(*arguments: Any) -> agent.Found:
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(agent, "decide", decide)
    assert report_on(durable, "Away").company_name == "Away"
    assert failures == []


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


def test_the_failed_step_is_the_first_with_an_error_that_the_model_did_not_get(
    durable: Executor,
) -> None:
    stored = research_one(durable, "Status")
    assert isinstance(stored, WorkflowStatus)
    [first, *_] = durable.client.list_workflow_steps(stored.workflow_id)
    model, outage = "research_agent__model.request", TimeoutError()
    assert first["function_name"] == model
    mended = [step(1, model), step(2, "overview", ModelRetry("")), step(3, model)]
    assert find_failure(stored, mended) is None
    assert find_failure(stored, [*mended, step(4, "financials", outage)]) == (4, outage)
    stored.status, stored.error = "ERROR", outage
    assert find_failure(stored, mended) == (4, outage), "nothing that finished is dropped"
    assert find_failure(stored, []) == (1, outage)
    stored.error = gave_up = UnexpectedModelBehavior("nonsense")
    assert find_failure(stored, mended) == (3, gave_up), "the model is asked again"
    assert find_failure(stored, []) == (1, gave_up)


# ---------------------------------------------------------------- nothing to execute


def without_key(provider: Provider) -> dict[str, str]:
    """Return an environment in which the provider's model cannot be built."""
    return {"MODEL": provider.environment["MODEL"]}


def noted_by(app: App, process: Process) -> list[str]:
    """Return what one process has noted: launches, all kinds of writes, and effects of steps."""
    lines = (app.folder / "ledger").read_text().splitlines()
    return [line for line in lines if line.startswith(f"{process.pid} ")]


def stored(app: App) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row that the launch of an executor, a decision or a step would change."""
    tables = ["workflow_status", "workflow_input", "workflow_output", "operation_outputs"]
    tables += ["queues", "application_versions"]
    return {table: app.rows(f"SELECT * FROM {{dbos}}{table}") for table in tables}


def test_a_replay_launches_no_executor_builds_no_model_and_writes_nothing(
    app: App, provider: Provider
) -> None:
    first = app.run("Acme", **provider.environment)
    assert first.wait() == 0, first.stderr
    assert noted_by(app, first) != []
    before = stored(app)
    replay = app.run("Acme", **without_key(provider))
    assert replay.wait() == 0, replay.stderr
    assert "finished earlier" in replay.stdout
    assert "anvils" in replay.stdout
    assert noted_by(app, replay) == []
    assert stored(app) == before
    assert len(provider.requests) == 2


@pytest.mark.parametrize(
    ("arguments", "version", "told"),
    [
        (["Globex"], config.APP_VERSION, "is stored for another request: Acme"),
        (["Acme"], "new", f"belongs to version {config.APP_VERSION} of this app"),
        (["Acme"], config.APP_VERSION, "cannot be used: "),  # the model
    ],
)
def test_a_refusal_launches_no_executor_builds_no_model_and_writes_nothing(
    app: App, provider: Provider, arguments: list[str], version: str, told: str
) -> None:
    killed = app.run("Acme", "--run-id", "mine", KILL_AT="before commit 3", **provider.environment)
    assert killed.wait() == -signal.SIGKILL
    before = stored(app)
    refused = app.start(
        *arguments, "--run-id", "mine", patches={"version": version}, **without_key(provider)
    )
    assert refused.wait() == 2
    assert told in refused.stderr
    assert noted_by(app, refused) == []
    assert stored(app) == before
    assert len(provider.requests) == 1


def test_a_wait_launches_no_executor_builds_no_model_and_writes_nothing(
    app: App, provider: Provider
) -> None:
    live = app.start("Acme", WAIT_AT="after effect 3", **provider.environment)
    app.until("waiting after effect 3")
    before = stored(app)
    waiting = app.start("Acme", **without_key(provider)).until_prints("executes nothing")
    assert stored(app) == before
    app.open_gate()
    assert live.wait() == 0
    after = stored(app)
    assert waiting.wait() == 0, waiting.stderr
    assert "anvils" in waiting.stdout
    assert noted_by(app, waiting) == []
    assert stored(app) == after
    assert len(provider.requests) == 2
