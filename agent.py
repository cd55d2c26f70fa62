"""A research agent that survives being killed: run it, kill it, run it again.

    uv run agent.py                    # research the default company
    uv run agent.py "Acme" --crash     # die by SIGKILL in the middle of the flaky tool
    uv run agent.py "Acme"             # the same run resumes after its last checkpoint
    uv run agent.py --list             # what is stored

The promise: run the same command again, whatever happened, and the same run moves on to its end;
a step that finished is never repeated. `research()` keeps it, and is the function to read first.
"""

import gc
import os
import signal


def end_by_ctrl_c(*_: object) -> None:
    """Say that nothing is lost, and end before a thread of DBOS begins another step."""
    os.write(2, b"\nInterrupted: what finished is stored. Run the same command to resume.\n")
    os._exit(130)


if __name__ == "__main__":  # before the imports, which take a second
    signal.signal(signal.SIGINT, end_by_ctrl_c)
    gc.disable()  # to look for garbage while importing takes 0.1 s

import argparse
import asyncio
import hashlib
import io
import json
import logging
import shlex
import shutil
import socket
import sqlite3
import sys
import textwrap
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
)
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, cast

import sqlalchemy
from dbos import (
    DBOS,
    DBOSClient,
    EnqueueOptions,
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
WORKFLOW_NAME = f"{AGENT_NAME}.run"  # by DBOSAgent
RELOCK = 5  # seconds; in which a process takes its lock again after Postgres was restarted
GRACE = 8  # seconds; a container platform kills ten seconds after SIGTERM, or later
USAGE_LIMITS = UsageLimits(request_limit=12)  # a model that loops costs money
Workflow = Callable[..., Coroutine[Any, Any, AgentRunResult[tools.ResearchReport]]]
Handle = WorkflowHandleAsync[AgentRunResult[tools.ResearchReport]]


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


def build_workflow(model: Model) -> Workflow:
    """Build the durable agent, and return its workflow: each model request in it is a step."""
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
        durable_agent: DBOSAgent[None, tools.ResearchReport] = DBOSAgent(
            agent,
            event_stream_handler=narrate_answer,
            model_step_config=cast(StepConfig, MODEL_STEP),
            # One tool at a time, so that steps finish in the order of their numbers. Resuming a
            # failed run deletes the failed step *and every step with a higher number*; with tools
            # in parallel, one of those could have finished.
            parallel_execution_mode="sequential",
        )
    return durable_agent.dbos_wrapped_run_workflow  # what `await durable_agent.run(...)` executes


@dataclass(frozen=True)
class Executor:
    """This process, as DBOS sees it: what it executes, and from which queue."""

    settings: Settings
    workflow: Workflow
    queue: str
    lock: AbstractContextManager[Any]
    """Held until this process dies, however it dies. So other processes can tell that it lives."""


def launch(
    settings: Settings,
    *,
    queue: str | None = None,
    concurrency: int | None = None,
    name: str | None = None,
    verbose: bool = False,
) -> Executor:
    """Start DBOS. Call it once in a process.

    Args:
        settings: From `load_settings()`.
        queue: The queue to take runs from. By default it is one that no other process takes from.
        concurrency: The number of runs from the queue that each process may execute at once. DBOS
            stores it with the queue. None leaves it as it is, which is 10 at first.
        name: The DBOS executor ID, under which a worker that is started again resumes its runs. It
            needs a queue: other processes would take part in resuming runs that have none.
        verbose: Whether DBOS writes its own log to stderr.

    Raises:
        ResearchError: The model or the database cannot be used, or a live process has this name.
    """
    if name is not None and queue is None:
        raise ValueError("a name needs a queue")
    tools.service.failure_rate, tools.service.latency = settings.failure_rate, settings.latency
    if settings.tracing:
        trace_to_logfire()
    # All workflows and steps must exist before DBOS is launched.
    workflow = build_workflow(build_model(settings.model))
    # At launch, DBOS resumes every unfinished run that carries this process's executor ID. By
    # default each process has the ID "local", and so would resume other people's runs, even runs
    # that are live in another process. A unique ID matches none.
    executor_id = name or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    if sqlite3.sqlite_version_info < (3, 42):
        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _add_unixepoch)
    url = settings.database_url.render_as_string(hide_password=False)
    try:
        DBOS(
            config={
                "name": APP_NAME,
                "application_version": APP_VERSION,
                "executor_id": executor_id,
                "system_database_url": url,
                "log_level": "INFO" if verbose else "WARNING",
                "console_log_level": "INFO" if verbose else "CRITICAL",
            }
        )
        # Without this, DBOS executes runs of every queue, and other processes execute ours.
        DBOS.listen_queues([queue or executor_id])
        logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # what it ignores, at Ctrl-C
        logging.getLogger("dbos").addFilter(partial(watch_log, settings))
        if queue is None:
            DBOS.launch()
            lock = hold_name(settings, executor_id)
        else:
            # DBOS takes the first runs as soon as it is launched, so first of all: that the
            # database exists, that no live process has this name, and how many runs to take.
            DBOS.migrate(url)
            with recovery_lock(settings):  # or else is_alive() might hold this lock, for a moment
                lock = hold_name(settings, executor_id)
            client = DBOSClient(system_database_url=url, application_name=APP_NAME)
            client.register_queue(
                queue,
                worker_concurrency=concurrency or 10,
                polling_interval_sec=0.1,
                on_conflict="always_update" if concurrency else "never_update",
            )
            client.destroy()
            DBOS.launch()
    except (*DATABASE_ERRORS, OSError, ValueError, TypeError) as error:
        raise database_error(settings, error) from error
    return Executor(settings, workflow, queue or executor_id, lock)


def trace_to_logfire() -> None:
    """Send Pydantic AI's spans to Logfire; raise `ResearchError` if it is not installed."""
    try:
        import logfire
    except ImportError:
        raise ResearchError(
            "LOGFIRE_TOKEN is set, but Logfire is not installed: uv sync --extra logfire"
        ) from None
    # DBOS can trace the same workflows and steps, which would double the spans. It does so only if
    # its config has `enable_otlp`, so leave that out.
    logfire.configure(service_name=APP_NAME, console=False)
    logfire.instrument_pydantic_ai()


def watch_log(settings: Settings, record: logging.LogRecord) -> bool:
    """Tell what DBOS 3.4 would leave unsaid. As a filter of its log, it lets everything pass."""
    error = record.exc_info and record.exc_info[1]
    if record.getMessage().startswith("Database connection failed"):
        print_line("  the database does not answer: waiting for it to come back")
    elif isinstance(error, DATABASE_ERRORS):
        # DBOS could not store how a run ended, and executes it no more. While this process lives,
        # everybody would wait for it.
        print(f"error: {database_error(settings, error)}", file=sys.stderr, flush=True)
        os._exit(2)
    return True


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
    attempts: dict[int | None, int]
    """Step ID to attempts in this process. Steps that are missing here were restored."""


async def research(
    executor: Executor, request: ResearchRequest, run_id: str | None = None
) -> ResearchRun:
    """Bring the run of this request to its end, whatever state it is found in.

    In a service of your own, call `executor = launch(settings)` once, and then, as often as you
    like but from one event loop, `run = await research(executor, settings.request("Acme"))`.
    A caller that is cancelled stops waiting; the run goes on.

    Args:
        executor: From `launch()`.
        request: From `settings.request()`.
        run_id: The DBOS workflow ID, if not the one derived from the request.

    Raises:
        ResearchError: The ID is taken by another request, or by another version of the app.
        RunFailed: The run failed. Call again to resume it from the failed step.
    """
    run_id = run_id or derive_run_id(request)
    told = ""

    def tell(state: str) -> None:
        nonlocal told
        if state != told:
            where = f"Model: {request.model}. Database: {executor.settings.database_label}."
            print_line(wrap(f"Run {run_id}: {state}. {where}"))
        if not told and request.model == "offline":
            print_line("(A script stands in for the model. To use a real one, see .env.example.)")
        told = state

    try:
        handle = await start(executor, request, run_id)
        if handle is not None:
            tell("new")
        while handle is None:
            handle = await move_on(executor, request, run_id, tell)
        result = await handle.get_result(polling_interval_sec=0.05)
        return ResearchRun(run_id, result.output, tools.attempts.pop(run_id, {}))
    except ResearchError:
        raise
    except DATABASE_ERRORS as error:
        raise database_error(executor.settings, error) from error
    except Exception as error:
        raise RunFailed(
            f"the run failed: {describe(error)}\n"
            "Finished steps are stored. Run the same command to resume from the failed one."
        ) from error
    finally:
        tools.attempts.pop(run_id, None)


async def start(executor: Executor, request: ResearchRequest, run_id: str) -> Handle | None:
    """Start the run, unless it is stored already."""
    try:
        # Of two processes only one can store a new run: DBOS rejects an ID that is in use.
        with (
            SetWorkflowID(run_id, workflow_id_reuse_policy="reject"),
            SetWorkflowAttributes(request.attributes),
        ):
            return await DBOS.start_workflow_async(
                executor.workflow, request.prompt, deps=None, usage_limits=USAGE_LIMITS
            )
    except dbos_error.DBOSWorkflowIDInUseError:
        return None


async def move_on(
    executor: Executor, request: ResearchRequest, run_id: str, tell: Callable[[str], None]
) -> Handle | None:
    """Resume or replay a stored run; return None while another live process executes it."""
    stored = await DBOS.get_workflow_status_async(run_id)
    if stored is None:  # somebody has deleted it
        return await start(executor, request, run_id)
    if stored.status == "SUCCESS":
        refuse_if_unfit(stored, await DBOS.list_workflow_steps_async(run_id), request)
        tell("finished earlier, so its stored report is replayed")
    elif await asyncio.to_thread(resume, executor, request, run_id, tell):
        await asyncio.sleep(0.5)  # before the caller looks again
        return None
    return await DBOS.retrieve_workflow_async(run_id)


def resume(
    executor: Executor, request: ResearchRequest, run_id: str, tell: Callable[[str], None]
) -> str | None:
    """Resume an unfinished or failed run, through the queue of this process.

    Returns:
        The executor ID of the live process that executes the run; then nothing is done.
    """
    # Only one process at a time may find that the one which executed a run has died.
    with recovery_lock(executor.settings):
        stored, steps = DBOS.get_workflow_status(run_id), DBOS.list_workflow_steps(run_id)
        if stored is None or stored.status == "SUCCESS":
            return None
        refuse_if_unfit(stored, steps, request)
        owner = owner_of(stored)
        if owner in (executor.queue, DBOS.executor_id):
            return None
        if owner is not None and is_alive(executor.settings, owner):
            tell(f"being executed by {owner}. This process waits for it and executes nothing")
            return owner
        # Runs that are resumed without a queue go to one that every process takes from.
        queue = DBOS.register_queue(
            executor.queue, polling_interval_sec=0.05, on_conflict="never_update"
        ).name
        if failure := find_failure(stored, steps):
            # Resuming a failed run only raises its stored error again. Rewinding deletes the failed
            # step and then resumes. It requires a run that has ended, and this one may have died
            # before its end was stored: so cancel it first.
            step, error = failure
            tell(f"failed at step {step} ({describe(error)}), resumes there")
            DBOS.cancel_workflow(run_id)
            DBOS.rewind_workflow(run_id, start_step=step, queue_name=queue)
        else:
            ended = stored.status in ("CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
            state = stored.status.lower().replace("_", " ") if ended else "interrupted"
            tell(f"{state}, resumes after {count_finished(steps)}")
            DBOS.resume_workflow(run_id, queue_name=queue)
    return None


def owner_of(stored: WorkflowStatus) -> str | None:
    """Return the executor ID of the process that executes an unfinished run, if it is alive."""
    # A queue that only one process takes from has the name of its executor ID.
    return {"PENDING": stored.executor_id, "ENQUEUED": stored.queue_name}.get(stored.status)


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
    stored: WorkflowStatus, steps: list[StepInfo]
) -> tuple[int, Exception | None] | None:
    """Return the ID of the step from which a failed run must resume, and the error."""
    for step in steps:
        # A ModelRetry is not a failure: it went back to the model, which has dealt with it.
        if step["error"] is not None and not isinstance(step["error"], ModelRetry):
            return step["function_id"], step["error"]
    if stored.status != "ERROR":
        return None
    # No step failed. If the run gave up on the model's answers, ask the model again: its last
    # answer, and what that led to, is dropped. If the run failed between steps, for example
    # because the disk was full, keep them all.
    if isinstance(stored.error, ai_error.AgentRunError):
        asked = [step["function_id"] for step in steps if is_model_step(step)]
        return max(asked, default=1), stored.error
    return max((step["function_id"] for step in steps), default=0) + 1, stored.error


def count_finished(steps: list[StepInfo]) -> str:
    """Say how many steps are stored that did not fail."""
    count = sum(step["error"] is None for step in steps)
    return f"{count} finished step{'' if count == 1 else 's'}"


def is_alive(settings: Settings, executor_id: str) -> bool:
    """Tell whether a live process has this executor ID."""
    lock = try_lock(settings, executor_id)
    if lock is None:
        return True
    with lock:
        if not isinstance(lock, sqlalchemy.Connection):
            return False
        # Live processes have not taken their locks again, if the server was just restarted.
        uptime = "extract(epoch FROM now() - pg_postmaster_start_time())"
        return bool(lock.exec_driver_sql(f"SELECT {uptime} < {RELOCK}").scalar())


def hold_name(settings: Settings, executor_id: str) -> AbstractContextManager[Any]:
    """Return the lock by which other processes see that this one is alive."""
    lock = try_lock(settings, executor_id)
    if lock is None:
        raise ResearchError(f"a worker named {executor_id} is alive: choose another name.")
    if isinstance(lock, sqlalchemy.Connection):
        threading.Thread(target=keep, args=(settings, executor_id, lock), daemon=True).start()
    return lock


def keep(settings: Settings, executor_id: str, lock: sqlalchemy.Connection) -> None:
    """Take the lock again when its connection is lost, for example as the server restarts."""
    while True:
        time.sleep(1)
        try:
            lock.exec_driver_sql("SELECT 1")
        except sqlalchemy.exc.SQLAlchemyError:
            # Under the recovery lock, or else is_alive() might hold this one for a moment.
            with suppress(sqlalchemy.exc.SQLAlchemyError), recovery_lock(settings):
                again = try_lock(settings, executor_id)
                if not isinstance(again, sqlalchemy.Connection):
                    print("error: another process has taken this name over", file=sys.stderr)
                    os._exit(2)
                lock = again


@contextmanager
def recovery_lock(settings: Settings) -> Iterator[None]:
    """Let one process at a time look which processes have died, and resume their runs."""
    looks = 0
    while (lock := try_lock(settings, "recovery")) is None:
        time.sleep(0.05)
        looks += 1
        if looks == 60:
            print_line("Waiting for another process, which is starting or resuming runs.")
    with lock:
        yield


def try_lock(settings: Settings, name: str) -> AbstractContextManager[Any] | None:
    """Return the lock of that name, taken, or None if a live process has it.

    The operating system or the database releases it when its process dies, however it dies.
    """
    url = settings.database_url
    key = f"{APP_NAME}:{APP_VERSION}:{name}"  # DBOS resumes the runs of its own version only
    if url.drivername == "sqlite":
        file = f"{url.database}.locks/{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        try:
            return FileLock(file, thread_local=False).acquire(timeout=0)
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
    connection.exec_driver_sql(
        "SET idle_session_timeout = 0; SET tcp_keepalives_idle = 15;"
        "SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"
    )
    query = sqlalchemy.text("SELECT pg_try_advisory_lock(hashtextextended(:key, 0))")
    if connection.scalar(query, {"key": key}):
        return connection
    connection.close()
    return None


# ---------------------------------------------------------------- many runs


Outcome = WorkflowStatus | ResearchError
"""How one of many runs ended: as DBOS stores it, or why it cannot be resumed."""


async def research_many(
    executor: Executor, requests: dict[str, ResearchRequest], show: Callable[[str], None]
) -> dict[str, Outcome]:
    """Bring many runs to their ends. All processes on the queue share the work.

    Args:
        executor: From `launch(queue=...)`.
        requests: Run ID to request.
        show: Called with a line of progress whenever it changes.

    Returns:
        Run ID to outcome. A run that fails does not stop the others.
    """
    known = {stored.workflow_id async for stored in stored_runs(list(requests))}
    new = {run_id: request for run_id, request in requests.items() if run_id not in known}
    await asyncio.to_thread(enqueue, executor, new)
    outcomes: dict[str, Outcome] = {}
    first_look, shown, last = True, "", ""
    while True:
        live: set[str | None] = {executor.queue, DBOS.executor_id}
        running = 0
        async for stored in stored_runs([run_id for run_id in requests if run_id not in outcomes]):
            run_id, owner = stored.workflow_id, owner_of(stored)
            if stored.status == "SUCCESS" or (owner is None and not first_look):
                outcomes[run_id] = stored
                last = f"; last: {requests[run_id].company}"
            elif owner not in live or stored.app_version != APP_VERSION:
                # It failed earlier, or its process may have died, or it must be refused.
                move = partial(resume, executor, requests[run_id], run_id, tell=lambda _: None)
                try:
                    live |= {await asyncio.to_thread(move)} - {None}
                except ResearchError as error:
                    outcomes[run_id] = error
            running += stored.status == "PENDING" and run_id not in outcomes
        failed = sum(not succeeded(outcome) for outcome in outcomes.values())
        line = f"{len(outcomes) - failed} done, {running} running, "
        line += f"{len(requests) - len(outcomes) - running} waiting, {failed} failed{last}"
        if line != shown:
            show(line)
        if len(outcomes) == len(requests):
            return outcomes
        first_look, shown = False, line
        await asyncio.sleep(0.5 + len(requests) / 1000)  # looking at many takes longer


async def stored_runs(run_ids: list[str]) -> AsyncIterator[WorkflowStatus]:
    """Read what is stored of these runs, some at a time and without their inputs and results."""
    for start in range(0, len(run_ids), 200):
        for stored in await DBOS.list_workflows_async(
            workflow_ids=run_ids[start : start + 200], load_input=False, load_output=False
        ):
            yield stored


def enqueue(executor: Executor, requests: dict[str, ResearchRequest]) -> None:
    """Enqueue these runs in one transaction: all of them, or after an error none."""
    url = executor.settings.database_url
    patience = {"timeout": 30} if url.drivername == "sqlite" else {}  # other processes write too
    engine = sqlalchemy.create_engine(url, connect_args=patience)
    client = DBOSClient(system_database_engine=engine, application_name=APP_NAME)
    # Without the lock, two processes that insert the same runs could wait for each other for ever.
    with recovery_lock(executor.settings), engine.begin() as transaction:
        for run_id, request in requests.items():
            options: EnqueueOptions = {
                "workflow_name": WORKFLOW_NAME,
                "workflow_id": run_id,
                "queue_name": executor.queue,
                "app_version": APP_VERSION,
                "attributes": request.attributes,
            }
            inputs = {"deps": None, "usage_limits": USAGE_LIMITS}
            client.enqueue_in_transaction(transaction, options, request.prompt, **inputs)
    engine.dispose()


def succeeded(outcome: Outcome) -> bool:
    """Tell whether the run has a report."""
    return isinstance(outcome, WorkflowStatus) and outcome.status == "SUCCESS"


def work(executor: Executor) -> None:
    """Execute runs from the queue until SIGTERM arrives."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    where = f"Database: {executor.settings.database_label}."
    print_line(wrap(f"Worker {DBOS.executor_id} serves the queue {executor.queue}. {where}"))
    while not stop.wait(timeout=1):  # without it, a signal just before the wait would go unnoticed
        pass
    print_line("Asked to stop: taking no more runs, and finishing what has begun.")
    # Whatever blocks, a step or a thread that waits for the database, this process ends in time.
    end = threading.Timer(GRACE + 1, os._exit, [0])
    end.daemon = True
    end.start()


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
    for step in DBOS.list_workflow_steps(run.run_id):
        if step["function_name"].endswith("__event_stream_handler"):
            continue  # DBOSDurability stores these beside the model requests and tool calls
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
    saved = f"model requests {requests}, tokens {tokens}, seconds {seconds:.1f}"
    # The first step is a model request, so without one nothing was restored.
    print_line(f"Saved by checkpoints: {saved if requests else 'nothing, every step ran'}")


def is_model_step(step: StepInfo) -> bool:
    """Tell a model request from a tool call."""
    return step["function_name"].startswith(f"{AGENT_NAME}__model")


def price(answer: ai.ModelResponse | None) -> str:
    """Return the price of an answer in US dollars, by genai-prices, or "" where it knows none."""
    try:
        return f"{answer.cost().total_price:.5f}" if answer else ""
    except (LookupError, ValueError):
        return ""


def print_runs(limit: int) -> None:
    """Print the newest runs."""
    runs = DBOS.list_workflows(
        application_name=APP_NAME, sort_desc=True, limit=limit + 1, load_input=False
    )
    for run in runs[:limit]:
        steps = count_finished(DBOS.list_workflow_steps(run.workflow_id))
        when = datetime.fromtimestamp((run.created_at or 0) / 1000).strftime("%Y-%m-%d %H:%M")
        company = (run.attributes or {}).get("company")
        print_line(f"{when}  {run.status[:9]:<11}{steps}  {company}"[:80])
        print_line(f"    {run.workflow_id}")
    if len(runs) > limit:
        print_line(f"These are the {limit} newest; --list {limit * 10} shows more.")
    if not runs:
        print_line("No runs are stored in this database.")


def show_progress(line: str) -> None:
    """Print a line of progress: on a terminal over the one before it, elsewhere below it."""
    if sys.stdout and sys.stdout.isatty():
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    else:
        print_line(line)


def print_outcomes(requests: dict[str, ResearchRequest], outcomes: dict[str, Outcome]) -> None:
    """Print how each run ended, and how to resume those that failed."""
    print_line(f"\n{'company':<45}{'status':<16}{'seconds':>9}{'attempts':>10}")
    for run_id, request in requests.items():
        outcome = outcomes[run_id]
        status, seconds, attempts = "REFUSED", 0.0, 0
        if isinstance(outcome, WorkflowStatus):
            status, attempts = outcome.status, outcome.recovery_attempts or 0
            began = outcome.dequeued_at or outcome.created_at or 0
            seconds = ((outcome.completed_at or began) - began) / 1000
        print_line(f"{request.company[:43]:<45}{status[:15]:<16}{seconds:>9.1f}{attempts:>10}")
    for run_id, request in requests.items():
        outcome = outcomes[run_id]
        if isinstance(outcome, ResearchError):
            print_line(f"\n{wrap(f'{request.company}: {outcome}')}")
        elif not succeeded(outcome):
            stored = DBOS.get_workflow_status(run_id)  # the outcome was read without its error
            reason = describe(stored.error) if stored and stored.error else outcome.status.lower()
            print_line(f"\n{wrap(f'{request.company}: {reason}')}")
            words = ["--bucket", request.bucket] if request.bucket else []
            words += ["--", request.company] if request.company[0] == "-" else [request.company]
            print_line(f"  resume it: uv run agent.py {shlex.join(words)}")


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
        description="Research companies with an agent that survives being killed.",
        epilog="Exit codes: 0 finished; 1 a run failed, run again to resume; 2 bad usage, "
        "configuration or database; 130 interrupted by Ctrl-C.",
    )
    add = parser.add_argument
    add("company", nargs="*", help='"-": read one a line; default: Quantum Compute Corp')
    add("--bucket", default="", help="any text: a new one is a new run")
    add("--run-id", help="the run's ID, instead of the derived one")
    add("--crash", action="store_true", help="die by SIGKILL in the flaky tool")
    add(
        "--worker", nargs="?", const=socket.gethostname(), metavar="NAME", help="run what is queued"
    )
    add("--concurrency", type=int, metavar="N", help="queued runs at once in each process (10)")
    add("--list", nargs="?", type=int, const=50, metavar="N", help="list the N (50) newest runs")
    add("--verbose", action="store_true", help="show DBOS's log and tracebacks")
    options = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name must not fail a run by being printed
            stream.reconfigure(errors="backslashreplace")
    try:
        settings = load_settings()
        names = options.company or ["Quantum Compute Corp"]
        if options.worker is not None and options.company:
            raise ResearchError("--worker takes its runs from the queue: leave out the companies.")
        requests = settings.requests(names, options.bucket)
        if options.run_id is not None and len(requests) == 1:
            requests = {clean_text("the run ID", options.run_id): requests.popitem()[1]}
        elif options.run_id is not None:
            raise ResearchError("--run-id is for one company.")
        if options.concurrency is not None and not 0 < options.concurrency <= 1000:
            raise ResearchError("--concurrency takes a number from 1 to 1000.")
        if options.list is not None and not 0 < options.list <= 1_000_000:
            raise ResearchError("--list takes a number from 1 to 1000000.")
        if settings.pooled_host:
            direct = settings.pooled_host.replace("-pooler", "")
            print(f"warning: DBOS needs Neon's direct host, {direct}", file=sys.stderr)
        tools.service.crash = options.crash
        if options.list is not None:
            launch(replace(settings, model="offline"), verbose=options.verbose)
            print_runs(options.list)
            return 0
        if options.worker is not None or len(requests) > 1:
            return run_queue(settings, options, requests)
        [(run_id, request)] = requests.items()
        executor = launch(settings, verbose=options.verbose)
        print_run(asyncio.run(research(executor, request, run_id)))
        if options.crash:
            print_line("--crash found nothing to kill: fetch_financial_metrics did not run after")
            print_line("fetch_company_overview in this process.")
        # It exists if the run was resumed. A process that fails or dies leaves one row behind.
        DBOS.delete_queue(executor.queue)
    except (ResearchError, *DATABASE_ERRORS) as error:
        if options.verbose:
            traceback.print_exc()
        if not isinstance(error, ResearchError):
            error = database_error(settings, error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run_queue(
    settings: Settings, options: argparse.Namespace, requests: dict[str, ResearchRequest]
) -> int:
    """Execute runs from the shared queue: these, or as a worker whatever there is."""
    is_worker = options.worker is not None
    tools.narration = "of many" if is_worker else "off"
    name = clean_text("the worker's name", options.worker) if is_worker else None
    executor = launch(
        settings,
        queue=settings.queue,
        concurrency=options.concurrency,
        name=name,
        verbose=options.verbose,
    )
    outcomes: dict[str, Outcome] = {}
    if is_worker:
        work(executor)
    else:
        outcomes = asyncio.run(research_many(executor, requests, show_progress))
        print_outcomes(requests, outcomes)
    # This process may be executing runs that others have asked for. What is left after these
    # seconds is resumed from its last checkpoint, a worker's when it is started again.
    DBOS.destroy(workflow_completion_timeout_sec=GRACE)
    return int(not all(succeeded(outcome) for outcome in outcomes.values()))


if __name__ == "__main__":
    gc.freeze()  # nor look through the imports later: at exit that takes 0.3 s
    gc.enable()
    sys.exit(main())
