"""The agent's two tools, each a DBOS step, and every type that is stored in a checkpoint.

A step's result is stored when its function returns, and a run that is resumed gets it from there
without entering the function. So what the body prints is printed by work, never by a replay.

Checkpoints are pickles, and a class pickled as `__main__.Report` loads only where the same script
is `__main__` again. People run agent.py as a script, so the types live here.
"""

import asyncio
import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dbos import DBOS
from dbos import error as dbos_error
from pydantic import BaseModel, Field, ValidationError
from pydantic_ai import ModelRetry

Notice = Literal["Invented for this tutorial: not facts about a real company."]


class Invented(BaseModel):
    """Data from the simulated service. Nobody must take them for facts, so each says so."""

    company_name: str
    data_notice: Notice = "Invented for this tutorial: not facts about a real company."


class CompanyOverview(Invented):
    """What a company is."""

    industry: str
    founded_year: int = Field(description="calendar year")
    employees: int = Field(ge=0, description="number of people")


class FinancialMetrics(Invented):
    """A company's last fiscal year."""

    revenue_usd_millions: float = Field(ge=0, description="millions of US dollars in the year")
    revenue_growth_percent: float = Field(description="percent, against the year before")
    net_margin_percent: float = Field(le=100, description="percent of revenue")


class ResearchReport(FinancialMetrics):
    """The agent's answer. An answer that does not fit goes back to the model."""

    industry: str
    summary: str = Field(min_length=1, description="two or three sentences")
    strengths: list[str] = Field(min_length=1, max_length=5)
    risks: list[str] = Field(min_length=1, max_length=5)


class RateLimitError(Exception):
    """The service answered 429, too many requests."""


class MalformedPayloadError(Exception):
    """The service answered something other than what it promises."""


attempts: dict[str | None, dict[int | None, int]] = {}
"""By workflow ID and step ID: how often this process entered the step's body."""


def tell(text: str) -> None:
    """Print at once. If the reader is gone (`| head`), be silent instead of failing the run."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(message: str) -> None:
    """Print progress. Call it inside a step only: there its silence proves a restored step."""
    status = DBOS.step_status
    if status is not None:
        attempt = (status.current_attempt or 0) + 1
        counts = attempts.setdefault(DBOS.workflow_id, {})
        counts[DBOS.step_id] = max(attempt, counts.get(DBOS.step_id, 0))
        message += f" (attempt {attempt} of {status.max_attempts})" if attempt > 1 else ""
    tell(f"  step {DBOS.step_id}: {message}")


def retry_on(*transient: type[Exception]) -> Callable[[BaseException], bool]:
    """Make the `should_retry` of a step: tells of each failure, and retries only the transient.

    A step with `retries_allowed=True` and no `should_retry` retries every exception: a refused
    key, and a `ModelRetry`, which then fails the run instead of reaching the model.
    """

    def should_retry(error: BaseException) -> bool:
        say(f"failed with {type(error).__name__}: {error}"[:150])
        return isinstance(error, transient)

    return should_retry


@dataclass
class SimulatedService:
    """A company-data service that is not there: your API client goes in its place.

    Its fields are settings of this process, read when a step runs. As `deps` of the agent they
    would be stored with the run, and `crash` would kill every recovery too.
    """

    failure_rate: float = 0.0
    latency: float = 0.0
    crash: bool = False

    async def overview(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
        """Answer with the fields of a `CompanyOverview`; `LookupError` for an unknown company."""
        figures = await self._look_up(company_name, idempotency_key)
        return {
            "company_name": company_name,
            "industry": figures.choice(["quantum hardware", "logistics", "biotech", "robotics"]),
            "founded_year": figures.randint(1950, 2020),
            "employees": figures.randint(50, 20_000),
        }

    async def financials(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
        """Answer with the fields of `FinancialMetrics`, or fail as real services do."""
        if self.crash:
            await asyncio.sleep(self.latency / 2)
            say("crash on request: this process now kills itself with SIGKILL")
            os.kill(os.getpid(), signal.SIGKILL)
        figures = await self._look_up(company_name, idempotency_key)
        payload = {
            "company_name": company_name,
            "revenue_usd_millions": round(figures.uniform(5, 5_000), 1),
            "revenue_growth_percent": round(figures.uniform(-20, 60), 1),
            "net_margin_percent": round(figures.uniform(-30, 35), 1),
        }
        if random.random() >= self.failure_rate:
            return payload
        outage = random.choice([ConnectionResetError, RateLimitError, TimeoutError, None])
        if outage is not None:
            raise outage("simulated outage")
        return {**payload, "revenue_usd_millions": "n/a"}

    async def _look_up(self, company_name: str, _idempotency_key: str) -> random.Random:
        # A real client sends the key along, often as the header Idempotency-Key.
        await asyncio.sleep(self.latency)
        if not any(character.isalnum() for character in company_name):
            raise LookupError(f"no company is known as {company_name!r}")
        # A company has the same figures in every process.
        return random.Random(hashlib.sha256(company_name.casefold().encode()).digest())


service = SimulatedService()


def step_key() -> str:
    """Return the idempotency key of this step of this run: the same in each attempt and rerun.

    A step that was killed after its effect and before its checkpoint runs once more. That is the
    one repetition there is, and a service that honours the key counts both as one.
    """
    return f"{DBOS.workflow_id}:{DBOS.step_id}"


@DBOS.step(timeout_seconds=30)
async def fetch_company_overview(company_name: str) -> CompanyOverview:
    """Look up what a company does, its age and its size.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    say("fetch_company_overview calls the service")
    try:
        payload = await service.overview(company_name, step_key())
    except LookupError as error:
        raise ModelRetry(f"{error}: check the name and call again") from None
    return CompanyOverview.model_validate(payload)


# Nine waits of 0.5, 0.75, … 12.8 s are 37 s at the most. With the default rate they would be 256 s.
@DBOS.step(
    timeout_seconds=30,
    retries_allowed=True,
    max_attempts=10,
    interval_seconds=0.5,
    backoff_rate=1.5,
    should_retry=retry_on(
        ConnectionError,
        TimeoutError,
        dbos_error.DBOSStepTimeoutError,  # of `timeout_seconds`; it is no TimeoutError
        RateLimitError,
        MalformedPayloadError,
    ),
)
async def fetch_financial_metrics(company_name: str) -> FinancialMetrics:
    """Look up a company's revenue, growth and margin.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    say("fetch_financial_metrics calls the service")
    try:
        payload = await service.financials(company_name, step_key())
        return FinancialMetrics.model_validate(payload)
    except LookupError as error:  # the model can mend this one: it goes back to it, not retried
        raise ModelRetry(f"{error}: check the name and call again") from None
    except ValidationError:  # quotes the payload, which the checkpoint would then hold
        raise MalformedPayloadError("the payload lacks what was promised") from None
