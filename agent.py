"""A research agent that survives being killed: run it, kill it, run it again.

    uv run agent.py                    # research the default company
    uv run agent.py "Acme" --crash     # die by SIGKILL in the middle of the flaky tool
    uv run agent.py "Acme"             # the same run goes on after its last checkpoint
    uv run agent.py --list             # what is stored

The promise: run the same command again, whatever happened, and the same run moves on to its end;
a step that finished is never repeated. `research()` keeps it.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import socket
import sqlite3
import sys
import textwrap
import time
import traceback
import uuid
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import psycopg
import sqlalchemy
from dbos import (
    DBOS,
    SetWorkflowAttributes,
    SetWorkflowID,
    StepInfo,
    WorkflowHandleAsync,
    WorkflowStatus,
)
from dbos import error as dbos_error
from filelock import FileLock, Timeout
from pydantic_ai import Agent, AgentRunResult, ModelRetry, RunContext, UsageLimits
from pydantic_ai import exceptions as ai_error
from pydantic_ai import messages as ai
from pydantic_ai.durable_exec.dbos import DBOSAgent, StepConfig
from pydantic_ai.models import Model, StreamedResponse, infer_model
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, DeltaToolCalls, FunctionModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.providers import Provider, infer_provider

import tools
from config import (
    APP_VERSION,
    MODEL_BY_KEY,
    ResearchError,
    ResearchRequest,
    Settings,
    clean_text,
    derive_run_id,
    load_settings,
)
from tools import say, tell

APP_NAME = "durable-research-agent"
AGENT_NAME = "research_agent"
INSTRUCTIONS = """\
You research companies. Call fetch_company_overview first and fetch_financial_metrics second.
Then write the report from what they returned, and from nothing else."""

# DBOSAgent passes these on to @DBOS.step, although its own StepConfig type lists only some of them.
MODEL_STEP: dict[str, Any] = {
    "retries_allowed": True,
    "max_attempts": 4,  # with 1, 2 and 4 seconds between them
    "timeout_seconds": 90,
    "should_retry": tools.retry_on(
        ai_error.ModelRateLimitError,
        ai_error.ModelUnavailableError,
        ai_error.ModelServerError,
        ai_error.ModelConnectionError,
        dbos_error.DBOSStepTimeoutError,
    ),
}


DurableAgent = DBOSAgent[None, tools.ResearchReport]


class RunFailed(ResearchError):  # noqa: N818 - it reads as what happened
    """The run ended in an error, which is stored. The same command goes on from there."""

    exit_code = 1


# ---------------------------------------------------------------- the agent and its model


class NarratedModel(WrapperModel):
    """The model, with a line printed at each attempt to ask it, inside the model's step."""

    @asynccontextmanager
    async def request_stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[StreamedResponse]:
        """Ask the wrapped model."""
        say(f"asks the model {self.model_name}")
        try:
            async with super().request_stream(*args, **kwargs) as response:
                yield response
        except ai_error.ModelAuthenticationError:
            # Providers quote the key, or some of it, in this error, and DBOS stores errors.
            keys = [key for key, model in MODEL_BY_KEY.items() if model.startswith(self.system)]
            what = f"the provider refused the API key: check {' '.join(keys) or 'it'} in .env"
            raise ai_error.ModelAuthenticationError(self.model_name, what) from None


async def narrate_answer(_: RunContext[None], events: AsyncIterable[ai.AgentStreamEvent]) -> None:
    """Print what the model asks for: the agent's event stream handler.

    The model's events arrive inside its step, and so not on a replay. Events of tools arrive in
    workflow code, which a replay runs again: the tools tell of themselves instead.
    """
    async for event in events:
        if isinstance(event, ai.PartEndEvent) and isinstance(event.part, ai.ToolCallPart):
            say(f"the model calls {event.part.tool_name}")


async def offline_script(
    messages: list[ai.ModelMessage], info: AgentInfo
) -> AsyncIterator[DeltaToolCalls]:
    """Stand in for a model: call both tools, then report what they returned."""
    await asyncio.sleep(tools.service.latency)
    parts = [part for message in messages for part in message.parts]
    prompt = next(str(part.content) for part in parts if isinstance(part, ai.UserPromptPart))
    company = prompt[prompt.index('"') + 1 : prompt.rindex('"')]
    facts: dict[str, Any] = {
        part.tool_name: part.content
        for part in parts
        if isinstance(part, ai.ToolReturnPart) and part.outcome == "success"
    }
    missing = [tool.name for tool in info.function_tools if tool.name not in facts]
    for index, name in enumerate(missing):
        yield {index: DeltaToolCall(name, json.dumps({"company_name": company}))}
    if not missing:
        overview: tools.CompanyOverview = facts["fetch_company_overview"]
        metrics: tools.FinancialMetrics = facts["fetch_financial_metrics"]
        report = tools.ResearchReport(
            **metrics.model_dump(),
            industry=overview.industry,
            summary=f"{company} works in {overview.industry} with {overview.employees} people.",
            strengths=[f"in business since {overview.founded_year}"],
            risks=[f"a net margin of {metrics.net_margin_percent} % may not last"],
        )
        yield {0: DeltaToolCall(info.output_tools[0].name, report.model_dump_json())}


def build_model(name: str) -> Model:
    """Make the model of that name; raise `ResearchError` if that cannot be done."""
    if name == "offline":
        return FunctionModel(stream_function=offline_script, model_name=name)
    try:
        return infer_model(name, _provider_without_retries)
    except (ai_error.UserError, ValueError, ImportError) as error:
        # An unknown name, a key or a package that is missing: the first line says which.
        reason = str(error).splitlines()[0]
        raise ResearchError(f"the model {name} cannot be used: {reason}") from error


def _provider_without_retries(name: str) -> Provider[Any]:
    # DBOS alone retries. The client of most providers does too, and the two would multiply.
    provider = infer_provider(name)
    if hasattr(provider.client, "max_retries"):
        provider.client.max_retries = 0
    return provider


def build_agent(model: Model) -> DurableAgent:
    """Make the agent durable: its runs become workflows, and each model request a step."""
    agent = Agent(
        NarratedModel(model),
        name=AGENT_NAME,
        instructions=INSTRUCTIONS,
        output_type=tools.ResearchReport,
        tools=[tools.fetch_company_overview, tools.fetch_financial_metrics],
        retries=2,  # of an answer, or of a tool call, that goes back to the model to be mended
    )
    with warnings.catch_warnings():
        # It goes in pydantic-ai 3, which pyproject.toml excludes. The README shows the way over.
        warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")
        return DBOSAgent(
            agent,
            event_stream_handler=narrate_answer,
            model_step_config=cast(StepConfig, MODEL_STEP),
            # One tool after the other, so that steps end in the order of their numbers. A failed
            # run goes on by dropping the failed step *and those numbered above it*, among which
            # there could be a finished one if tools ran in parallel.
            parallel_execution_mode="sequential",
        )


def launch(settings: Settings, *, verbose: bool = False) -> DurableAgent:
    """Start DBOS and return the durable agent. Call it once in a process.

    Args:
        settings: From `load_settings()`.
        verbose: Whether DBOS writes its own log to stderr.

    Raises:
        ResearchError: The model or the database cannot be used.
    """
    # DBOS wants all workflows and steps to exist before it is launched.
    agent = build_agent(build_model(settings.model))
    # When it is launched, DBOS goes on with all that its executor ID has left unfinished. By
    # default every process is "local": it would run other people's work, and a second time what
    # another live process is running. Under an ID of its own it finds nothing; see research().
    executor_id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    DBOS(
        config={
            "name": APP_NAME,
            "application_version": APP_VERSION,
            "executor_id": executor_id,
            "system_database_url": settings.database_url.render_as_string(hide_password=False),
            "log_level": "INFO" if verbose else "CRITICAL",
        }
    )
    # A run that is resumed goes through a queue. Every process serves DBOS's internal one, and
    # with a model of its own; this one is served by nobody else.
    DBOS.listen_queues([executor_id])
    if sqlite3.sqlite_version_info < (3, 42):
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _add_unixepoch)
    try:
        DBOS.launch()
    except (sqlalchemy.exc.SQLAlchemyError, dbos_error.DBOSException) as error:
        raise database_error(settings, error) from error
    return agent


def _add_unixepoch(connection: Any, _record: Any) -> None:
    # From Python 3.12 on, dbos 3.4 uses SQLite's unixepoch('subsec'), which came with SQLite 3.42.
    # Many interpreters are linked to an older one.
    if isinstance(connection, sqlite3.Connection):
        connection.create_function("unixepoch", 1, lambda _: time.time())


# ---------------------------------------------------------------- the promise


@dataclass(frozen=True)
class ResearchRun:
    """A finished run."""

    run_id: str
    report: tools.ResearchReport
    steps: list[StepInfo]
    attempts: dict[int | None, int]
    """By ID, the steps that ran in this process. The others were restored from checkpoints."""


async def research(
    agent: DurableAgent,
    settings: Settings,
    request: ResearchRequest,
    run_id: str | None = None,
) -> ResearchRun:
    """Move the run of this request on to its end, in whatever state it is found.

    In a service of your own, call `agent = launch(settings)` once, and then, as often as you like,
    `run = await research(agent, settings, settings.request("Acme"))`.

    Args:
        agent: From `launch()`.
        settings: What it was launched with.
        request: From `settings.request()`.
        run_id: The DBOS workflow ID, if not the one derived from the request.

    Raises:
        ResearchError: The ID is taken by another request, or by another version of the app.
        RunFailed: The run failed. Call again to go on from the failed step.
    """
    run_id = run_id or derive_run_id(request)

    def tell_state(state: str) -> None:
        where = f"Model: {request.model}. Database: {settings.database_label}."
        tell(wrap(f"Run {run_id}: {state}. {where}"))
        if request.model == "offline":
            tell("(A script stands in for the model. For a real one, put an API key in .env.)")

    try:
        async with run_lock(settings, run_id):
            # While we hold its lock, no other process executes this run. If it is unfinished, the
            # process that executed it is dead.
            stored = await DBOS.get_workflow_status_async(run_id)
            steps = await DBOS.list_workflow_steps_async(run_id)
            failure = find_failure(stored, steps)
            if stored is None:
                tell_state("new")
                with SetWorkflowID(run_id), SetWorkflowAttributes(request.attributes):
                    limits = UsageLimits(request_limit=12)  # a model that loops costs money
                    result = await agent.run(request.prompt, usage_limits=limits)
            else:
                refuse_if_unfit(stored, steps, request)
                handle: WorkflowHandleAsync[AgentRunResult[tools.ResearchReport]]
                if stored.status == "SUCCESS":
                    tell_state("finished before, its stored report is replayed")
                    handle = await DBOS.retrieve_workflow_async(run_id)
                elif failure is not None:
                    # A failed run raises its recorded error for ever. Rewinding drops the failed
                    # step, and executes the same run from there. It takes only runs that ended.
                    step, error = failure
                    tell_state(f"failed at step {step} ({describe(error)}), goes on from there")
                    await DBOS.cancel_workflow_async(run_id)
                    queue = await own_queue()
                    handle = await DBOS.rewind_workflow_async(
                        run_id, start_step=step, queue_name=queue
                    )
                else:
                    tell_state(f"{interruption(stored)}, goes on after {len(steps)} finished steps")
                    handle = await DBOS.resume_workflow_async(run_id, queue_name=await own_queue())
                result = await handle.get_result(polling_interval_sec=0.1)
            steps = await DBOS.list_workflow_steps_async(run_id)
            return ResearchRun(run_id, result.output, steps, tools.attempts.pop(run_id, {}))
    except ResearchError:
        raise
    except (sqlalchemy.exc.SQLAlchemyError, psycopg.Error) as error:
        raise database_error(settings, error) from error
    except Exception as error:
        raise RunFailed(
            f"the run failed: {describe(error)}\n"
            "Finished steps are stored. Run the same command to go on from the failed one."
        ) from error
    finally:
        tools.attempts.pop(run_id, None)


def refuse_if_unfit(
    stored: WorkflowStatus, steps: list[StepInfo], request: ResearchRequest
) -> None:
    """Raise `ResearchError` where going on would give a wrong answer, or none for ever."""
    asked = stored.attributes or {}
    if asked.get("request_id") != derive_run_id(request):
        # DBOS compares nothing but the ID: it would hand out the answer to the other question.
        raise ResearchError(
            f"run {stored.workflow_id} is stored for another request: {asked.get('company')},"
            f" {asked.get('model')}, bucket {asked.get('bucket')!r}.\n"
            "Choose another --run-id, or leave it out."
        )
    if stored.app_version != APP_VERSION and stored.status != "SUCCESS":
        # DBOS would wait for a process of that version, without a word.
        raise ResearchError(
            f"run {stored.workflow_id} belongs to version {stored.app_version} of this app, which"
            f" is version {APP_VERSION}.\n"
            "Finish it with that version, or start a new run with another --bucket."
        )
    if any(
        isinstance(value, str) for value in [stored.output, *(step["output"] for step in steps)]
    ):
        # DBOS lists what it cannot unpickle as text, which no step of ours returns.
        raise ResearchError(
            f"a checkpoint of run {stored.workflow_id} cannot be read: its types have changed.\n"
            "Go back to the code that stored it, or start a new run with another --bucket."
        )


def find_failure(
    stored: WorkflowStatus | None, steps: list[StepInfo]
) -> tuple[int, Exception | None] | None:
    """Return the ID of the step from which a failed run must go on, and its error."""
    for step in steps:
        # A ModelRetry is no failure: it went to the model, which has answered it.
        if step["error"] is not None and not isinstance(step["error"], ModelRetry):
            return step["function_id"], step["error"]
    if stored is None or stored.status != "ERROR":
        return None
    # No step failed. Either the run gave up over what the model said: then ask it again. Or it
    # failed between steps, say by a full disk: then all of them are kept.
    model_gave_up = isinstance(stored.error, ai_error.AgentRunError)
    asked = [0, *(step["function_id"] for step in steps if is_model_step(step))]
    last = asked[-1] if model_gave_up else len(steps) + 1
    return max(last, 1), stored.error


def interruption(stored: WorkflowStatus) -> str:
    """Say why an unfinished run is not running."""
    if stored.status in ("PENDING", "ENQUEUED", "DELAYED"):
        return "interrupted"
    return stored.status.lower().replace("_", " ")


async def own_queue() -> str:
    """Make sure that there is a queue for what this process resumes, and return its name."""
    return (await DBOS.register_queue_async(DBOS.executor_id, polling_interval_sec=0.1)).name


@asynccontextmanager
async def run_lock(settings: Settings, run_id: str) -> AsyncIterator[None]:
    """Hold the lock of this run, and wait for it while another live process does.

    It needs no cleaning up: the lock of a process that dies, however it dies, is released.
    """
    waiting = False
    while (lock := await asyncio.to_thread(try_lock, settings, run_id)) is None:
        if not waiting:
            stored = await DBOS.get_workflow_status_async(run_id)
            owner = stored.executor_id if stored is not None else "another process"
            tell(wrap(f"Run {run_id} is being executed by {owner}. Waiting for it."))
        waiting = True
        await asyncio.sleep(0.5)
    with lock:
        yield


def try_lock(settings: Settings, run_id: str) -> AbstractContextManager[Any] | None:
    """Return the lock of this run, taken, or None if another process has it."""
    url = settings.database_url
    if url.drivername == "sqlite":
        name = hashlib.sha256(run_id.encode()).hexdigest()
        try:
            return FileLock(f"{url.database}.locks/{name}", thread_local=False).acquire(timeout=0)
        except Timeout:
            return None
    dsn = url.render_as_string(hide_password=False)
    connection = psycopg.connect(dsn, autocommit=True)
    # A machine without power closes no connection. Have the server find out after half a minute;
    # left alone it waits for two hours.
    connection.execute("SET tcp_keepalives_idle = 15")
    connection.execute("SET tcp_keepalives_interval = 5")
    connection.execute("SET tcp_keepalives_count = 3")
    # An advisory lock is held by a session, and so for as long as this connection is open.
    taken = connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [run_id])
    if taken.fetchone() == (True,):
        return closing(connection)
    connection.close()
    return None


# ---------------------------------------------------------------- what is told


def tell_run(run: ResearchRun) -> None:
    """Print the report, where each step's result came from, and what the checkpoints saved."""
    tell("")
    for name, value in run.report:
        text = "; ".join(value) if isinstance(value, list) else str(value)
        tell(textwrap.fill(f"{name:<24}{text}", 80, subsequent_indent=" " * 24))
    tell(f"\n{'step':<31}{'this time':<11}{'attempts':>8}{'seconds':>9}{'tokens':>8}{'US$':>10}")
    requests, tokens, seconds = 0, 0, 0.0
    for step in run.steps:
        number = step["function_id"]
        took = ((step["completed_at_epoch_ms"] or 0) - (step["started_at_epoch_ms"] or 0)) / 1000
        answer = step["output"] if isinstance(step["output"], ai.ModelResponse) else None
        name = "model request" if is_model_step(step) else step["function_name"]
        line = f"{number:>2}  {name:<27}{'ran' if number in run.attempts else 'restored':<11}"
        line += f"{run.attempts.get(number, ''):>8}{took:>9.1f}"
        line += f"{answer.usage.total_tokens if answer else '':>8}{price(answer):>10}"
        tell(line.rstrip())
        if number not in run.attempts:
            requests += is_model_step(step)
            tokens += answer.usage.total_tokens if answer else 0
            seconds += took
    tell(f"Saved by checkpoints: model requests {requests}, tokens {tokens}, seconds {seconds:.1f}")


def is_model_step(step: StepInfo) -> bool:
    """Tell a model request from a tool call."""
    return step["function_name"].startswith(f"{AGENT_NAME}__model")


def price(answer: ai.ModelResponse | None) -> str:
    """Return the price of an answer in US dollars, by genai-prices, or "" where it knows none."""
    try:
        return f"{answer.cost().total_price:.5f}" if answer else ""
    except (LookupError, ValueError):
        return ""


def tell_runs() -> None:
    """Print the 50 newest runs."""
    runs = DBOS.list_workflows(
        application_name=APP_NAME, sort_desc=True, limit=50, load_input=False, load_output=False
    )
    for run in runs:
        steps = DBOS.list_workflow_steps(run.workflow_id, load_output=False)
        when = datetime.fromtimestamp((run.created_at or 0) / 1000).strftime("%Y-%m-%d %H:%M")
        company = (run.attributes or {}).get("company")
        tell(f"{when}  {run.status:<9}{len(steps):>3} steps  {company}\n    {run.workflow_id}")
    if not runs:
        tell("No runs are stored in this database.")


def tell_interruption(run_id: str | None) -> None:
    """Say what Ctrl-C left behind."""
    # Asked again, end at once: the database may be what hangs.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    steps = DBOS.list_workflow_steps(run_id, load_output=False) if run_id else []
    saved = f"{len(steps)} finished steps are stored"
    print(f"\nInterrupted: {saved}. Run the same command to go on.", file=sys.stderr)


def describe(error: object) -> str:
    """Say in a line what went wrong."""
    if not isinstance(error, BaseException):
        return "an error that cannot be read any more"
    if isinstance(error, dbos_error.DBOSMaxStepRetriesExceeded):
        return (
            f"{error.step_name} failed {error.max_retries} times, last {describe(error.errors[-1])}"
        )
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def database_error(settings: Settings, error: Exception) -> ResearchError:
    """Say what is wrong with the database. Its URL may hold a password, and is not told."""
    reason = textwrap.shorten(str(getattr(error, "orig", error)), 200)
    return ResearchError(
        f"the database ({settings.database_label}) cannot be used: {reason}\n"
        "Mend it, or its URL, and run the same command again: what finished is stored."
    )


def wrap(text: str) -> str:
    """Fold a paragraph to the 80 columns of a terminal."""
    return textwrap.fill(text, 80, break_on_hyphens=False)


# ---------------------------------------------------------------- the command line


def main() -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        description="Research a company with an agent that survives being killed.",
        epilog="Exit codes: 0 finished; 1 the run failed, run again to go on; 2 bad usage, "
        "configuration or database; 130 interrupted by Ctrl-C.",
    )
    parser.add_argument("company", nargs="?", default="Quantum Compute Corp")
    parser.add_argument("--bucket", default="", help="any text: a new one is a new run")
    parser.add_argument("--run-id", help="the run's ID, instead of the derived one")
    parser.add_argument("--crash", action="store_true", help="die by SIGKILL in the flaky tool")
    parser.add_argument("--list", action="store_true", help="list the stored runs")
    parser.add_argument("--verbose", action="store_true", help="show DBOS's log and tracebacks")
    options = parser.parse_args()
    run_id = None
    try:
        settings = load_settings()
        request = settings.request(options.company, options.bucket)
        if options.run_id is not None:
            options.run_id = clean_text("the run ID", options.run_id)
        if settings.pooled_host:
            direct = settings.pooled_host.replace("-pooler", "")
            print(f"warning: DBOS needs Neon's direct host, {direct}", file=sys.stderr)
        tools.service = tools.SimulatedService(
            settings.failure_rate, settings.latency, options.crash
        )
        agent = launch(settings, verbose=options.verbose)
        if options.list:
            tell_runs()
            return 0
        run_id = options.run_id or derive_run_id(request)
        run = asyncio.run(research(agent, settings, request, run_id))
        tell_run(run)
        # There is one if the run was resumed. A process that is killed leaves it: a row, no more.
        DBOS.delete_queue(DBOS.executor_id)
    except ResearchError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        tell_interruption(run_id)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
