"""The tools, as the plain functions that they are outside a workflow, and their service."""

from types import SimpleNamespace
from typing import Any

import pytest
from conftest import App
from dbos._context import StepStatus
from provider import REPORT
from pydantic_ai import ModelRetry

import tools
from tools import (
    MalformedPayloadError,
    RateLimitError,
    SimulatedService,
    fetch_company_overview,
    fetch_financial_metrics,
)


@pytest.fixture(autouse=True)
def quick_service(monkeypatch: pytest.MonkeyPatch) -> SimulatedService:
    """A service without latency and without failures."""
    service = SimulatedService()
    monkeypatch.setattr(tools, "service", service)
    return service


async def test_both_tools_return_typed_data_that_say_they_are_invented() -> None:
    for result in (await fetch_company_overview("Acme"), await fetch_financial_metrics("Acme")):
        assert result.company_name == "Acme"
        assert result.data_notice.startswith("Invented")


async def test_a_company_has_the_same_figures_every_time_and_another_has_others() -> None:
    acme = await fetch_financial_metrics("Acme")
    assert await fetch_financial_metrics("Acme") == acme
    other = await fetch_financial_metrics("Globex")
    assert other.revenue_usd_millions != acme.revenue_usd_millions


@pytest.mark.parametrize("name", ["", " ", "???"])
async def test_an_unknown_company_goes_back_to_the_model(name: str) -> None:
    with pytest.raises(ModelRetry, match="check the name"):
        await fetch_company_overview(name)
    with pytest.raises(ModelRetry, match="check the name"):
        await fetch_financial_metrics(name)


async def test_outages_follow_from_the_company_in_the_four_ways_of_real_services(
    quick_service: SimulatedService,
) -> None:
    quick_service.failure_rate = 0.7

    async def outage(company: str) -> str:
        try:
            await fetch_financial_metrics(company)
        except Exception as error:
            return type(error).__name__
        return ""

    companies = [f"Company {number}" for number in range(1000)]
    seen = [await outage(company) for company in companies]
    assert seen == [await outage(company.upper()) for company in companies]
    assert 660 < sum(map(bool, seen)) < 740
    assert set(seen) == {
        "",
        "ConnectionResetError",
        "TimeoutError",
        "RateLimitError",
        "MalformedPayloadError",
    }


@pytest.mark.parametrize(("rate", "fails"), [(0.99, False), (1.0, True)])
async def test_the_last_attempt_succeeds_unless_all_are_to_fail(
    quick_service: SimulatedService, monkeypatch: pytest.MonkeyPatch, rate: float, fails: bool
) -> None:
    quick_service.failure_rate = rate
    status = StepStatus(3, current_attempt=9, max_attempts=10)
    monkeypatch.setattr(tools, "DBOS", SimpleNamespace(step_status=status))
    for number in range(100):
        try:
            payload = await quick_service.financials(f"Company {number}", "key")
            failed = payload["revenue_usd_millions"] == "n/a"
        except Exception:
            failed = True
        assert failed is fails


async def test_each_call_passes_an_idempotency_key_and_no_payload_is_in_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: list[str] = []

    class Service(SimulatedService):
        async def financials(self, company_name: str, key: str) -> dict[str, Any]:
            keys.append(key)
            return {"company_name": company_name, "secret": "of the payload"}

    monkeypatch.setattr(tools, "service", Service())
    with pytest.raises(MalformedPayloadError) as caught:
        await fetch_financial_metrics("Acme")
    assert "secret" not in str(caught.value)
    [key] = keys
    assert key.startswith("None:fetch_financial_metrics:")  # there is no workflow here


def test_a_key_names_the_run_the_tool_and_its_arguments_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key(run_id: str, step_id: int, tool: str, **arguments: object) -> str:
        context = SimpleNamespace(workflow_id=run_id, step_id=step_id)
        monkeypatch.setattr(tools, "DBOS", context)
        return tools.idempotency_key(tool, **arguments)

    first = key("run", 3, "send_mail", to="a", text="x")
    assert key("run", 5, "send_mail", text="x", to="a") == first, "whatever its number"
    others = [
        key("fork", 3, "send_mail", to="a", text="x"),
        key("run", 3, "send_letter", to="a", text="x"),
        key("run", 3, "send_mail", to="b", text="x"),
        key("run", 3, "send_mail", to="ax", text=""),
    ]
    assert len({first, *others}) == 5


def test_a_payload_that_could_not_be_sent_to_the_model_is_refused() -> None:
    payload = {"company_name": "a\ud83d", "industry": "x", "founded_year": 1, "employees": 1}
    with pytest.raises(MalformedPayloadError) as caught:
        tools.parse(tools.CompanyOverview, payload)
    assert str(caught.value) == "the payload is not a CompanyOverview"


async def test_a_bug_in_a_tool_is_neither_retried_nor_told_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Buggy(SimulatedService):
        async def financials(self, company_name: str, key: str) -> dict[str, Any]:
            payload = await super().financials(company_name, key)
            return {"revenue": payload["revenue"]}

    monkeypatch.setattr(tools, "service", Buggy())
    with pytest.raises(KeyError):
        await fetch_financial_metrics("Acme")
    assert not issubclass(KeyError, tools.TRANSIENT)


@pytest.mark.parametrize(
    ("error", "retried"),
    [(TimeoutError(), True), (ConnectionResetError(), True), (PermissionError(), False)],
)
async def test_only_transient_failures_are_retried(error: Exception, retried: bool) -> None:
    passing, lasting = (OSError,), (PermissionError,)
    options = tools.retry(passing, lasting, attempts=2, first_wait=1, backoff=1)
    assert await options["should_retry"](error) is retried
    assert not await options["should_retry"](ModelRetry("mend it"))


@pytest.mark.parametrize(
    ("wish", "slept", "told"), [(None, 0, 2.0), (1, 0, 2.0), (20, 18, 20.0), (600, 58, 60.0)]
)
async def test_the_longer_of_two_waits_counts_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wish: float | None,
    slept: float,
    told: float,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(tools, "asyncio", SimpleNamespace(sleep=sleep))
    error = RateLimitError("later")
    vars(error)["retry_after"] = wish
    options = tools.retry((RateLimitError,), attempts=3, first_wait=2, backoff=2)
    assert await options["should_retry"](error)
    assert waits == [slept]
    assert f"later; again in {told} s" in capsys.readouterr().out


def test_the_waits_between_attempts_add_up_to_less_than_forty_seconds(sqlite_app: App) -> None:
    sqlite_app.run("Acme")
    waits = {line.split()[1]: float(line.split()[2]) for line in sqlite_app.ledger("waits")}
    assert waits["fetch_company_overview"] == 0
    assert 30 < waits["fetch_financial_metrics"] < 40
    assert waits["research_agent__model.request"] == 7


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("left \u202eright", "left \\u202eright"),
        ("two\nlines", "two\nlines"),
        ("می\u200cرود Größe 😀", "می\u200cرود Größe 😀"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, told: str) -> None:
    assert tools.shown(text) == told


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_json_does_not_have_fits_no_stored_type(number: float) -> None:
    report = {**REPORT, "revenue_usd_millions": number}
    for model in (tools.FinancialMetrics, tools.ResearchReport):
        assert tools.parse(model, REPORT)
        with pytest.raises(MalformedPayloadError):
            tools.parse(model, report)
