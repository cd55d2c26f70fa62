"""The agent's two tools, each a DBOS step, every type that is stored, and all that is simulated.

A step's result is stored when its function returns. A resumed run takes the stored result and
does not enter the function again, so what a function's body prints was printed by real work.

Checkpoints are pickles. A class defined in agent.py would be pickled as `__main__.Report` when
that file is run as a script, and could not be loaded by any other program. So the types live here.
The same goes for exceptions: a step must raise only those that can be pickled and unpickled.
"""

import asyncio
import contextvars
import hashlib
import inspect
import json
import os
import random
import signal
import sys
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dbos import DBOS, StepInfo
from dbos import error as dbos_error
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_ai import ModelRetry, Tool
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo


class ResearchError(Exception):
    """A problem that a person can fix. The text says what is wrong and what to do."""

    exit_code = 2


# ---------------------------------------------------------------- what is stored

Notice = Literal["Invented for this tutorial: not facts about a real company."]


class Invented(BaseModel, allow_inf_nan=False):  # JSON has no infinity
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


class UnknownCompanyError(Exception):
    """The service knows no company of this name."""


# ---------------------------------------------------------------- for any tool of yours


def idempotency_key(tool: str, **arguments: object) -> str:
    """Return a key that names this call: the same in every attempt and every rerun of the run.

    A step that is killed after its side effect, but before its checkpoint is stored, runs again. A
    service that honours the key treats both requests as one. The key names the call, not the step's
    number: after a failure the model may call something else at that number, and the service would
    answer with the result of the other call.

    Give it to calls that *act*, such as sending an e-mail. A question that is asked again and again
    ("is the job done?") carries none, or the first answer would stay the answer. Two identical
    calls of one run share a key, so they act once: if both are wanted, let an argument tell them
    apart. A fork is another run, with other keys: it acts again.

    Returns:
        Run ID, tool, and 16 hexadecimal digits of SHA-256 over the arguments.
    """
    text = json.dumps(arguments, sort_keys=True, default=str)
    return f"{DBOS.workflow_id}:{tool}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], payload: object) -> Model:
    """Return a service's payload as an object of that type.

    Raises:
        MalformedPayloadError: It is not of that type, or it could not be sent to the model: stored,
            it would make every later request of the run fail.
    """
    try:
        parsed = model.model_validate(payload)
        parsed.model_dump_json()
    except ValueError:  # its text quotes the payload, and the checkpoint would too
        raise MalformedPayloadError(f"the payload is not a {model.__name__}") from None
    return parsed


# Attempts of the step in flight that have failed: DBOS does not tell `should_retry` their number.
_failed: contextvars.ContextVar[tuple[str | None, int | None, int]] = contextvars.ContextVar(
    "failed", default=(None, None, 0)
)


def retry(
    transient: tuple[type[Exception], ...],
    permanent: tuple[type[Exception], ...] = (),
    *,
    attempts: int,
    first_wait: float,
    backoff: float,
    longest_wait: float = 60,
) -> dict[str, Any]:
    """Return options for an async `@DBOS.step` that retries transient errors, and prints waits.

    Without `should_retry`, DBOS retries every exception: a refused key, a bug, and even a
    `ModelRetry`, which then fails the run instead of reaching the model.

    Args:
        transient: What is retried.
        permanent: Exceptions to that, which are not retried.
        attempts: How often the step is tried in all.
        first_wait: Seconds before the second attempt.
        backoff: Each wait is so many times the one before.
        longest_wait: Seconds at most that a service's own wish (`Retry-After`) is followed.
    """

    async def should_retry(error: BaseException) -> bool:
        run_id, step, count = _failed.get()
        failed = count + 1 if (run_id, step) == (DBOS.workflow_id, DBOS.step_id) else 1
        _failed.set((DBOS.workflow_id, DBOS.step_id, failed))
        again = isinstance(error, transient) and not isinstance(error, permanent)
        told = f"failed with {type(error).__name__}: {error}"[:150]
        if again and failed < attempts:
            wait = first_wait * backoff ** (failed - 1)
            wish = min(getattr(error, "retry_after", None) or 0, longest_wait)
            print_in_step(f"{told}; again in {max(wait, wish):.1f} s")
            await asyncio.sleep(max(wish - wait, 0))  # then DBOS waits
        else:
            print_in_step(told)
        return again

    waits = {"max_attempts": attempts, "interval_seconds": first_wait, "backoff_rate": backoff}
    return {"retries_allowed": True, "should_retry": should_retry, **waits}


# ---------------------------------------------------------------- the two tools


# Preemptible: when the run is cancelled, a step in flight is stopped, too.
@DBOS.step(timeout_seconds=30, preemptible=True)
async def fetch_company_overview(company_name: str) -> CompanyOverview:
    """Look up what a company does, its age and its size.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    print_in_step(f"fetch_company_overview calls the service{attempt()}")
    key = idempotency_key("fetch_company_overview", company_name=company_name)
    try:
        payload = await service.overview(company_name, key)
    except UnknownCompanyError as error:  # it goes back to the model, which can mend it
        raise ModelRetry(f"{error}: check the name and call again") from None
    return parse(CompanyOverview, payload)


TRANSIENT = (
    ConnectionError,
    TimeoutError,
    dbos_error.DBOSStepTimeoutError,  # raised by `timeout_seconds`; it is not a TimeoutError
    RateLimitError,
    MalformedPayloadError,
)


# Nine waits, from 0.5 to 12.8 s, are 37 s in all. With DBOS's default backoff of 2 it is 256 s.
@DBOS.step(
    timeout_seconds=30,
    preemptible=True,
    **retry(TRANSIENT, attempts=10, first_wait=0.5, backoff=1.5),
)
async def fetch_financial_metrics(company_name: str) -> FinancialMetrics:
    """Look up a company's revenue, growth and margin.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    print_in_step(f"fetch_financial_metrics calls the service{attempt()}")
    key = idempotency_key("fetch_financial_metrics", company_name=company_name)
    try:
        payload = await service.financials(company_name, key)
    except UnknownCompanyError as error:
        raise ModelRetry(f"{error}: check the name and call again") from None
    return parse(FinancialMetrics, payload)


# ---------------------------------------------------------------- the brief

AgentTool = Callable[..., Awaitable[Any]] | Tool[None]
StandIn = Callable[[list[ai.ModelMessage], AgentInfo], Awaitable[ai.ModelResponse]]


class UnreadableError(ResearchError):
    """A stored value is not of today's type. The text says what to do."""


@dataclass(frozen=True)
class Brief:
    """What the model is told and may do: with another brief, the same question is another run."""

    instructions: str
    tools: Sequence[AgentTool]
    output_type: type[Any]
    question: str = 'Write a research report on the company "{company}".'
    recipe: str = "agent"
    """The program whose runs these are: `agent`, or a file of `recipes/`."""
    stand_in: StandIn | None = None
    """What answers in place of a model when there is no key: `offline_script`, or yours."""

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """The tools' own functions."""
        return [tool.function if isinstance(tool, Tool) else tool for tool in self.tools]

    @property
    def told(self) -> list[str]:
        """What the model is told with every request: it reads the tools' docstrings as well."""
        told = [f"{tool.__name__}: {inspect.getdoc(tool)}" for tool in self.functions]
        return [self.instructions, *told]

    def refuse_unreadable(self, run_id: str, steps: list[StepInfo]) -> None:
        """Raise `UnreadableError` if a resumed run would get a checkpoint of another type."""
        types = {
            tool.__name__: inspect.signature(tool).return_annotation for tool in self.functions
        }
        for step in steps:
            name = step["function_name"]
            if step["error"] is None and name.endswith("__model.request"):
                read_stored(run_id, name, step["output"], ai.ModelResponse)
            elif step["error"] is None and name in types:
                read_stored(run_id, name, step["output"], types[name])

    def read_report(self, run_id: str, result: Any) -> Any:
        """Return the report of a finished run; raise `UnreadableError` if it is of another type."""
        report = getattr(result, "output", result)  # an AgentRunResult holds it
        return read_stored(run_id, "report", report, self.output_type)


def read_stored(run_id: str, name: str, value: Any, expected: Any) -> Any:
    """Return a stored value as today's type has it; raise `UnreadableError` if it does not fit.

    Unpickling does not validate: an object that older code has stored lacks today's new fields, and
    only their use would fail. In place of what it cannot unpickle, DBOS returns the raw text.
    """
    plain = value.model_dump(warnings=False) if isinstance(value, BaseModel) else value
    try:
        return TypeAdapter(expected).validate_python(plain)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        what = ".".join(map(str, problem["loc"])) or "its type"
        raise UnreadableError(
            f"the {name} that run {run_id} has stored no longer fits: {what}: {problem['msg']}.\n"
            "Go back to the code that stored it, or start a new run with another --bucket."
        ) from None


BRIEF = Brief(
    instructions="""\
You research companies. Call fetch_company_overview first and fetch_financial_metrics second.
Then write the report from what they returned, and from nothing else.""",
    tools=[fetch_company_overview, fetch_financial_metrics],
    output_type=ResearchReport,
)


# ---------------------------------------------------------------- what is printed


@dataclass
class Output:
    """What this process prints of its runs: a setting of the program, not stored with a run."""

    show: Literal["one run", "many runs", "nothing"] = "one run"
    error: OSError | None = None
    """Why standard output could not be written, if so."""


output = Output()


def print_in_step(message: str) -> None:
    """Print progress from inside a step. A restored step prints nothing: that is the proof."""
    if output.show != "nothing":
        run_id = f"{DBOS.workflow_id} " if output.show == "many runs" else ""
        print_line(f"  {run_id}step {DBOS.step_id}: {message}")


def attempt() -> str:
    """Return which attempt of its step this is, for people, unless it is the first."""
    status = DBOS.step_status
    if status is None or not status.current_attempt:  # the first one is 0
        return ""
    return f" (attempt {status.current_attempt + 1} of {status.max_attempts})"


def print_line(text: str) -> None:
    """Print at once.

    What cannot be printed must not fail a run. So this process goes silent then, and the command
    says so at its end, unless the reader has gone on purpose (`| head`).
    """
    if output.error:
        return
    try:
        print(shown(text), flush=True)
    except OSError as error:
        output.error = error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown(text: str) -> str:
    """Show control characters, and those that turn the direction of text, instead of sending them.

    A terminal would obey them: what a model or a service writes could rename its window. Line ends
    and the joiners that some languages need stay.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cf", "Cs")
        and character not in "\n\u200c\u200d"
        else character
        for character in text
    )


# ---------------------------------------------------------------- what is simulated


@dataclass
class SimulatedService:
    """A simulated company-data service. Replace it with your API client.

    Its fields are settings of this process, read when a step runs. In the agent's `deps` they would
    be stored with the run, and `crash` would kill every recovery as well.
    """

    failure_rate: float = 0.0
    latency: float = 0.0
    crash: bool = False
    idempotent: bool = True
    """Whether it honours idempotency keys. Many services do not."""
    bill: Path | None = None
    """Where it notes each lookup: a line with the key, and what it did. It is the outside world."""

    async def overview(self, company_name: str, key: str) -> dict[str, Any]:
        """Answer with the fields of a `CompanyOverview`, or raise `UnknownCompanyError`."""
        figures = await self._find(company_name)
        self._act(key)
        return {
            "company_name": company_name,
            "industry": figures.choice(["quantum hardware", "logistics", "biotech", "robotics"]),
            "founded_year": figures.randint(1950, 2020),
            "employees": figures.randint(50, 20_000),
        }

    async def financials(self, company_name: str, key: str) -> dict[str, Any]:
        """Answer with the fields of `FinancialMetrics`, or fail as real services do."""
        figures = await self._find(company_name)
        payload = {
            "company_name": company_name,
            "revenue_usd_millions": round(figures.uniform(5, 5_000), 1),
            "revenue_growth_percent": round(figures.uniform(-20, 60), 1),
            "net_margin_percent": round(figures.uniform(-30, 35), 1),
        }
        # An outage comes before the service acts, and follows from the company and the attempt, so
        # that everybody sees the same. At any rate below 1 the last attempt succeeds.
        status = DBOS.step_status
        attempt = (status.current_attempt or 0) + 1 if status else 1
        last = attempt == (status.max_attempts if status else None)
        dice = random.Random(f"{company_name.casefold()} attempt {attempt}")
        if dice.random() < self.failure_rate and (self.failure_rate == 1 or not last):
            outage = dice.choice([ConnectionResetError, RateLimitError, TimeoutError, None])
            if outage is None:
                return {**payload, "revenue_usd_millions": "n/a"}
            raise outage("simulated outage")
        self._act(key)
        if self.crash:
            print_in_step("the service has acted, and nothing is stored yet: now SIGKILL")
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)  # as process 1 of a container, no process can kill itself
        return payload

    async def _find(self, company_name: str) -> random.Random:
        await asyncio.sleep(self.latency)
        if not any(character.isalnum() for character in company_name):
            raise UnknownCompanyError(f"no company is known as {company_name!r}")
        # A company has the same figures in every process.
        return random.Random(hashlib.sha256(company_name.casefold().encode()).digest())

    def _act(self, key: str) -> None:
        """Note the lookup in the bill, unless one with this key is there already."""
        if self.bill is None:
            return
        with self.bill.open("a+") as bill:
            bill.seek(0)
            known = self.idempotent and any(line.startswith(f"{key} billed") for line in bill)
            bill.write(f"{key} {'answered from the record' if known else 'billed'}\n")
        if known:
            print_in_step("the service knows this key, answers from its record, bills nothing")


service = SimulatedService()
"""The service that the tools call."""


async def offline_script(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Stand in for a model: call each tool, then report what they returned."""
    await asyncio.sleep(service.latency)
    parts = [part for message in messages for part in message.parts]
    prompt = next(str(part.content) for part in parts if isinstance(part, ai.UserPromptPart))
    company = prompt.partition('"')[2].rpartition('"')[0]
    unknown = ResearchError("the offline script knows only its own question: see Brief.stand_in")
    if not company:
        raise unknown
    facts: dict[str, Any] = {
        part.tool_name: part.content
        for part in parts
        if isinstance(part, ai.ToolReturnPart) and part.outcome != "retried"
    }
    if missing := [tool.name for tool in info.function_tools if tool.name not in facts]:
        calls = [ai.ToolCallPart(name, {"company_name": company}) for name in missing]
        return ai.ModelResponse(parts=calls)
    # By their types, because a tool of yours may have another name.
    overviews = [fact for fact in facts.values() if isinstance(fact, CompanyOverview)]
    figures = [fact for fact in facts.values() if isinstance(fact, FinancialMetrics)]
    if not (overviews and figures and info.output_tools):
        raise unknown
    overview, metrics = overviews[0], figures[0]
    report = ResearchReport(
        **metrics.model_dump(),
        industry=overview.industry,
        summary=f"{company} works in {overview.industry} with {overview.employees} people.",
        strengths=[f"in business since {overview.founded_year}"],
        risks=[f"a net margin of {metrics.net_margin_percent} % may not last"],
    )
    answer = ai.ToolCallPart(info.output_tools[0].name, report.model_dump())
    return ai.ModelResponse(parts=[answer])
