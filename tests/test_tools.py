"""The tools, as the plain functions that they are outside a workflow, and their service."""

from typing import Any

import pytest
from conftest import App
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


async def test_the_flaky_tool_fails_in_the_four_ways_of_real_services(
    quick_service: SimulatedService,
) -> None:
    quick_service.failure_rate = 1
    seen: set[type[BaseException]] = set()
    for _ in range(200):
        try:
            await fetch_financial_metrics("Acme")
        except (ConnectionError, TimeoutError, RateLimitError, MalformedPayloadError) as error:
            seen.add(type(error))
    assert seen == {ConnectionResetError, TimeoutError, RateLimitError, MalformedPayloadError}


async def test_it_fails_about_as_often_as_it_is_told_to(quick_service: SimulatedService) -> None:
    quick_service.failure_rate = 0.7
    failures = 0
    for _ in range(1000):
        try:
            await fetch_financial_metrics("Acme")
        except Exception:
            failures += 1
    assert 600 < failures < 800


async def test_each_call_passes_an_idempotency_key_and_no_payload_is_in_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: list[str] = []

    class Service(SimulatedService):
        async def financials(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
            keys.append(idempotency_key)
            return {"company_name": company_name, "secret": "of the payload"}

    monkeypatch.setattr(tools, "service", Service())
    with pytest.raises(MalformedPayloadError) as caught:
        await fetch_financial_metrics("Acme")
    assert "secret" not in str(caught.value)
    assert keys == ["None:None"]  # there is no workflow here


@pytest.mark.parametrize(
    ("error", "retried"),
    [(TimeoutError(), True), (ConnectionResetError(), True), (PermissionError(), False)],
)
def test_only_transient_failures_are_retried(error: Exception, retried: bool) -> None:
    passing, lasting = (OSError,), (PermissionError,)
    options = tools.retry(passing, lasting, attempts=2, first_wait=1, backoff=1)
    assert options["should_retry"](error) is retried
    assert not options["should_retry"](ModelRetry("mend it"))


def test_the_waits_between_attempts_add_up_to_less_than_forty_seconds(sqlite_app: App) -> None:
    sqlite_app.run("Acme")
    waits = {line.split()[1]: float(line.split()[2]) for line in sqlite_app.ledger("waits")}
    assert waits["fetch_company_overview"] == 0
    assert 30 < waits["fetch_financial_metrics"] < 40
    assert waits["research_agent__model.request"] == 7
