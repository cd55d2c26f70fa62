"""A research agent that survives being killed: run it, kill it, run it again.

    uv run agent.py                    # research the default company
    uv run agent.py "Acme" --crash     # die by SIGKILL in the middle of the flaky tool
    uv run agent.py "Acme"             # the same run resumes after its last checkpoint
    uv run agent.py --list             # what is stored

The promise: run the same command again, whatever happened, and the same run moves on to its end;
a step that finished is never repeated.

Read this file from the top. `build_agent()` makes an agent durable. `decide()` keeps the promise:
it looks in which state a run is, and starts or resumes it. An `Executor` is a process that executes
runs. `research()` uses them until the runs have ended. Then come details, what people see, and the
command line.

DBOS stores each run (a "workflow") and the result of each step (its "checkpoint"). A run is
ENQUEUED until a process takes it from its queue, and then PENDING, even if that process has died.
It ends as SUCCESS, ERROR or CANCELLED. Resuming a run puts it into a queue again; steps that have
a checkpoint are not executed again. Rewinding a run deletes the checkpoints of one step and of all
later ones, and then resumes it. An executor that is launched takes runs from its queue.
"""

import argparse
import gc
import inspect
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from typing import Any, cast

import sqlalchemy
from dbos import DBOS, EnqueueOptions, SetWorkflowID, StepInfo, WorkflowStatus
from dbos import error as dbos_error
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_ai import Agent, ModelRetry, ModelSettings
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
# DBOSAgent registers its workflow, and the step that asks the model, under these names.
WORKFLOW_NAME = f"{AGENT_NAME}.run"
MODEL_REQUEST = f"{AGENT_NAME}__model.request"


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
        # pydantic-ai 3 will have no DBOSAgent; pyproject.toml excludes that version.
        warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")
        return DBOSAgent(
            agent,
            # Passed to @DBOS.step, which knows more options than the StepConfig type.
            model_step_config=cast(StepConfig, {"timeout_seconds": 90, **MODEL_STEP}),
            # One tool at a time, so that steps finish in the order of their numbers. Rewinding a
            # failed run deletes the failed step and every step with a higher number; with tools
            # in parallel, one of those could have finished.
            parallel_execution_mode="sequential",
        )


# ---------------------------------------------------------------- 2. the promise


@dataclass(frozen=True)
class Found:
    """What `decide()` has found."""

    state: str  # in words, for people
    owner: str | None = None  # not None: wait, for this other process has the run


FINISHED = Found("finished earlier, so its stored report is replayed")


def decide(executor: "Executor", request: ResearchRequest, run_id: str) -> Found:
    """Look in which state a run is, and put it into the executor's queue if there is work to do.

    The executor is launched only if there seems to be something to execute.

    Raises:
        ResearchError: The run belongs to another request, or is unfinished and of another version,
            or its checkpoints are not of today's types, or the model cannot be used.
    """
    client, queue = executor.client, executor.queue
    seen = executor.look([run_id]).get(run_id)
    if seen is None:
        executor.launch()
        enqueue(executor, {run_id: request})
        return Found("new")
    refuse_other_request(seen, request)
    if seen.status == "SUCCESS":
        return FINISHED
    refuse_other_version(seen)
    # There are two kinds of locks. One is named by an executor ID, and held by that process until
    # it dies: if it can be taken, the process is dead. The other one is named by a run ID, and
    # held while a process resumes the run, so that no second process does the same.
    waits = "This process waits for it and executes nothing"
    if is_alive(executor, seen):
        return Found(f"being executed by {seen.executor_id}. {waits}", seen.executor_id)
    with config.take_lock(executor.settings.database_url, run_id) as taken:
        if not taken:
            return Found(f"being resumed by another process. {waits}", "another process")
        refuse_if_unreadable(run_id, client.list_workflow_steps(run_id))
        executor.launch()
        # In the meantime a worker, or this process, may have taken the run from its queue.
        stored = executor.look([run_id], load_output=True).get(run_id)
        if stored is None:
            raise RunFailed(DELETED)
        if is_alive(executor, stored):
            return Found(f"being executed by {stored.executor_id} just now", stored.executor_id)
        if stored.status == "SUCCESS":
            return FINISHED
        steps = client.list_workflow_steps(run_id)
        if failure := find_failure(stored, steps):
            # To resume it would only raise the stored error again.
            step, error = failure
            if is_open(stored):
                # Only a run that has ended can be rewound. This one's process died too early.
                client.cancel_workflow(run_id)
            with suppress(dbos_error.DBOSException):  # others changed it: the next look will tell
                client.rewind_workflow(run_id, start_step=step, queue_name=queue)
            return Found(f"failed at step {step} ({describe(error)}), resumes there")
        told = f"resumes after {count_finished(steps)}"
        match stored.status:
            case "ENQUEUED" if stored.queue_name == queue:
                return Found(f"enqueued, {told}")
            case "PENDING":
                told = f"interrupted, {told}"
            case status:  # ENQUEUED in another queue, CANCELLED, or MAX_RECOVERY_ATTEMPTS_EXCEEDED
                told = f"{status.lower().replace('_', ' ')}, {told}"
        with suppress(dbos_error.DBOSException):  # others changed it: the next look will tell
            # Without queue_name, it would go to a queue from which every process takes runs.
            client.resume_workflow(run_id, queue_name=queue)
        return Found(told)


def is_alive(executor: "Executor", run: WorkflowStatus) -> bool:
    """Tell whether a live process executes a run."""
    if run.status != "PENDING":
        return False
    with config.take_lock(executor.settings.database_url, f"{run.executor_id}") as taken:
        return not taken


# ---------------------------------------------------------------- 3. the executor


class Executor:
    """This process, as DBOS sees it: once it is launched, it executes the runs of one queue."""

    def __init__(self, settings: Settings, queue: str, concurrency: int | None = None) -> None:
        """Connect to the database; raise `ResearchError` if it cannot be used.

        Args:
            settings: From `load_settings()`.
            queue: The queue to take runs from. A queue that is named by a run's ID holds only it.
            concurrency: How many runs of the queue each process executes at once; it is stored
                with the queue. None leaves it as it is, which is 10 at first.
        """
        self.settings, self.queue, self.concurrency = settings, queue, concurrency
        # At launch, DBOS resumes every PENDING run with this executor ID. The default, "local",
        # would match the runs of other processes that are alive.
        self.id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.client = config.open_database(settings)
        self.launched = False

    def launch(self) -> None:
        """Execute runs of the queue from now on; `ResearchError` if the model cannot be used."""
        if self.launched:
            return
        build_agent(self.settings)  # registers the workflow, by whose name DBOS executes runs
        tools.service.failure_rate = self.settings.failure_rate
        tools.service.latency = self.settings.latency
        # The lock comes first: others must see that this process lives when it takes a run.
        url = self.settings.database_url
        self.lock, engine_options = config.hold_lock(url, self.id)
        # Before the launch, because DBOS looks for new queues only once a second.
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
        # A log filter, because DBOS tells only its log that it could not store how a run ended.
        logging.getLogger("dbos").addFilter(partial(end_if_an_outcome_is_lost, self.settings))
        DBOS.launch()
        self.launched = True

    def look(self, run_ids: Iterable[str], load_output: bool = False) -> dict[str, WorkflowStatus]:
        """Return what is stored of these runs; their results and errors only on request."""
        ids = list(run_ids)
        runs: list[WorkflowStatus] = []
        for start in range(0, len(ids), 200):  # a statement takes only so many parameters
            some = ids[start : start + 200]
            runs += self.client.list_workflows(
                workflow_ids=some, load_input=False, load_output=load_output
            )
        return {run.workflow_id: run for run in runs}


# ---------------------------------------------------------------- 4. research


def research(
    executor: Executor, requests: dict[str, ResearchRequest], tell: Callable[[str], None]
) -> dict[str, "Outcome"]:
    """Bring runs to their ends, whatever states they are in. One that fails does not stop others.

    Args:
        executor: Its queue is named by the only run's ID, or is the shared queue of many runs.
        requests: Run ID to request.
        tell: Called again and again with how far they are, in words; "" if that is unknown.
    """
    found: dict[str, Found] = {}
    outcomes: dict[str, Outcome] = {}  # run ID to how the run has ended
    # Runs that this command has started or seen under way: if one fails now, it is not resumed.
    watched = requests.keys() - executor.look(requests).keys() if len(requests) > 1 else set()
    if watched:  # one transaction is quicker than many decisions
        executor.launch()
        enqueue(executor, {run_id: requests[run_id] for run_id in watched})
    while True:
        try:
            stored = executor.look(requests.keys() - outcomes.keys())
            watched |= {run_id for run_id, run in stored.items() if is_open(run)}
            alive = {executor.id}  # processes that are known to live, in this look
            for run_id in requests.keys() - outcomes.keys():
                run, request = stored.get(run_id), requests[run_id]
                # A failure from before this command is resumed; a later one is the outcome.
                ended = succeeded(run) or (run and run_id in watched and not is_open(run))
                try:
                    if run is None and run_id in watched:
                        raise RunFailed(DELETED)
                    if run and ended:
                        refuse_other_request(run, request)
                        outcomes[run_id] = run
                        if not executor.launched:  # or this process may have executed it
                            found.setdefault(run_id, FINISHED)
                    elif run is None or not is_in_hand(executor, run, alive):
                        found[run_id] = state = decide(executor, request, run_id)
                        tell("")  # with many runs, the decisions take a while
                        if state.owner:
                            alive.add(state.owner)
                        else:
                            watched.add(run_id)
                except ResearchError as error:
                    outcomes[run_id] = error
            tell(describe_progress(requests, found, stored, outcomes))
        except config.DATABASE_ERRORS:
            if not executor.launched:
                raise
            tell("")  # DBOS waits for a database that is away for a while, so this does too
            time.sleep(1)
        if len(outcomes) == len(requests):
            return outcomes
        waits = not executor.launched or any(state.owner for state in found.values())
        time.sleep(0.5 + len(requests) / 1000 if waits or len(requests) > 1 else 0.05)


# ---------------------------------------------------------------- 5. details

# How a run has ended: as DBOS stores it, or why it cannot go on here.
Outcome = WorkflowStatus | ResearchError
DELETED = "it was deleted meanwhile. The same command starts it anew."


class RunFailed(ResearchError):  # noqa: N818 - it reads as what happened
    """The run has no report. The same command resumes it."""

    exit_code = 1


def is_open(run: WorkflowStatus) -> bool:
    """Tell whether a run is going to be executed, or is being executed."""
    return run.status in ("ENQUEUED", "PENDING")


def is_in_hand(executor: Executor, run: WorkflowStatus, alive: set[str]) -> bool:
    """Tell whether a live process executes a run, or is going to take it from the queue."""
    if run.status == "PENDING":
        return run.executor_id in alive
    mine = run.queue_name == executor.queue and run.app_version == APP_VERSION
    return executor.launched and run.status == "ENQUEUED" and mine


def succeeded(outcome: Outcome | None) -> bool:
    """Tell whether a run has its report."""
    return isinstance(outcome, WorkflowStatus) and outcome.status == "SUCCESS"


def count_finished(steps: list[StepInfo]) -> str:
    """Say how many steps are stored that did not fail."""
    count = sum(step["error"] is None for step in steps)
    return f"{count} finished step{'' if count == 1 else 's'}"


# Errors of a model request that are worth a retry, and those among them that are not.
TRANSIENT = (
    ai_error.ModelAPIError,  # a rate limit, an overload, a cut connection, an answer cut short
    ai_error.UnexpectedModelBehavior,  # an answer that holds nothing usable
    dbos_error.DBOSStepTimeoutError,
    AttributeError,  # providers' clients raise this and the next two for answers of another shape
    LookupError,
    TypeError,
)
PERMANENT = (
    ai_error.ModelRequestRejectedError,  # a bad request, a refused key, an unknown model
    ai_error.ModelQuotaExceededError,
    ai_error.ContentFilterError,
    ai_error.OutputTokenLimitExceeded,
)
MODEL_STEP = tools.retry(TRANSIENT, PERMANENT, attempts=4, first_wait=1, backoff=2)


class ModelInStep(WrapperModel):
    """What happens inside each model step, and does not happen again when a step is restored."""

    def __init__(self, wrapped: Model, cost_limit: float) -> None:
        """Wrap the model.

        The limit is this process's own. `UsageLimits` that are passed to a run are stored with it,
        so a run that had reached them could not go on after they were raised.
        """
        super().__init__(wrapped)
        self.cost_limit = cost_limit

    async def request(
        self, messages: list[ai.ModelMessage], *settings_and_tools: Any
    ) -> ai.ModelResponse:
        """Ask the wrapped model, unless the run has cost too much already."""
        answers = [message for message in messages if isinstance(message, ai.ModelResponse)]
        spent = sum(answer.usage.cost or 0 for answer in answers)
        if spent > self.cost_limit:
            reached = f"it has cost {spent:.4f} US$: raise COST_LIMIT_USD ({self.cost_limit})"
            raise ai_error.UsageLimitExceeded(reached)
        print_in_step(f"asks the model {self.model_name}")
        try:
            response = await super().request(messages, *settings_and_tools)
        except ai_error.ModelHTTPError as error:
            raise hide_key(error, self) from None
        with suppress(AssertionError, LookupError, ValueError):  # its price is not known
            response.usage.cost = response.usage.cost or response.cost().total_price
        for call in response.tool_calls:
            print_in_step(f"the model calls {call.tool_name}")
        return response


def hide_key(error: ai_error.ModelHTTPError, model: Model) -> ai_error.ModelAPIError:
    """Return the error without the API key: DBOS stores errors, and providers may quote the key."""
    if isinstance(error, ai_error.ModelAuthenticationError):
        keys = [key for key, name in config.MODEL_BY_KEY.items() if name.startswith(model.system)]
        told = f"the provider refused the API key: check {' '.join(keys) or 'it'} in .env"
        return ai_error.ModelAuthenticationError(model.model_name, told)
    key = getattr(getattr(model.provider, "client", None), "api_key", None)
    if key and f"{key}" in f"{error} {error.headers}":
        error.body, error.headers = "removed, because it quoted the API key", None
        error.message = f"status_code: {error.status_code}, body: {error.body}"
        error.args = (error.message,)
    return error


def enqueue(executor: Executor, requests: dict[str, ResearchRequest]) -> None:
    """Store new runs in the executor's queue: all of them, or after an error none.

    To store a run that is stored already changes nothing, so two processes may do it at once. Both
    go by the order of the IDs, or each could wait for a row that the other one has inserted.
    """
    engine = sqlalchemy.create_engine(executor.settings.database_url, poolclass=sqlalchemy.NullPool)
    with engine.begin() as transaction:
        for run_id, request in sorted(requests.items()):
            options: EnqueueOptions = {
                "workflow_name": WORKFLOW_NAME,
                "workflow_id": run_id,
                "queue_name": executor.queue,
                "app_version": APP_VERSION,
                # To tell later what was asked.
                "attributes": {**asdict(request), "request_id": config.derive_run_id(request)},
            }
            # `deps` are stored as well. So there are none: a resumed run would get old ones back.
            executor.client.enqueue_in_transaction(transaction, options, request.prompt, deps=None)


def refuse_other_request(stored: WorkflowStatus, request: ResearchRequest) -> None:
    """Raise `ResearchError` if a run answers another question.

    DBOS compares only the ID: it would return the answer to the other question.
    """
    asked = stored.attributes or {}
    if asked.get("request_id") != config.derive_run_id(request):
        raise ResearchError(
            f"run {stored.workflow_id} is stored for another request: {asked.get('company')},"
            f" {asked.get('model')}, bucket {asked.get('bucket')!r}, or other instructions.\n"
            "Choose another --run-id, or leave it out."
        )


def refuse_other_version(stored: WorkflowStatus) -> None:
    """Raise `ResearchError` if a run is of another version: DBOS would wait for that, for ever."""
    if stored.app_version != APP_VERSION:
        raise ResearchError(
            f"run {stored.workflow_id} belongs to version {stored.app_version} of this app, which"
            f" is version {APP_VERSION}.\n"
            "Finish it with that version, or start a new run with another --bucket."
        )


def refuse_if_unreadable(run_id: str, steps: list[StepInfo]) -> None:
    """Raise `ResearchError` if a resumed run would get a checkpoint that is not of today's type."""
    for step in steps:
        if step["error"] is None:
            read_stored(run_id, step["function_name"], step["output"])


def read_stored(run_id: str, name: str, value: Any) -> Any:
    """Return a stored value as today's type has it; raise `ResearchError` if it does not fit.

    Unpickling does not validate: an object that older code has stored lacks today's new fields, and
    only their use would fail. In place of what it cannot unpickle, DBOS returns the raw text.
    """
    plain = value.model_dump(warnings=False) if isinstance(value, BaseModel) else value
    types = {tool.__name__: inspect.signature(tool).return_annotation for tool in tools.TOOLS}
    types |= {MODEL_REQUEST: ai.ModelResponse, "report": tools.ResearchReport}
    try:
        return TypeAdapter(types.get(name, Any)).validate_python(plain)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        what = ".".join(map(str, problem["loc"])) or "its type"
        raise ResearchError(
            f"the {name} that run {run_id} has stored no longer fits: {what}: {problem['msg']}.\n"
            "Go back to the code that stored it, or start a new run with another --bucket."
        ) from None


def read_report(run: WorkflowStatus) -> tools.ResearchReport:
    """Return the report of a finished run; raise `ResearchError` if it is of another type."""
    stored = getattr(run.output, "output", run.output)
    return cast(tools.ResearchReport, read_stored(run.workflow_id, "report", stored))


def find_failure(stored: WorkflowStatus, steps: list[StepInfo]) -> tuple[int, object] | None:
    """Return the ID of the step from which a failed run must go on, and the error."""
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
        asked = [step["function_id"] for step in steps if step["function_name"] == MODEL_REQUEST]
        return max(asked, default=1), stored.error
    return max((step["function_id"] for step in steps), default=0) + 1, stored.error


def end_if_an_outcome_is_lost(settings: Settings, record: logging.LogRecord) -> bool:
    """End this process if DBOS could not store how a run ended. As a log filter, let all pass.

    DBOS 3.4 only logs that, and executes the run no more. While this process lives, everybody would
    wait for the run; when it has ended, the run is resumed.
    """
    error = record.exc_info and record.exc_info[1]
    if record.getMessage().startswith("Database connection failed"):
        print_line("  the database does not answer: waiting for it to come back")
    elif isinstance(error, config.DATABASE_ERRORS) and any(
        frame.name == "update_workflow_outcome"
        for frame in traceback.extract_tb(error.__traceback__)
    ):
        print(f"error: {config.database_error(settings, error)}", file=sys.stderr, flush=True)
        os._exit(2)
    return True


# ---------------------------------------------------------------- 6. other ways to start runs

UNFINISHED = ["PENDING", "ENQUEUED", "ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED"]
LOOK = 5  # seconds between two looks of a worker for runs that dead processes have left
GRACE = 8  # seconds; a container platform kills ten seconds after SIGTERM, or later


def work(executor: Executor) -> None:
    """Execute runs from the queue until SIGTERM arrives."""
    stopped = threading.Event()

    def stop(*_: object) -> None:
        # Whatever blocks, a step or a wait for the database, this process ends in time.
        end = threading.Timer(GRACE + 1, os._exit, [0])
        end.daemon = True
        end.start()
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    executor.launch()
    where = f"Process {os.getpid()}. Database: {executor.settings.database_label}."
    print_wrapped(f"A worker serves the queue {executor.queue}. {where}")
    while not stopped.wait(timeout=LOOK):
        take_over(executor, stopped)
    print_line("Asked to stop: taking no more runs, and finishing what has begun.")


def take_over(executor: Executor, stopped: threading.Event | None = None) -> None:
    """Resume the runs of the executor's queue whose processes have died, until it is stopped."""
    alive = {executor.id}
    with suppress(*config.DATABASE_ERRORS):  # it may be away for a while
        for run in executor.client.list_workflows(
            status="PENDING", queue_name=executor.queue, load_input=False, load_output=False
        ):
            if run.executor_id not in alive and not (stopped and stopped.is_set()):
                with suppress(ResearchError):  # for example, it belongs to another version
                    found = decide(executor, request_of(run), run.workflow_id)
                    alive |= {found.owner or executor.id}


def request_of(run: WorkflowStatus) -> ResearchRequest:
    """Return what was asked, from what is stored beside the run; "" for what older code lacked."""
    asked = run.attributes or {}
    parts = [part.name for part in fields(ResearchRequest)]
    return ResearchRequest(**{part: asked.get(part, "") for part in parts})


def find_unfinished(executor: Executor) -> dict[str, ResearchRequest]:
    """Return the unfinished runs of this tenant, user and model; tell which are left alone."""
    mine = executor.settings.request("any")
    requests: dict[str, ResearchRequest] = {}
    alive = cancelled = 0
    for run in executor.client.list_workflows(
        name=WORKFLOW_NAME, status=UNFINISHED, load_input=False, load_output=False
    ):
        asked = request_of(run)
        if replace(mine, company=asked.company, bucket=asked.bucket) == asked:
            if run.status == "CANCELLED":
                cancelled += 1
            elif is_alive(executor, run):
                alive += 1
            else:
                requests[run.workflow_id] = asked
    told = f"Unfinished runs that go on: {len(requests)}. Left alone: {alive} that live processes"
    print_wrapped(f"{told} execute, {cancelled} that were cancelled.")
    return requests


def fork(executor: Executor, request: ResearchRequest, run_id: str, step: int) -> None:
    """Store a fork in the executor's queue, named like that: another run, again from this step.

    Raises:
        ResearchError: There is no such run or step, or it could not go on with this code.
    """
    base, steps = executor.look([run_id]).get(run_id), executor.client.list_workflow_steps(run_id)
    if base is None or not 0 < step <= len(steps):
        raise ResearchError(f"there is no step {step} in run {run_id}: see --list.")
    refuse_other_request(base, request)
    refuse_other_version(base)
    refuse_if_unreadable(run_id, [known for known in steps if known["function_id"] < step])
    executor.launch()
    with SetWorkflowID(executor.queue), suppress(sqlalchemy.exc.IntegrityError):
        # Without a version no process would take it; without a queue, any process would. If
        # another process was faster, the fork is stored already.
        executor.client.fork_workflow(
            run_id, step, application_version=APP_VERSION, queue_name=executor.queue
        )


# ---------------------------------------------------------------- 7. what people see


def describe_progress(
    requests: dict[str, ResearchRequest],
    found: dict[str, Found],
    stored: dict[str, WorkflowStatus],
    outcomes: dict[str, Outcome],
) -> str:
    """Say in which state the only run was found, or how many of many runs are where."""
    if len(requests) == 1:
        return "".join(run.state for run in found.values())
    done = sum(succeeded(outcome) for outcome in outcomes.values())
    running = sum(stored[i].status == "PENDING" for i in stored.keys() - outcomes.keys())
    waiting = len(requests) - len(outcomes) - running
    return f"{done} done, {running} running, {waiting} waiting, {len(outcomes) - done} failed"


@dataclass
class StatusLine:
    """A line that is printed when it changes, and every 15 seconds as a sign of life."""

    before: str = ""
    after: str = ""
    shown: str = ""
    printed: float = field(default_factory=time.monotonic)

    def show(self, text: str) -> None:
        """Print the line if there is reason to."""
        if text not in ("", self.shown):
            print_wrapped(f"{self.before}{text}{self.after}")
        elif time.monotonic() > self.printed + 15:
            print_line("  not finished yet")
        else:
            return
        self.shown, self.printed = text or self.shown, time.monotonic()


def print_run(executor: Executor, run_id: str, restored: list[StepInfo]) -> None:
    """Print the report, where each step's result came from, and what checkpoints saved."""
    before = {step["function_id"] for step in restored}
    run = executor.look([run_id], load_output=True)[run_id]
    print_line("")
    for name, value in read_report(run):
        text = "; ".join(value) if isinstance(value, list) else str(value)
        print_wrapped(ljust(name, 24) + text, indent=24)
    print_line(
        f"\n{'step':<31}{'this time':<11}{'attempts':>8}{'seconds':>9}{'tokens':>8}{'US$':>10}"
    )
    ran, requests, tokens, seconds = progress.attempts.get(run_id, {}), 0, 0, 0.0
    for step in executor.client.list_workflow_steps(run_id):
        number = step["function_id"]
        took = ((step["completed_at_epoch_ms"] or 0) - (step["started_at_epoch_ms"] or 0)) / 1000
        usage = step["output"].usage if isinstance(step["output"], ai.ModelResponse) else None
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
        elif not step["function_name"].startswith("DBOS."):  # such as events and messages
            line += "ran in another process"
        print_line(line.rstrip())
    saved = f"model requests {requests}, tokens {tokens}, seconds {seconds:.1f}"
    # The first step is a model request, so without one nothing was restored.
    print_line(f"Saved by checkpoints: {saved if requests else 'nothing'}")


def print_runs(executor: Executor, limit: int) -> None:
    """Print the newest runs, and in which states they really are."""
    runs = executor.client.list_workflows(sort_desc=True, limit=limit + 1, load_input=False)
    for run in runs[:limit]:
        asked, steps = run.attributes or {}, executor.client.list_workflow_steps(run.workflow_id)
        when = datetime.fromtimestamp((run.created_at or 0) / 1000).strftime("%Y-%m-%d %H:%M")
        parts = [f"{asked.get('company')}", asked.get("bucket")]
        parts += [f"model {asked.get('model')}"] * (asked.get("model") != executor.settings.model)
        parts += [f"version {run.app_version}"] * (run.app_version != APP_VERSION)
        state = describe_state(executor, run)
        told = f"{when}  {', '.join(filter(None, parts))}: {state}, {count_finished(steps)}"
        print_wrapped(told, indent=4)
        print_line(f"    {run.workflow_id}")
    if len(runs) > limit:
        print_line(f"These are the {limit} newest; --list {limit * 10} shows more.")
    if not runs:
        print_line("No runs are stored in this database.")


def print_outcomes(
    executor: Executor, requests: dict[str, ResearchRequest], outcomes: dict[str, Outcome]
) -> None:
    """Print how each run ended, and how to resume those that failed."""
    print_line(f"\n{'company':<40}{'seconds':>9}  state")
    for run_id, request in requests.items():
        run, seconds = outcomes[run_id], 0.0
        if isinstance(run, WorkflowStatus):
            began = run.dequeued_at or run.created_at or 0
            seconds = ((run.completed_at or began) - began) / 1000
        company = ljust(clip(request.company, 0, 38), 40)
        print_wrapped(f"{company}{seconds:>9.1f}  {describe_state(executor, run)}", indent=4)
        # A run that was refused would be refused again.
        if isinstance(run, RunFailed | WorkflowStatus) and not succeeded(run):
            words = [f"--bucket={request.bucket}"] if request.bucket else []
            words += [f"--run-id={run_id}"] if run_id != config.derive_run_id(request) else []
            words += ["--", request.company] if request.company[0] == "-" else [request.company]
            print_line(f"    resume it: uv run agent.py {shlex.join(words)}")


def describe_state(executor: Executor, run: Outcome) -> str:
    """Say in which state a run really is: PENDING alone does not tell whether it is executed."""
    if isinstance(run, ResearchError):
        return f"not resumed: {run}"
    match run.status:
        case "SUCCESS":
            return "finished"
        case "ERROR":
            whole = executor.look([run.workflow_id], load_output=True).get(run.workflow_id, run)
            return f"failed: {describe(whole.error)}"
        case "PENDING":
            return f"executed by {run.executor_id}" if is_alive(executor, run) else "interrupted"
        case status:
            return status.lower().replace("_", " ")


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


# ---------------------------------------------------------------- 8. the command


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
    add("--from-step", type=int, metavar="N", help="run it again from step N, as another run")
    add("--crash", action="store_true", help="die by SIGKILL in the flaky tool")
    add("--unfinished", action="store_true", help="all failed and interrupted runs go on")
    add("--worker", action="store_true", help="execute what is queued")
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
        settings = config.load_settings()
        return run_command(settings, options)
    except (ResearchError, OSError, *config.DATABASE_ERRORS) as error:  # OSError: a file of a lock
        if options.verbose:
            traceback.print_exc()
        if not isinstance(error, ResearchError):
            error = config.database_error(settings, error)
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def run_command(settings: Settings, options: argparse.Namespace) -> int:
    """Do what the options say; return the exit code."""
    requests = read_requests(settings, options.company, options.bucket)
    for name, most in (("concurrency", 1000), ("list", 1_000_000), ("from_step", 1000)):
        number = getattr(options, name)
        if number is not None and not 0 < number <= most:
            raise ResearchError(f"--{name.replace('_', '-')} takes a number from 1 to {most}.")
    if options.company and (options.worker or options.unfinished):
        raise ResearchError("--worker and --unfinished find their runs: leave out the companies.")
    tools.service.crash = options.crash
    if options.list is not None:
        print_runs(Executor(settings, ""), options.list)
        return 0
    if len(requests) == 1 and not (options.worker or options.unfinished):
        [(run_id, request)] = requests.items()
        run_id = run_id if options.run_id is None else options.run_id
        run_one(settings, request, run_id, options.from_step)
        if options.crash:
            print_line("--crash found nothing to kill: in this process, no call of the flaky tool")
            print_line("to the simulated service has followed the first tool.")
        return 0
    if options.run_id is not None or options.from_step is not None:
        raise ResearchError("--run-id and --from-step are for one company.")
    progress.show = "many runs" if options.worker else "nothing"
    executor = Executor(settings, settings.queue, options.concurrency)
    outcomes: dict[str, Outcome] = {}
    if options.worker:
        work(executor)
    else:
        requests = find_unfinished(executor) if options.unfinished else requests
        outcomes = research(executor, requests, StatusLine().show)
        print_outcomes(executor, requests, outcomes)
    # This process may be executing runs that others have asked for. What is left after these
    # seconds is resumed from its last checkpoint, by whoever asks for it or by a worker.
    DBOS.destroy(workflow_completion_timeout_sec=GRACE)
    return int(not all(succeeded(outcome) for outcome in outcomes.values()))


def run_one(
    settings: Settings, request: ResearchRequest, run_id: str, from_step: int | None
) -> None:
    """Bring one run to its end, and print its report."""
    base, again = config.clean_text("the run ID", run_id), ""
    if ":" in base or base.startswith("_dbos"):
        raise ResearchError("choose another run ID: this could be the name of a shared queue.")
    run_id = f"{base}-from-{from_step}" if from_step else base
    if from_step:
        again = f" It is run {base} again from step {from_step}."
    script = ", a script (for a real one, see .env.example)" if request.model == "offline" else ""
    where = f"Model: {request.model}{script}. Database: {settings.database_label}."
    line = StatusLine(f"Run {run_id}: ", f".{again} Process {os.getpid()}. {where}")
    executor = Executor(settings, run_id)
    seen = executor.look([run_id]).get(run_id)
    if from_step and seen and seen.forked_from != base:
        raise ResearchError(f"run {run_id} is stored, but not as a fork: choose another --run-id.")
    if from_step and seen is None:
        fork(executor, request, base, from_step)
        line.show("new")
    steps = executor.client.list_workflow_steps(run_id, load_output=False)
    [outcome] = research(executor, {run_id: request}, line.show).values()
    if isinstance(outcome, ResearchError):
        raise outcome
    if not succeeded(outcome):
        was = "" if outcome.status == "ERROR" else "was "
        raise RunFailed(
            f"the run {was}{describe_state(executor, outcome)}\n"
            "Finished steps are stored. Run the same command to resume."
        )
    # To a process that has only waited, nothing was restored.
    print_run(executor, run_id, steps if executor.launched or succeeded(seen) else [])
    if from_step:
        print_line(f"Steps before step {from_step} are those of run {base}.")
    if executor.launched:  # finished runs need no queue: this one, and those of killed processes
        for run in executor.look(queue.name for queue in executor.client.list_queues()).values():
            if succeeded(run):
                executor.client.delete_queue(run.workflow_id)


def read_requests(settings: Settings, names: list[str], bucket: str) -> dict[str, ResearchRequest]:
    """Return a request for each company; `["-"]` reads the companies from standard input.

    There they are one a line, in UTF-8; blank lines and lines that start with `#` are skipped.

    Raises:
        ResearchError: A name is unfit; the text says which.
    """
    if "-" in names and len(names) > 1:
        raise ResearchError('"-" reads the names from standard input: give no others beside it.')
    lines = names or ["Quantum Compute Corp"]
    if names == ["-"]:
        data = sys.stdin.buffer.read() if sys.stdin else b""
        # What is not UTF-8 becomes a character that no name may have.
        lines = data.decode("utf-8-sig", errors="surrogateescape").split("\n")
    requests: dict[str, ResearchRequest] = {}
    for number, name in enumerate(lines, start=1):
        if names != ["-"] or name.strip()[:1] not in ("", "#"):
            try:
                request = settings.request(name, bucket)
            except ResearchError as error:
                unit = "line" if names == ["-"] else "name"
                where = f"{unit} {number}: " if names != [name] else ""
                raise ResearchError(f"{where}{error}") from None
            requests.setdefault(config.derive_run_id(request), request)
    if not requests:
        raise ResearchError("there is no company on standard input: give one a line.")
    return requests


if __name__ == "__main__":
    gc.freeze()  # or Python would look through all the imports when it ends: that takes 0.3 s
    sys.exit(main())
