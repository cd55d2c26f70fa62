"""A research agent that survives being killed: run it, kill it, run it again.

    uv run agent.py                    # research the default company
    uv run agent.py "Acme" --crash     # die by SIGKILL in the middle of the flaky tool
    uv run agent.py "Acme"             # the same run resumes after its last checkpoint
    uv run agent.py --list             # what is stored

The promise: run the same command again, whatever happened, and the same run moves on to its end;
a step that finished is never repeated. `research()` keeps it, and is the function to read first.
"""

import os
import signal

if __name__ == "__main__":  # the imports take two seconds, in which Ctrl-C would be a traceback

    def interrupted(*_: object) -> None:
        """Say that nothing is lost, and end."""
        os.write(2, b"\nInterrupted: nothing was begun. Run the same command to resume.\n")
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

import argparse
import asyncio
import hashlib
import io
import json
import logging
import socket
import sqlite3
import sys
import textwrap
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NoReturn, cast

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
from tools import print_in_step, print_line

APP_NAME = "durable-research-agent"
AGENT_NAME = "research_agent"
INSTRUCTIONS = """\
You research companies. Call fetch_company_overview first and fetch_financial_metrics second.
Then write the report from what they returned, and from nothing else."""

# DBOSAgent passes all of these to @DBOS.step, although its StepConfig type lists only some.
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


DATABASE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, dbos_error.DBOSInitializationError)
DurableAgent = DBOSAgent[None, tools.ResearchReport]


class RunFailed(ResearchError):  # noqa: N818 - it reads as what happened
    """The run ended in an error, which is stored. The same command resumes it from there."""

    exit_code = 1


# ---------------------------------------------------------------- the agent and its model


class NarratedModel(WrapperModel):
    """The model, with a line printed for each attempt, inside the model's step."""

    @asynccontextmanager
    async def request_stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[StreamedResponse]:
        """Ask the wrapped model."""
        print_in_step(f"asks the model {self.model_name}")
        try:
            async with super().request_stream(*args, **kwargs) as response:
                yield response
        except ai_error.ModelAuthenticationError:
            keys = [key for key, model in MODEL_BY_KEY.items() if model.startswith(self.system)]
            what = f"the provider refused the API key: check {' '.join(keys) or 'it'} in .env"
            raise ai_error.ModelAuthenticationError(self.model_name, what) from None
        except ai_error.ModelHTTPError as error:
            # DBOS stores errors: remove the provider's text if it quotes the API key.
            key = getattr(getattr(self.provider, "client", None), "api_key", None)
            if not key or f"{key}" not in f"{error} {error.headers}":
                raise
            error.body, error.headers = "removed, because it quoted the API key", None
            error.message = f"status_code: {error.status_code}, body: {error.body}"
            error.args = (error.message,)
            raise error from None


async def narrate_answer(_: RunContext[None], events: AsyncIterable[ai.AgentStreamEvent]) -> None:
    """Print which tools the model calls. This is the agent's event stream handler.

    The model's events arrive inside its step, so a replay does not repeat them. The tools' events
    arrive in workflow code, which a replay does run again; so the tools print for themselves.
    """
    async for event in events:
        if isinstance(event, ai.PartEndEvent) and isinstance(event.part, ai.ToolCallPart):
            print_in_step(f"the model calls {event.part.tool_name}")


async def offline_script(
    messages: list[ai.ModelMessage], info: AgentInfo
) -> AsyncIterator[DeltaToolCalls]:
    """Stand in for a model: call each tool, then report what they returned."""
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
    """Return the model of that name; raise `ResearchError` if it cannot be used."""
    if name == "offline":
        return FunctionModel(stream_function=offline_script, model_name=name)
    try:
        return infer_model(name, _provider_without_retries)
    except (ai_error.UserError, ValueError, ImportError) as error:
        # The name is unknown, or its key or package is missing: the first line says which.
        reason = str(error).splitlines()[0]
        raise ResearchError(f"the model {name} cannot be used: {reason}") from error


def _provider_without_retries(name: str) -> Provider[Any]:
    # DBOS retries. Most providers' clients do too, and the attempts would multiply.
    provider = infer_provider(name)
    if hasattr(provider.client, "max_retries"):
        provider.client.max_retries = 0
    return provider


def build_agent(model: Model) -> DurableAgent:
    """Build the durable agent: its runs are workflows, and each model request is a step."""
    agent = Agent(
        NarratedModel(model),
        name=AGENT_NAME,
        instructions=INSTRUCTIONS,
        output_type=tools.ResearchReport,
        tools=[tools.fetch_company_overview, tools.fetch_financial_metrics],
        retries=2,  # how often a bad answer or tool call goes back to the model
    )
    with warnings.catch_warnings():
        # pydantic-ai 3 removes it; pyproject.toml excludes 3. The README shows how to migrate.
        warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")
        return DBOSAgent(
            agent,
            event_stream_handler=narrate_answer,
            model_step_config=cast(StepConfig, MODEL_STEP),
            # One tool at a time, so that steps finish in the order of their numbers. Resuming a
            # failed run deletes the failed step *and every step with a higher number*; with tools
            # in parallel, one of those could have finished.
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
    tools.service.failure_rate, tools.service.latency = settings.failure_rate, settings.latency
    # All workflows and steps must exist before DBOS is launched.
    agent = build_agent(build_model(settings.model))
    # At launch, DBOS resumes every unfinished run that carries this process's executor ID. By
    # default each process has the ID "local", and so would resume other people's runs, even runs
    # that are live in another process. A unique ID matches none: research() resumes one run.
    executor_id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    if sqlite3.sqlite_version_info < (3, 42):
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _add_unixepoch)
    try:
        DBOS(
            config={
                "name": APP_NAME,
                "application_version": APP_VERSION,
                "executor_id": executor_id,
                "system_database_url": settings.database_url.render_as_string(hide_password=False),
                "log_level": "INFO" if verbose else "WARNING",
                "console_log_level": "INFO" if verbose else "CRITICAL",
            }
        )
        # DBOS executes resumed runs from a queue. Any process may take them from its internal
        # queue, and may be set to another model; only this process listens to this queue.
        DBOS.listen_queues([executor_id])
        logging.getLogger("dbos").addHandler(DatabaseAlarm())
        DBOS.launch()
    except (*DATABASE_ERRORS, OSError, ValueError, TypeError) as error:
        raise database_error(settings, error) from error
    return agent


class DatabaseAlarm(logging.Handler):
    """Reports a lost database. DBOS waits for it to come back, silently and without a limit."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pick that one message out of DBOS's log."""
        if record.getMessage().startswith("Database connection failed"):
            print_line("  the database does not answer: waiting for it to come back")


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
    """Step ID to attempts in this process. Steps that are missing here were restored."""


async def research(
    agent: DurableAgent,
    settings: Settings,
    request: ResearchRequest,
    run_id: str | None = None,
) -> ResearchRun:
    """Bring the run of this request to its end, whatever state it is found in.

    A caller that is cancelled stops waiting; the run goes on, and keeps its lock, to its end.
    In a service of your own, call `agent = launch(settings)` once, and then, as often as you like,
    `run = await research(agent, settings, settings.request("Acme"))`.

    Args:
        agent: From `launch()`.
        settings: What it was launched with.
        request: From `settings.request()`.
        run_id: The DBOS workflow ID, if not the one derived from the request.

    Raises:
        ResearchError: The ID is taken by another request, or by another version of the app.
        RunFailed: The run failed. Call again to resume it from the failed step.
    """
    moving_on = move_on(agent, settings, request, run_id or derive_run_id(request))
    return await asyncio.shield(asyncio.create_task(moving_on))


async def move_on(
    agent: DurableAgent, settings: Settings, request: ResearchRequest, run_id: str
) -> ResearchRun:
    """Do what `research()` promises."""

    def print_state(state: str) -> None:
        where = f"Model: {request.model}. Database: {settings.database_label}."
        print_line(wrap(f"Run {run_id}: {state}. {where}"))
        if request.model == "offline":
            print_line("(A script stands in for the model. To use a real one, see .env.example.)")

    try:
        async with run_lock(settings, request, run_id):
            # While we hold the lock, no other process executes this run. If the run is
            # unfinished, the process that was executing it has died.
            stored = await DBOS.get_workflow_status_async(run_id)
            steps = await DBOS.list_workflow_steps_async(run_id)
            failure = find_failure(stored, steps)
            if stored is None:
                print_state("new")
                with SetWorkflowID(run_id), SetWorkflowAttributes(request.attributes):
                    limits = UsageLimits(request_limit=12)  # a model that loops costs money
                    result = await agent.run(request.prompt, usage_limits=limits)
            else:
                refuse_if_unfit(stored, steps, request)
                handle: WorkflowHandleAsync[AgentRunResult[tools.ResearchReport]]
                if stored.status == "SUCCESS":
                    print_state("finished earlier, so its stored report is replayed")
                    handle = await DBOS.retrieve_workflow_async(run_id)
                elif failure is not None:
                    # Resuming a failed run only raises its stored error again. Rewinding deletes
                    # the failed step and then resumes. It requires a run that has ended, and this
                    # one may have died before its end was stored: so cancel it first.
                    step, error = failure
                    print_state(f"failed at step {step} ({describe(error)}), resumes there")
                    await DBOS.cancel_workflow_async(run_id)
                    queue = await own_queue()
                    handle = await DBOS.rewind_workflow_async(
                        run_id, start_step=step, queue_name=queue
                    )
                else:
                    kept = len(finished(steps))
                    print_state(f"{interruption(stored)}, resumes after {kept} finished steps")
                    handle = await DBOS.resume_workflow_async(run_id, queue_name=await own_queue())
                result = await handle.get_result(polling_interval_sec=0.1)
            steps = await DBOS.list_workflow_steps_async(run_id)
            return ResearchRun(run_id, result.output, steps, tools.attempts.pop(run_id, {}))
    except ResearchError:
        raise
    except DATABASE_ERRORS as error:
        raise database_error(settings, error) from error
    except Exception as error:
        raise RunFailed(
            f"the run failed: {describe(error)}\n"
            "Finished steps are stored. Run the same command to resume from the failed one."
        ) from error
    finally:
        tools.attempts.pop(run_id, None)


def refuse_if_unfit(
    stored: WorkflowStatus, steps: list[StepInfo], request: ResearchRequest
) -> None:
    """Raise `ResearchError` if resuming would give a wrong answer, or would hang."""
    asked = stored.attributes or {}
    if asked.get("request_id") != derive_run_id(request):
        # DBOS compares only the ID: it would return the answer to the other question.
        raise ResearchError(
            f"run {stored.workflow_id} is stored for another request: {asked.get('company')},"
            f" {asked.get('model')}, bucket {asked.get('bucket')!r}.\n"
            "Choose another --run-id, or leave it out."
        )
    if stored.app_version != APP_VERSION and stored.status != "SUCCESS":
        # DBOS would wait silently for a process of that version.
        raise ResearchError(
            f"run {stored.workflow_id} belongs to version {stored.app_version} of this app, which"
            f" is version {APP_VERSION}.\n"
            "Finish it with that version, or start a new run with another --bucket."
        )
    if any(
        isinstance(value, str) for value in [stored.output, *(step["output"] for step in steps)]
    ):
        # In place of a value that it cannot unpickle, DBOS returns the raw text. No step of ours
        # returns text.
        raise ResearchError(
            f"a checkpoint of run {stored.workflow_id} cannot be read: its types have changed.\n"
            "Go back to the code that stored it, or start a new run with another --bucket."
        )


def find_failure(
    stored: WorkflowStatus | None, steps: list[StepInfo]
) -> tuple[int, Exception | None] | None:
    """Return the ID of the step from which a failed run must resume, and the error."""
    for step in steps:
        # A ModelRetry is not a failure: it went back to the model, which has dealt with it.
        if step["error"] is not None and not isinstance(step["error"], ModelRetry):
            return step["function_id"], step["error"]
    if stored is None or stored.status != "ERROR":
        return None
    # No step failed. If the run gave up on the model's answers, ask the model again: its last
    # answer, and what that led to, is dropped. If the run failed between steps, for example
    # because the disk was full, keep them all.
    if isinstance(stored.error, ai_error.AgentRunError):
        asked = [step["function_id"] for step in steps if is_model_step(step)]
        return max(asked, default=1), stored.error
    return max((step["function_id"] for step in steps), default=0) + 1, stored.error


def finished(steps: list[StepInfo]) -> list[StepInfo]:
    """Return the steps that did not fail."""
    return [step for step in steps if step["error"] is None]


def interruption(stored: WorkflowStatus) -> str:
    """Say why an unfinished run is not running."""
    if stored.status in ("PENDING", "ENQUEUED", "DELAYED"):
        return "interrupted"
    return stored.status.lower().replace("_", " ")


async def own_queue() -> str:
    """Return the name of this process's own queue, after making sure that it exists."""
    return (await DBOS.register_queue_async(DBOS.executor_id, polling_interval_sec=0.1)).name


@asynccontextmanager
async def run_lock(
    settings: Settings, request: ResearchRequest, run_id: str
) -> AsyncIterator[None]:
    """Hold the lock of this run, after waiting for any live process that holds it.

    The operating system or the database releases it when its process dies, however it dies.
    """
    waiting = False
    while (lock := await asyncio.to_thread(try_lock, settings, run_id)) is None:
        stored = None if waiting else await DBOS.get_workflow_status_async(run_id)
        if stored is not None:
            refuse_if_unfit(stored, [], request)
            owner = f"Run {run_id} is being executed by {stored.executor_id}."
            print_line(wrap(f"{owner} This process waits for it and executes nothing."))
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
        except OSError as error:
            raise database_error(settings, error) from error
    # A session holds an advisory lock, for as long as this connection is open.
    engine = sqlalchemy.create_engine(
        url, isolation_level="AUTOCOMMIT", poolclass=sqlalchemy.NullPool
    )
    connection = engine.connect()
    # The server must not close it for being idle. But it must notice within half a minute, and
    # not two hours, if this machine loses power.
    for setting in ("idle_session_timeout = 0", "tcp_keepalives_idle = 15"):
        connection.execute(sqlalchemy.text(f"SET {setting}"))
    for setting in ("tcp_keepalives_interval = 5", "tcp_keepalives_count = 3"):
        connection.execute(sqlalchemy.text(f"SET {setting}"))
    query = sqlalchemy.text("SELECT pg_try_advisory_lock(hashtextextended(:run_id, 0))")
    if connection.scalar(query, {"run_id": run_id}):
        return connection
    connection.close()
    return None


# ---------------------------------------------------------------- output


def print_run(run: ResearchRun) -> None:
    """Print the report, where each step's result came from, and what checkpoints saved."""
    print_line("")
    for name, value in run.report:
        text = "; ".join(value) if isinstance(value, list) else str(value)
        print_line(textwrap.fill(f"{name:<24}{text}", 80, subsequent_indent=" " * 24))
    print_line(
        f"\n{'step':<31}{'this time':<11}{'attempts':>8}{'seconds':>9}{'tokens':>8}{'US$':>10}"
    )
    requests, tokens, seconds = 0, 0, 0.0
    for step in run.steps:
        number = step["function_id"]
        took = ((step["completed_at_epoch_ms"] or 0) - (step["started_at_epoch_ms"] or 0)) / 1000
        answer = step["output"] if isinstance(step["output"], ai.ModelResponse) else None
        name = "model request" if is_model_step(step) else step["function_name"]
        line = f"{number:>2}  {name:<27}{'ran' if number in run.attempts else 'restored':<11}"
        line += f"{run.attempts.get(number, ''):>8}{took:>9.1f}"
        line += f"{answer.usage.total_tokens if answer else '':>8}{price(answer):>10}"
        print_line(line.rstrip())
        if number not in run.attempts:
            requests += is_model_step(step)
            tokens += answer.usage.total_tokens if answer else 0
            seconds += took
    print_line(
        f"Saved by checkpoints: model requests {requests}, tokens {tokens}, seconds {seconds:.1f}"
    )


def is_model_step(step: StepInfo) -> bool:
    """Tell a model request from a tool call."""
    return step["function_name"].startswith(f"{AGENT_NAME}__model")


def price(answer: ai.ModelResponse | None) -> str:
    """Return the price of an answer in US dollars, by genai-prices, or "" where it knows none."""
    try:
        return f"{answer.cost().total_price:.5f}" if answer else ""
    except (LookupError, ValueError):
        return ""


def print_runs(limit: int = 50) -> None:
    """Print the newest runs."""
    runs = DBOS.list_workflows(
        application_name=APP_NAME, sort_desc=True, limit=limit + 1, load_input=False
    )
    for run in runs[:limit]:
        steps = len(finished(DBOS.list_workflow_steps(run.workflow_id)))
        when = datetime.fromtimestamp((run.created_at or 0) / 1000).strftime("%Y-%m-%d %H:%M")
        company = (run.attributes or {}).get("company")
        print_line(f"{when}  {run.status[:9]:<9}{steps:>3} steps  {company}"[:80])
        print_line(f"    {run.workflow_id}")
    if len(runs) > limit:
        print_line(f"These are the {limit} newest; there are more.")
    if not runs:
        print_line("No runs are stored in this database.")


def end_by_interruption(run_id: str | None) -> NoReturn:
    """Say what is stored after Ctrl-C, and end this process at once."""
    counted: list[int] = []

    def count() -> None:
        if run_id is not None:
            counted.append(len(finished(DBOS.list_workflow_steps(run_id))))

    # In a daemon thread, because the database may be what hangs.
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    thread.join(timeout=2)
    saved = f"{counted[0]} finished steps are stored" if counted else "what finished is stored"
    print(f"\nInterrupted: {saved}. Run the same command to resume.", file=sys.stderr, flush=True)
    os._exit(130)  # before a thread of DBOS begins another step


def describe(error: object) -> str:
    """Describe an error in one line."""
    if not isinstance(error, BaseException):
        return "an error that can no longer be read"
    if isinstance(error, dbos_error.DBOSMaxStepRetriesExceeded):
        return (
            f"{error.step_name} failed {error.max_retries} times, last {describe(error.errors[-1])}"
        )
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def database_error(settings: Settings, error: Exception) -> ResearchError:
    """Describe a database error without the URL, which may hold a password."""
    reason = textwrap.shorten(str(getattr(error, "orig", error)), 200)
    return ResearchError(
        f"the database ({settings.database_label}) cannot be used: {reason}\n"
        "Fix it or its URL, and run the same command again: what finished is stored."
    )


def wrap(text: str) -> str:
    """Fold a paragraph to the 80 columns of a terminal."""
    return textwrap.fill(text, 80, break_on_hyphens=False)


# ---------------------------------------------------------------- the command line


def main() -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        description="Research a company with an agent that survives being killed.",
        epilog="Exit codes: 0 finished; 1 the run failed, run again to resume; 2 bad usage, "
        "configuration or database; 130 interrupted by Ctrl-C.",
    )
    parser.add_argument("company", nargs="?", default="Quantum Compute Corp")
    parser.add_argument("--bucket", default="", help="any text: a new one is a new run")
    parser.add_argument("--run-id", help="the run's ID, instead of the derived one")
    parser.add_argument("--crash", action="store_true", help="die by SIGKILL in the flaky tool")
    parser.add_argument("--list", action="store_true", help="list the stored runs")
    parser.add_argument("--verbose", action="store_true", help="show DBOS's log and tracebacks")
    options = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name must not fail a run by being printed
            stream.reconfigure(errors="backslashreplace")
    run_id = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        settings = load_settings()
        request = settings.request(options.company, options.bucket)
        if options.run_id is not None:
            options.run_id = clean_text("the run ID", options.run_id)
        if settings.pooled_host:
            direct = settings.pooled_host.replace("-pooler", "")
            print(f"warning: DBOS needs Neon's direct host, {direct}", file=sys.stderr)
        if options.list:
            launch(replace(settings, model="offline"), verbose=options.verbose)
            print_runs()
            return 0
        agent = launch(settings, verbose=options.verbose)
        tools.service.crash = options.crash
        run_id = options.run_id or derive_run_id(request)
        print_run(asyncio.run(research(agent, settings, request, run_id)))
        if options.crash:
            print_line("--crash found nothing to kill: fetch_financial_metrics did not run after")
            print_line("fetch_company_overview in this process.")
        # It exists if the run was resumed. A process that fails or dies leaves one row behind.
        DBOS.delete_queue(DBOS.executor_id)
    except (ResearchError, *DATABASE_ERRORS) as error:
        if options.verbose:
            traceback.print_exc()
        if not isinstance(error, ResearchError):
            error = database_error(settings, error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        end_by_interruption(run_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
