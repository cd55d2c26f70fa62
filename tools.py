"""The agent's two tools, each a DBOS step, every type that is stored, and all that is simulated.

A step's result is stored when its function returns. A resumed run takes the stored result and
does not enter the function again, so what a function's body prints was printed by real work.

Checkpoints are pickles. A class defined in agent.py would be pickled as `__main__.Report` when
that file is run as a script, and could not be loaded by any other program. So the types live here.
The same goes for exceptions: a step must raise only those that can be pickled and unpickled.
"""

import asyncio
import hashlib
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dbos import DBOS
from dbos import error as dbos_error
from pydantic import BaseModel, Field, ValidationError
from pydantic_ai import ModelRetry
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo

# ---------------------------------------------------------------- what is stored

Notice = Literal["Invented for this tutorial: not facts about a real company."]


class Invented(BaseModel):
    """Data from the simulated service. They are not facts, and each record says so."""

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
    """The service answered with something other than it promises."""


# ---------------------------------------------------------------- what steps print


@dataclass
class Progress:
    """What this process tells of the steps that it executes."""

    show: Literal["one run", "many runs", "nothing"] = "one run"
    attempts: dict[str, dict[int, int]] = field(default_factory=dict)
    """Run ID to step ID to attempts: how often this process has entered the step's body."""


progress = Progress()


def print_line(text: str) -> None:
    """Print at once. If the reader has gone (`| head`), go silent instead of failing the run."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_in_step(message: str) -> None:
    """Print progress from inside a step. A restored step prints nothing: that is the proof."""
    run_id, step, status = DBOS.workflow_id or "", DBOS.step_id or 0, DBOS.step_status
    if status is not None:
        attempt = (status.current_attempt or 0) + 1
        message += f" (attempt {attempt} of {status.max_attempts})" if attempt > 1 else ""
        counts = progress.attempts.setdefault(run_id, {})
        counts[step] = max(attempt, counts.get(step, 0))
        if len(progress.attempts) > 1000:  # the oldest run has ended long ago
            del progress.attempts[next(iter(progress.attempts))]
    if progress.show != "nothing":
        print_line(f"  {f'{run_id} ' * (progress.show == 'many runs')}step {step}: {message}")


def retry(
    transient: tuple[type[Exception], ...],
    permanent: tuple[type[Exception], ...] = (),
    *,
    attempts: int,
    first_wait: float,
    backoff: float,
) -> dict[str, Any]:
    """Return `@DBOS.step` options that retry transient errors, and print failures and waits.

    Without `should_retry`, DBOS retries every exception: a refused key, and even a `ModelRetry`,
    which then fails the run instead of reaching the model. Permanent errors are exceptions to the
    transient ones. Waits are in seconds, each `backoff` times the one before.
    """

    def should_retry(error: BaseException) -> bool:
        again = isinstance(error, transient) and not isinstance(error, permanent)
        attempt = progress.attempts.get(DBOS.workflow_id or "", {}).get(DBOS.step_id or 0, 1)
        told = f"failed with {type(error).__name__}: {error}"[:150]
        if again and attempt < attempts:
            told += f"; again in {first_wait * backoff ** (attempt - 1):.1f} s"
        print_in_step(told)
        return again

    waits = {"max_attempts": attempts, "interval_seconds": first_wait, "backoff_rate": backoff}
    return {"retries_allowed": True, "should_retry": should_retry, **waits}


# ---------------------------------------------------------------- the two tools


def step_key() -> str:
    """Return the idempotency key of this step: the same in every attempt and every rerun.

    A step that is killed after its side effect but before its checkpoint is stored runs again. A
    service that honours the key treats both requests as one.
    """
    return f"{DBOS.workflow_id}:{DBOS.step_id}"


@DBOS.step(timeout_seconds=30)
async def fetch_company_overview(company_name: str) -> CompanyOverview:
    """Look up what a company does, its age and its size.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    print_in_step("fetch_company_overview calls the service")
    try:
        payload = await service.overview(company_name, step_key())
    except LookupError as error:
        raise ModelRetry(f"{error}: check the name and call again") from None
    return CompanyOverview.model_validate(payload)


TRANSIENT = (
    ConnectionError,
    TimeoutError,
    dbos_error.DBOSStepTimeoutError,  # raised by `timeout_seconds`; it is not a TimeoutError
    RateLimitError,
    MalformedPayloadError,
)


# Nine waits, from 0.5 to 12.8 s, are 37 s in all. With DBOS's default backoff of 2 it is 256 s.
@DBOS.step(timeout_seconds=30, **retry(TRANSIENT, attempts=10, first_wait=0.5, backoff=1.5))
async def fetch_financial_metrics(company_name: str) -> FinancialMetrics:
    """Look up a company's revenue, growth and margin.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    print_in_step("fetch_financial_metrics calls the service")
    try:
        payload = await service.financials(company_name, step_key())
        return FinancialMetrics.model_validate(payload)
    except LookupError as error:  # it goes back to the model, which can mend it: no retry
        raise ModelRetry(f"{error}: check the name and call again") from None
    except ValidationError:  # its text quotes the payload, and the checkpoint would too
        raise MalformedPayloadError("incomplete payload") from None


INSTRUCTIONS = """\
You research companies. Call fetch_company_overview first and fetch_financial_metrics second.
Then write the report from what they returned, and from nothing else."""

TOOLS: list[Callable[[str], Awaitable[Any]]] = [fetch_company_overview, fetch_financial_metrics]


# ---------------------------------------------------------------- what is simulated


@dataclass
class SimulatedService:
    """A simulated company-data service. Replace it with your API client.

    Its fields are this process's settings, read when a step runs. In the agent's `deps` they would
    be stored with the run, and `crash` would kill every recovery as well.
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
        stored = await DBOS.list_workflow_steps_async(DBOS.workflow_id or "") if self.crash else []
        if any(step["function_name"] == "fetch_company_overview" for step in stored):
            await asyncio.sleep(self.latency / 2)
            print_in_step("crash on request: this process now kills itself with SIGKILL")
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
        # A real client sends the key to the service, often in an Idempotency-Key header.
        await asyncio.sleep(self.latency)
        if not any(character.isalnum() for character in company_name):
            raise LookupError(f"no company is known as {company_name!r}")
        # A company has the same figures in every process.
        return random.Random(hashlib.sha256(company_name.casefold().encode()).digest())


service = SimulatedService()


async def offline_script(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Stand in for a model: call each tool, then report what they returned."""
    await asyncio.sleep(service.latency)
    parts = [part for message in messages for part in message.parts]
    prompt = next(str(part.content) for part in parts if isinstance(part, ai.UserPromptPart))
    company = prompt[prompt.index('"') + 1 : prompt.rindex('"')]
    facts: dict[str, Any] = {
        part.tool_name: part.content
        for part in parts
        if isinstance(part, ai.ToolReturnPart) and part.outcome != "retried"
    }
    if missing := [tool.name for tool in info.function_tools if tool.name not in facts]:
        calls = [ai.ToolCallPart(name, {"company_name": company}) for name in missing]
        return ai.ModelResponse(parts=calls)
    overview: CompanyOverview = facts["fetch_company_overview"]
    metrics: FinancialMetrics = facts["fetch_financial_metrics"]
    report = ResearchReport(
        **metrics.model_dump(),
        industry=overview.industry,
        summary=f"{company} works in {overview.industry} with {overview.employees} people.",
        strengths=[f"in business since {overview.founded_year}"],
        risks=[f"a net margin of {metrics.net_margin_percent} % may not last"],
    )
    answer = ai.ToolCallPart(info.output_tools[0].name, report.model_dump())
    return ai.ModelResponse(parts=[answer])
