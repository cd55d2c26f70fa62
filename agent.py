"""A research agent that survives being killed: run it, kill it, run it again.

    uv run agent.py                    # research the default company
    uv run agent.py "Acme" --crash     # die by SIGKILL in the middle of the flaky tool
    uv run agent.py "Acme"             # the same run resumes after its last checkpoint
    uv run agent.py --list             # what is stored

The promise: run the same command again, whatever happened, and the same run moves on to its end;
a step that finished is never repeated.

Read this file from the top. `build_agent()` makes an agent durable. `decide()` keeps the promise:
it looks in which state a run is, and brings it on its way. An `Executor` is a process that executes
runs. `research()` uses all three until the runs have ended. The rest is for many companies, for
what people see, and for the command line.
"""

import argparse
import gc
import io
import logging
import os
import shlex
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any, cast

import sqlalchemy
from dbos import DBOS, EnqueueOptions, SetWorkflowID, StepInfo, WorkflowStatus
from dbos import error as dbos_error
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_ai import Agent, ModelRetry, ModelSettings, RunUsage, UsageLimits
from pydantic_ai import exceptions as ai_error
from pydantic_ai import messages as ai
from pydantic_ai.durable_exec.dbos import DBOSAgent, StepConfig
from pydantic_ai.models import Model
from pydantic_ai.models.wrapper import WrapperModel
from wcwidth import clip, ljust, wrap

import config
import tools
from config import APP_VERSION, ResearchError, ResearchRequest, Settings
from tools import print_in_step, print_line, progress

# ---------------------------------------------------------------- 1. the durable agent

AGENT_NAME = "research_agent"
WORKFLOW_NAME = f"{AGENT_NAME}.run"  # DBOSAgent registers its workflow under this name

# Which failures of a model request may be gone at the next attempt, and which will not be. DBOSAgent
# passes all these options to @DBOS.step, although its StepConfig type lists only some.
MODEL_STEP: dict[str, Any] = {"timeout_seconds": 90} | tools.retry(
    passing=(
        ai_error.ModelAPIError,  # a rate limit, an overload, a cut connection, a broken answer
        ai_error.UnexpectedModelBehavior,  # an answer that holds nothing usable
        AttributeError, LookupError, TypeError,  # what clients raise on answers of another shape
        dbos_error.DBOSStepTimeoutError,
    ),
    lasting=(
        ai_error.ModelRequestRejectedError,  # a bad request, a refused key, an unknown model
        ai_error.ModelQuotaExceededError,
        ai_error.ContentFilterError,
        ai_error.OutputTokenLimitExceeded,
    ),
    attempts=4, first_wait=1, backoff=2,
)  # fmt: skip


def build_agent(settings: Settings) -> DBOSAgent[None, tools.ResearchReport]:
    """Build the durable agent: each model request and each tool call of its runs is a DBOS step."""
    agent = Agent(
        ModelInStep(config.build_model(settings.model), settings.cost_limit),
        name=AGENT_NAME,
        instructions=tools.INSTRUCTIONS,
        output_type=tools.ResearchReport,
        tools=tools.TOOLS,
        retries=2,  # how often a bad answer or tool call goes back to the model
        # DBOS retries. Most providers' clients do too, and the attempts would multiply.
        model_settings=ModelSettings(max_retries=0),
    )
    with warnings.catch_warnings():
        # pydantic-ai 3 removes it; pyproject.toml excludes 3. The README shows how to migrate.
        warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")
        return DBOSAgent(
            agent,
            model_step_config=cast(StepConfig, MODEL_STEP),
            # One tool at a time, so that steps finish in the order of their numbers. Rewinding a
            # failed run deletes the failed step and every step with a higher number; with tools
            # in parallel, one of those could have finished.
            parallel_execution_mode="sequential",
        )


# ---------------------------------------------------------------- 2. the promise


@dataclass(frozen=True)
class Found:
    """In which state a run was found, and what is to be done about it."""

    state: str
    """For people."""
    finished: WorkflowStatus | None = None
    """The run, if it has its report already."""
    queued: bool = False
    """The run waits in the executor's queue, so that the executor must be launched."""
    owner: str | None = None
    """The executor ID of the live process that executes the run."""


def decide(executor: "Executor", request: ResearchRequest, run_id: str) -> Found:
    """Look in which state a run is, and put it into the executor's queue if there is work to do.

    Every run comes through here, of one company or of many, for a worker or for a web service. It
    takes only a `DBOSClient`: nothing is executed before `executor.launch()`.

    Raises:
        ResearchError: The run must not go on here, or the model cannot be used. Nothing is changed.
    """
    client, queue = executor.client, executor.queue
    seen = executor.look(run_id)
    if seen is None:
        executor.prepare()
        enqueue(executor, {run_id: request})
        return Found("new", queued=True)
    refuse_if_unfit(seen, request)
    if seen.status == "SUCCESS":
        return Found("finished earlier, so its stored report is replayed", finished=seen)
    # Each process that executes runs has a lock, named by its executor ID, until it dies. Whoever
    # can take that lock knows that the process is dead, and is the only one who decides about what
    # it has left, until the lock is free again. A run that no process executes has its own lock.
    with config.take_lock(executor.settings.database_url, lock_name(seen)) as taken:
        stored = executor.look(run_id)  # again: who had the lock before may have resumed the run
        if not taken or stored is None or lock_name(stored) != lock_name(seen):
            owner = seen.executor_id if seen.status == "PENDING" else "another process"
            told = f"being executed by {owner}. This process waits for it and executes nothing"
            return Found(told, owner=owner)
        steps = client.list_workflow_steps(run_id)
        refuse_if_unreadable(run_id, steps)
        executor.prepare()
        finished = count_finished(steps)
        match stored.status:
            case "SUCCESS":
                return Found("finished meanwhile", finished=stored)
            case _ if failure := find_failure(stored, steps):
                # Resuming a failed run only raises its stored error again. Rewinding deletes the
                # failed step first. It takes only runs that have ended, and a process may die
                # after a step has failed and before the end of its run is stored.
                client.cancel_workflow(run_id)
                client.rewind_workflow(run_id, start_step=failure.step, queue_name=queue)
                told = f"failed at step {failure.step} ({describe(failure.error)}), resumes there"
            case "ENQUEUED" if stored.queue_name == queue:
                # DBOS lets only one of the processes that listen to a queue take a run from it.
                told = f"queued, resumes after {finished}"
            case "PENDING" | "ENQUEUED":
                # Without a queue name it would go to a queue from which every process takes runs.
                client.resume_workflow(run_id, queue_name=queue)
                told = f"interrupted, resumes after {finished}"
            case status:  # CANCELLED, or MAX_RECOVERY_ATTEMPTS_EXCEEDED: DBOS has given it up
                client.resume_workflow(run_id, queue_name=queue)
                told = f"{status.lower().replace('_', ' ')}, resumes after {finished}"
        return Found(told, queued=True)


def lock_name(run: WorkflowStatus) -> str:
    """Return the name of the lock without which nobody decides about a stored run."""
    return f"{run.executor_id}" if run.status == "PENDING" else run.workflow_id


# ---------------------------------------------------------------- 3. the executor


class Executor:
    """This process, as DBOS sees it: once it is launched, it executes the runs of one queue."""

    def __init__(
        self, settings: Settings, queue: str, *, name: str = "", concurrency: int | None = None
    ) -> None:
        """Connect to the database; raise `ResearchError` if it cannot be used.

        Args:
            settings: From `load_settings()`.
            queue: The queue to take runs from. One that is named like a run has that run alone.
            name: The DBOS executor ID, under which a worker that is started again resumes its runs.
            concurrency: How many runs of the queue each process may execute at once. DBOS stores
                it with the queue. None leaves it as it is, which is 10 at first.
        """
        self.settings, self.queue, self.concurrency = settings, queue, concurrency
        # At launch, DBOS resumes every unfinished run that carries this process's executor ID. By
        # default each process has the ID "local", and so would resume other people's runs, even
        # runs that are live in another process. A unique ID matches none.
        self.id = name or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.client = config.open_database(settings)
        self.prepared = self.launched = False

    def prepare(self) -> None:
        """Build the agent; raise `ResearchError` if its model cannot be used."""
        if not self.prepared:
            build_agent(self.settings)
        self.prepared = True

    def launch(self) -> None:
        """Start to execute the runs of the queue; raise `ResearchError` if the name is in use."""
        if self.launched:
            return
        self.prepare()  # all workflows and steps must exist before DBOS is launched
        tools.service.failure_rate = self.settings.failure_rate
        tools.service.latency = self.settings.latency
        # Others must see that this process lives before it takes its first run.
        url = self.settings.database_url
        self.lock, engine_options = config.hold_lock(url, self.id)
        # DBOS serves at once a queue that is registered before the launch, and one that comes
        # later only after up to a second.
        self.client.register_queue(
            self.queue,
            worker_concurrency=self.concurrency or 10,
            polling_interval_sec=0.1,
            on_conflict="always_update" if self.concurrency else "never_update",
        )
        DBOS(
            config={
                "name": config.APP_NAME,
                "application_version": APP_VERSION,
                "executor_id": self.id,
                "system_database_url": url.render_as_string(hide_password=False),
                "db_engine_kwargs": engine_options,
                "run_migrations": False,  # open_database() has done it
            }
        )
        # Without this, DBOS takes runs from every queue, and other processes take ours.
        DBOS.listen_queues([self.queue])
        logging.getLogger("dbos").addFilter(partial(end_if_an_outcome_is_lost, self.settings))
        DBOS.launch()
        self.launched = True

    def look(self, run_id: str) -> WorkflowStatus | None:
        """Return what is stored of a run, with its result."""
        runs = self.client.list_workflows(workflow_ids=[run_id], load_input=False)
        return runs[0] if runs else None

    def look_at_many(self, run_ids: Iterable[str]) -> dict[str, WorkflowStatus]:
        """Return what is stored of these runs, without their inputs and results."""
        ids, runs = list(run_ids), []
        for start in range(0, len(ids), 200):
            runs += self.client.list_workflows(
                workflow_ids=ids[start : start + 200], load_input=False, load_output=False
            )
        return {run.workflow_id: run for run in runs}

    def works_on(self, run: WorkflowStatus) -> bool:
        """Tell whether this process executes the run, or will take it from its queue."""
        mine = {"PENDING": run.executor_id == self.id, "ENQUEUED": run.queue_name == self.queue}
        return self.launched and mine.get(run.status, False)


# ---------------------------------------------------------------- 4. research


class RunFailed(ResearchError):  # noqa: N818 - it reads as what happened
    """The run has no report. The same command resumes it."""

    exit_code = 1


Outcome = WorkflowStatus | ResearchError
"""How a run ended: as DBOS stores it, or why it cannot go on here."""
Show = Callable[[dict[str, Found], dict[str, WorkflowStatus], dict[str, Outcome]], None]
"""Called after each look: how each run was found, how it is stored now, and the outcomes so far."""


def research(
    executor: Executor, requests: dict[str, ResearchRequest], show: Show
) -> dict[str, Outcome]:
    """Bring runs to their ends, whatever states they are in. One that fails does not stop others.

    Args:
        executor: Its queue is named like the only run, or is the shared queue of many.
        requests: Run ID, from `derive_run_id()`, to request, from `settings.request()`.
        show: See `Show`.

    Returns:
        Run ID to outcome.
    """
    found: dict[str, Found] = {}
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < len(requests):
        stored = executor.look_at_many(requests.keys() - outcomes.keys())
        alive: set[str | None] = set()
        for run_id in requests.keys() - outcomes.keys():
            run = stored.get(run_id)
            try:
                if run_id in found and run is None:
                    raise RunFailed("it was deleted meanwhile. The same command starts it anew.")
                if run_id in found and run and run.status not in ("ENQUEUED", "PENDING"):
                    outcomes[run_id] = run
                elif run is None or not (executor.works_on(run) or run.executor_id in alive):
                    # It is new here, or its process has died, or it is about to be seen alive.
                    found[run_id] = decide(executor, requests[run_id], run_id)
                    alive |= {found[run_id].owner} - {None}
                    if finished := found[run_id].finished:
                        outcomes[run_id] = finished
            except ResearchError as error:
                outcomes[run_id] = error
        show(found, stored, outcomes)
        if any(run.queued for run in found.values()):
            executor.launch()
        waits = len(outcomes) < len(requests)
        quick = executor.launched and len(requests) == 1
        time.sleep(waits * (0.05 if quick else 0.5 + len(requests) / 1000))
    return outcomes


# ---------------------------------------------------------------- 5. what the lesson rests on


class ModelInStep(WrapperModel):
    """What happens inside each model step, and so does not happen again when a step is restored."""

    def __init__(self, wrapped: Model, cost_limit: float) -> None:
        """Wrap the model.

        Limits that are passed to a run are stored with it, so a run that has reached one could not
        go on after it was raised. These are the process's own.
        """
        super().__init__(wrapped)
        self.limits = UsageLimits(request_limit=12, cost_limit=Decimal(f"{cost_limit}"))

    async def request(
        self, messages: list[ai.ModelMessage], *settings_and_tools: Any
    ) -> ai.ModelResponse:
        """Ask the wrapped model, unless the run has cost too much already."""
        usage = RunUsage()
        for message in messages:
            if isinstance(message, ai.ModelResponse):
                usage += RunUsage(requests=1) + message.usage
        self.limits.check_before_request(usage)
        print_in_step(f"asks the model {self.model_name}")
        try:
            response = await super().request(messages, *settings_and_tools)
        except ai_error.ModelHTTPError as error:
            hide_key(error, self)
            raise
        for part in response.parts:
            if isinstance(part, ai.ToolCallPart):
                print_in_step(f"the model calls {part.tool_name}")
        return response


def hide_key(error: ai_error.ModelHTTPError, model: Model) -> None:
    """Take the API key out of an error, because DBOS stores errors, and providers may quote it."""
    key = getattr(getattr(model.provider, "client", None), "api_key", None)
    if isinstance(error, ai_error.ModelAuthenticationError):
        keys = [key for key, name in config.MODEL_BY_KEY.items() if name.startswith(model.system)]
        error.message = f"the provider refused the API key: check {' '.join(keys) or 'it'} in .env"
    elif key and f"{key}" in f"{error} {error.headers}":
        error.message = f"status {error.status_code}, with a text that quoted the API key"
    else:
        return
    error.body, error.headers, error.args, error.__cause__ = None, None, (error.message,), None


def enqueue(executor: Executor, requests: dict[str, ResearchRequest]) -> None:
    """Store new runs in the executor's queue: all of them, or after an error none.

    To store a run that is stored already changes nothing, so two processes may do it at once. Both
    go by the order of the IDs, or each could wait for a row that the other one has inserted.
    """
    engine = sqlalchemy.create_engine(executor.settings.database_url)
    with engine.begin() as transaction:
        for run_id, request in sorted(requests.items()):
            options: EnqueueOptions = {
                "workflow_name": WORKFLOW_NAME,
                "workflow_id": run_id,
                "queue_name": executor.queue,
                "app_version": APP_VERSION,
                "attributes": request.attributes,
            }
            # `deps` are stored as well. So there are none: a resumed run would get old ones back.
            executor.client.enqueue_in_transaction(transaction, options, request.prompt, deps=None)
    engine.dispose()


def refuse_if_unfit(stored: WorkflowStatus, request: ResearchRequest) -> None:
    """Raise `ResearchError` if a run answers another question, or would be waited for for ever."""
    asked = stored.attributes or {}
    if asked.get("request_id") != config.derive_run_id(request):
        # DBOS compares only the ID: it would return the answer to the other question.
        raise ResearchError(
            f"run {stored.workflow_id} is stored for another request: {asked.get('company')},"
            f" {asked.get('model')}, bucket {asked.get('bucket')!r}, or other instructions.\n"
            "Choose another --run-id, or leave it out."
        )
    if stored.app_version != APP_VERSION and stored.status != "SUCCESS":
        # DBOS would wait silently for a process of that version.
        raise ResearchError(
            f"run {stored.workflow_id} belongs to version {stored.app_version} of this app, which"
            f" is version {APP_VERSION}.\n"
            "Finish it with that version, or start a new run with another --bucket."
        )


def refuse_if_unreadable(run_id: str, steps: list[StepInfo]) -> None:
    """Raise `ResearchError` if the run would go on with a checkpoint that is not of today's type."""
    for step in steps:
        if step["error"] is None:
            name = "model request" if is_model_step(step) else step["function_name"]
            read_stored(run_id, name, step["output"])


def read_stored(run_id: str, name: str, value: Any) -> Any:
    """Return a stored value as today's type has it; raise `ResearchError` if it does not fit.

    Unpickling does not validate: an object that older code has stored lacks today's new fields, and
    only their use would fail. In place of what it cannot unpickle, DBOS returns the raw text.
    """
    plain = value.model_dump(warnings=False) if isinstance(value, BaseModel) else value
    types = {"model request": ai.ModelResponse, "report": tools.ResearchReport, **tools.STEP_TYPES}
    try:
        return TypeAdapter(types.get(name, Any)).validate_python(plain)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        what = ".".join(map(str, problem["loc"])) or "its type"
        raise ResearchError(
            f"the {name} that run {run_id} has stored no longer fits: {what}: {problem['msg']}.\n"
            "Go back to the code that stored it, or start a new run with another --bucket."
        ) from None


@dataclass(frozen=True)
class Failure:
    """The step from which a failed run must go on, and the error."""

    step: int
    error: object


def find_failure(stored: WorkflowStatus, steps: list[StepInfo]) -> Failure | None:
    """Return where a run has failed, or None."""
    for step in steps:
        # A ModelRetry is not a failure: it went back to the model, which has dealt with it.
        if step["error"] is not None and not isinstance(step["error"], ModelRetry):
            return Failure(step["function_id"], step["error"])
    if stored.status != "ERROR":
        return None
    # No step failed. If the run gave up on the model's answers, ask the model again: its last
    # answer, and what that led to, is dropped. If the run failed between steps, for example
    # because the disk was full, keep them all.
    if isinstance(stored.error, ai_error.AgentRunError):
        asked = [step["function_id"] for step in steps if is_model_step(step)]
        return Failure(max(asked, default=1), stored.error)
    return Failure(max((step["function_id"] for step in steps), default=0) + 1, stored.error)


def is_model_step(step: StepInfo) -> bool:
    """Tell a model request from a tool call."""
    return step["function_name"].startswith(f"{AGENT_NAME}__model")


def count_finished(steps: list[StepInfo]) -> str:
    """Say how many steps are stored that did not fail."""
    count = sum(step["error"] is None for step in steps)
    return f"{count} finished step{'' if count == 1 else 's'}"


def end_if_an_outcome_is_lost(settings: Settings, record: logging.LogRecord) -> bool:
    """End this process if DBOS could not store how a run ended. As a filter, let all pass.

    DBOS 3.4 only logs that, and executes the run no more. While this process lives, everybody would
    wait for the run; when it has ended, the run is resumed.
    """
    error = record.exc_info and record.exc_info[1]
    if record.getMessage().startswith("Database connection failed"):
        print_line("  the database does not answer: waiting for it to come back")
    elif isinstance(error, config.DATABASE_ERRORS):
        print(f"error: {config.database_error(settings, error)}", file=sys.stderr, flush=True)
        os._exit(2)
    return True


# ---------------------------------------------------------------- 6. many companies

GRACE = 8  # seconds; a container platform kills ten seconds after SIGTERM, or later


def research_many(
    executor: Executor, requests: dict[str, ResearchRequest], show: Show
) -> dict[str, Outcome]:
    """Bring many runs to their ends; every process that takes from the queue shares the work.

    Finished runs need no decision. New ones are stored at once, which is quicker than one by one.
    """
    stored = executor.look_at_many(requests)
    if new := {run_id: requests[run_id] for run_id in requests.keys() - stored.keys()}:
        executor.prepare()
        enqueue(executor, new)
        executor.launch()
    done: dict[str, Outcome] = {i: run for i, run in stored.items() if run.status == "SUCCESS"}
    open_requests = {run_id: requests[run_id] for run_id in requests if run_id not in done}
    done |= research(
        executor, open_requests, lambda found, now, ended: show(found, now, done | ended)
    )
    return {run_id: done[run_id] for run_id in requests}


def work(executor: Executor) -> None:
    """Execute runs from the queue until SIGTERM arrives."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    executor.launch()
    print_wrapped(
        f"Worker {executor.id} serves the queue {executor.queue}. Process {os.getpid()}."
        f" Database: {executor.settings.database_label}."
    )
    while not stop.wait(timeout=1):  # without it, a signal just before the wait would go unnoticed
        pass
    print_line("Asked to stop: taking no more runs, and finishing what has begun.")
    # Whatever blocks, a step or a thread that waits for the database, this process ends in time.
    end = threading.Timer(GRACE + 1, os._exit, [0])
    end.daemon = True
    end.start()


# ---------------------------------------------------------------- 7. what people see


@dataclass
class StatusLine:
    """A line that is printed when it changes, and as a sign of life while a process waits."""

    text: str = ""
    printed: float = 0.0

    def show(self, text: str, waits: bool = True) -> None:
        """Print the line if there is reason to."""
        if text != self.text:
            print_wrapped(text)
        elif waits and time.monotonic() > self.printed + 15:
            print_line("  still waiting")
        else:
            return
        self.text, self.printed = text, time.monotonic()


def print_run(executor: Executor, run_id: str, before: set[int]) -> None:
    """Print the report, where each step's result came from, and what checkpoints saved."""
    run = executor.look(run_id)
    report = read_stored(run_id, "report", getattr(run and run.output, "output", None))
    print_line("")
    for name, value in report:
        text = "; ".join(value) if isinstance(value, list) else str(value)
        print_wrapped(ljust(name, 24) + text, indent=24)
    print_line(
        f"\n{'step':<31}{'this time':<11}{'attempts':>8}{'seconds':>9}{'tokens':>8}{'US$':>10}"
    )
    ran, requests, tokens, seconds = progress.attempts.get(run_id, {}), 0, 0, 0.0
    for step in executor.client.list_workflow_steps(run_id):
        number = step["function_id"]
        took = ((step["completed_at_epoch_ms"] or 0) - (step["started_at_epoch_ms"] or 0)) / 1000
        usage = step["output"].usage if is_model_step(step) else None
        line = f"{number:>2}  {ljust('model request' if usage else step['function_name'], 27)}"
        if number in ran:
            cost = f"{usage.cost:.5f}" if usage and usage.cost is not None else ""
            line += f"{'ran':<11}{ran[number]:>8}{took:>9.1f}"
            line += f"{usage.total_tokens if usage else '':>8}{cost:>10}"
        elif number in before:
            line += "restored"
            requests += usage is not None
            tokens += usage.total_tokens if usage else 0
            seconds += took
        else:
            line += "ran in another process"
        print_line(line.rstrip())
    saved = f"model requests {requests}, tokens {tokens}, seconds {seconds:.1f}"
    # The first step is a model request, so without one nothing was restored.
    print_line(f"Saved by checkpoints: {saved if requests else 'nothing'}")


def print_runs(executor: Executor, limit: int) -> None:
    """Print the newest runs."""
    runs = executor.client.list_workflows(
        application_name=config.APP_NAME, sort_desc=True, limit=limit + 1, load_input=False
    )
    for run in runs[:limit]:
        steps = count_finished(executor.client.list_workflow_steps(run.workflow_id))
        when = datetime.fromtimestamp((run.created_at or 0) / 1000).strftime("%Y-%m-%d %H:%M")
        company = (run.attributes or {}).get("company")
        print_line(clip(f"{when}  {run.status[:9]:<11}{steps}  {company}", 0, 80))
        print_line(f"    {run.workflow_id}")
    if len(runs) > limit:
        print_line(f"These are the {limit} newest; --list {limit * 10} shows more.")
    if not runs:
        print_line("No runs are stored in this database.")


def print_outcomes(requests: dict[str, ResearchRequest], outcomes: dict[str, Outcome]) -> None:
    """Print how each run ended, and how to resume those that failed."""
    print_line(f"\n{'company':<45}{'status':<16}{'seconds':>9}")
    for run_id, request in requests.items():
        outcome = outcomes[run_id]
        status, seconds = "REFUSED", 0.0
        if isinstance(outcome, WorkflowStatus):
            began = outcome.dequeued_at or outcome.created_at or 0
            status, seconds = outcome.status, ((outcome.completed_at or began) - began) / 1000
        print_line(f"{ljust(clip(request.company, 0, 43), 45)}{status[:15]:<16}{seconds:>9.1f}")
    for run_id, request in requests.items():
        if reason := why_failed(outcomes[run_id]):
            words = ["--bucket", request.bucket] if request.bucket else []
            words += ["--", request.company] if request.company[0] == "-" else [request.company]
            print_line("")
            print_wrapped(f"{request.company}: {reason}")
            print_line(f"  resume it: uv run agent.py {shlex.join(words)}")


def why_failed(outcome: Outcome) -> str | None:
    """Say why a run has no report, or return None if it has one."""
    if isinstance(outcome, ResearchError):
        return str(outcome)
    if outcome.status == "ERROR":
        return describe(outcome.error)
    return None if outcome.status == "SUCCESS" else outcome.status.lower()


def describe(error: object) -> str:
    """Describe an error in one line."""
    if not isinstance(error, BaseException):
        return "an error that can no longer be read"
    if isinstance(error, dbos_error.DBOSMaxStepRetriesExceeded):
        last = describe(error.errors[-1])
        return f"{error.step_name} failed {error.max_retries} times, last {last}"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def print_wrapped(text: str, indent: int = 0) -> None:
    """Fold a paragraph to the 80 columns of a terminal, where some characters take two."""
    for line in wrap(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False):
        print_line(line)


# ---------------------------------------------------------------- 8. the command line


def end_by_ctrl_c(*_: object) -> None:
    """Say that nothing is lost, and end before a thread of DBOS begins another step."""
    os.write(2, b"\nInterrupted: what finished is stored. Run the same command to resume.\n")
    os._exit(130)


def main() -> int:
    """Run the command line; return its exit code."""
    signal.signal(signal.SIGINT, end_by_ctrl_c)
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
    for name in ("dbos", "psycopg"):  # without a handler, Python would print their warnings
        logging.getLogger(name).addHandler(logging.NullHandler())
    if options.verbose:
        logging.basicConfig(level=logging.INFO)
    try:
        return run_command(options)
    except (ResearchError, *config.DATABASE_ERRORS) as error:
        if options.verbose:
            traceback.print_exc()
        if not isinstance(error, ResearchError):
            error = config.database_error(config.load_settings(), error)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run_command(options: argparse.Namespace) -> int:
    """Do what the options say; return the exit code."""
    settings = config.load_settings()
    requests = read_requests(settings, options.company, options.bucket)
    if options.worker is not None and options.company:
        raise ResearchError("--worker takes its runs from the queue: leave out the companies.")
    if options.run_id is not None and len(requests) > 1:
        raise ResearchError("--run-id is for one company.")
    for name, highest in (("concurrency", 1000), ("list", 1_000_000)):
        number = getattr(options, name)
        if number is not None and not 0 < number <= highest:
            raise ResearchError(f"--{name} takes a number from 1 to {highest}.")
    tools.service.crash = options.crash
    if options.list is not None:
        print_runs(Executor(settings, ""), options.list)
        return 0
    if options.worker is None and len(requests) == 1:
        [(run_id, request)] = requests.items()
        if options.run_id is not None:
            run_id = config.clean_text("the run ID", options.run_id)
        return run_one(Executor(settings, run_id), request, run_id, options.crash)
    progress.show = "nothing" if options.worker is None else "many runs"
    name = (
        config.clean_text("the worker's name", options.worker or "")
        if options.worker is not None
        else ""
    )
    executor = Executor(settings, settings.queue, name=name, concurrency=options.concurrency)
    outcomes: dict[str, Outcome] = {}
    if options.worker is not None:
        work(executor)
    else:
        line = StatusLine()
        outcomes = research_many(executor, requests, partial(show_counts, line, requests))
        for run_id, outcome in outcomes.items():
            if isinstance(outcome, WorkflowStatus) and outcome.status == "ERROR":
                outcomes[run_id] = executor.look(run_id) or outcome  # with its error
        print_outcomes(requests, outcomes)
    # This process may be executing runs that others have asked for. What is left after these
    # seconds is resumed from its last checkpoint, a worker's when it is started again.
    DBOS.destroy(workflow_completion_timeout_sec=GRACE)
    return int(any(why_failed(outcome) for outcome in outcomes.values()))


def run_one(executor: Executor, request: ResearchRequest, run_id: str, crash: bool) -> int:
    """Research one company."""
    settings, line = executor.settings, StatusLine()
    steps = executor.client.list_workflow_steps(run_id, load_output=False)
    before = {step["function_id"] for step in steps}
    where = f"Process {os.getpid()}. Model: {request.model}. Database: {settings.database_label}."

    def show(found: dict[str, Found], _stored: object, _outcomes: object) -> None:
        if run_id in found:
            told, first = found[run_id], not line.text
            line.show(f"Run {run_id}: {told.state}. {where}", waits=told.owner is not None)
            if first and request.model == "offline":
                print_line(
                    "(A script stands in for the model. To use a real one, see .env.example.)"
                )

    [outcome] = research(executor, {run_id: request}, show).values()
    if isinstance(outcome, ResearchError):
        raise outcome
    if outcome.status == "SUCCESS":
        print_run(executor, run_id, before)
        # What a process that is killed leaves is one row, and the rerun uses it again.
        if executor.launched:
            executor.client.delete_queue(executor.queue)
        if crash:
            print_line("--crash found nothing to kill: fetch_financial_metrics did not run after")
            print_line("fetch_company_overview in this process.")
        return 0
    failed = executor.look(run_id) or outcome
    raise RunFailed(
        f"the run failed: {why_failed(failed)}\n"
        "Finished steps are stored. Run the same command to resume from the failed one."
    )


def show_counts(
    line: StatusLine,
    requests: dict[str, ResearchRequest],
    _found: object,
    stored: dict[str, WorkflowStatus],
    outcomes: dict[str, Outcome],
) -> None:
    """Print how many of many runs are where."""
    failed = sum(why_failed(outcome) is not None for outcome in outcomes.values())
    running = sum(run.status == "PENDING" and i not in outcomes for i, run in stored.items())
    waiting = len(requests) - len(outcomes) - running
    done = len(outcomes) - failed
    line.show(f"{done} done, {running} running, {waiting} waiting, {failed} failed")


def read_requests(settings: Settings, names: list[str], bucket: str) -> dict[str, ResearchRequest]:
    """Return requests for these companies; doubled names are one.

    `["-"]` reads them from standard input: one a line, in UTF-8; blank lines and those that start
    with `#` are skipped.

    Raises:
        ResearchError: A name is unfit; the text says which.
    """
    numbered = list(enumerate(names or ["Quantum Compute Corp"], start=1))
    if names == ["-"]:
        data = sys.stdin.buffer.read() if sys.stdin else b""
        # What is not UTF-8 becomes a character that no name may have.
        lines = data.decode("utf-8-sig", errors="surrogateescape").split("\n")
        numbered = [
            (n, line) for n, line in enumerate(lines, start=1) if line.strip()[:1] not in ("", "#")
        ]
    requests: dict[str, ResearchRequest] = {}
    for number, name in numbered:
        try:
            request = settings.request(name, bucket)
        except ResearchError as error:
            if names == [name]:
                raise
            unit = "line" if names == ["-"] else "name"
            raise ResearchError(f"{unit} {number}: {error}") from None
        requests.setdefault(config.derive_run_id(request), request)
    if not requests:
        raise ResearchError("there is no company on standard input: give one a line.")
    return requests


if __name__ == "__main__":
    gc.freeze()  # or Python would look through all the imports when it ends: that takes 0.3 s
    sys.exit(main())
