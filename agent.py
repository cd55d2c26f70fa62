"""A research agent that survives being killed: run it, kill it, run it again.

    uv run agent.py                    # research the default company
    uv run agent.py "Acme" --crash     # die by SIGKILL in the middle of the flaky tool
    uv run agent.py "Acme"             # the same run resumes after its last checkpoint

The promise: after a crash, an interruption or a failure, run the same command again, and the same
run moves on to its end. A step whose result is stored is never executed again. (Exceptions: a
model's answer that cannot be used, and what followed it or a failed step.) A step that is killed
before its result is stored is executed again from its start, even if its work was done. So a tool
that acts on the outside world needs a key: see `idempotency_key()` in tools.py.

Read this file from the top. `build_agent()` makes an agent durable. `research()` looks in which
state a run is, and lets `prepare()` put it into a queue. An `Executor` is this process, in which
DBOS takes the run from that queue and executes it. The rest is details, output and the command. For
an agent of your own you write a `Brief` and tools, as in recipes/own_tool.py; this file stays.

DBOS stores each run (a "workflow") and the result of each step (its "checkpoint"). A run is
ENQUEUED until a process takes it from its queue, then PENDING, even if that process has died, and
it ends as SUCCESS, ERROR, CANCELLED or MAX_RECOVERY_ATTEMPTS_EXCEEDED. Resuming a run puts it into
a queue again; steps with a checkpoint are not executed again. Rewinding it first deletes the
checkpoints from one step on. A run is lost if DBOS gives it up and stores no end: it stays PENDING.

Why a queue? Be a run new, interrupted or failed, this program only marks it as waiting in a queue.
DBOS executes it from there. Each process has its own queue: who holds the run's lock executes it.

There are two locks: with SQLite each is a locked file, with Postgres an advisory lock. Both are
freed when their process dies. On Postgres, a cut connection frees a run's lock, too.
- A run's lock says: I may put this run into a queue. `research()` takes it before it looks at
  anything, and lets go of it when it returns or raises.
- A process's lock, named by its executor ID, says: this process lives. It is taken before DBOS can
  take a run in this process, and held until the process dies.
"""

import argparse
import gc
import io
import logging
import os
import signal
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from dbos import DBOS, StepInfo, WorkflowStatus
from dbos import error as dbos_error
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, ModelSettings
from pydantic_ai import exceptions as ai_error
from pydantic_ai import messages as ai
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.durable_exec.dbos import DBOSAgent, StepConfig
from pydantic_core import PydanticSerializationError

import config
import tools
from config import APP_VERSION, MODEL_REQUEST, ResearchRequest, Settings
from tools import BRIEF, Brief, ResearchError, print_line

# ---------------------------------------------------------------- 1. the durable agent

# Passed to @DBOS.step, which knows more options than the StepConfig type. Preemptible: when the run
# is cancelled, a request in flight is stopped, too.
MODEL_STEP = cast(StepConfig, {"timeout_seconds": 90, "preemptible": True, **config.MODEL_RETRIES})


def build_agent(
    settings: Settings, brief: Brief, capabilities: Sequence[AbstractCapability[None]] = ()
) -> DBOSAgent[None, Any]:
    """Build the durable agent, which registers its `run()` as a DBOS workflow.

    No line of this file calls `agent.run()`. DBOS does, on an event loop in a thread of its own,
    when it takes a run from the queue of this process; and again, from the top, when the run is
    resumed. `DBOSAgent` makes each model request a step. A tool is a step because of the
    `@DBOS.step` above it in tools.py, and for no other reason. Without that line, it would be
    executed again whenever the run is resumed.
    """
    agent = Agent(
        config.build_model(settings, brief.stand_in),
        name=config.AGENT_NAME,
        instructions=brief.instructions,
        output_type=brief.output_type,
        tools=brief.tools,
        capabilities=capabilities,
        retries=2,  # how often a bad answer or tool call goes back to the model
        # DBOS retries. Most providers' clients do too, and the attempts would multiply.
        model_settings=ModelSettings(max_retries=0),
    )
    with warnings.catch_warnings():
        # pydantic-ai 3 will have no DBOSAgent; pyproject.toml excludes that version.
        warnings.filterwarnings("ignore", "`DBOSAgent` is deprecated")
        return DBOSAgent(
            agent,
            model_step_config=MODEL_STEP,
            # One tool at a time, so that steps finish in the order of their numbers. Rewinding a
            # run deletes the failed step and all later ones. With tools in parallel, a later one
            # could have finished, and would be executed twice.
            parallel_execution_mode="sequential",
        )


# ---------------------------------------------------------------- 2. the promise


def research(executor: "Executor", request: ResearchRequest) -> "Finished":
    """Bring the run of a request to its end, whatever state it is in. Any thread may call it.

    It blocks until then, also while the database is away, and says so. What else it prints is set
    by `tools.output.show`.

    | The run is… | This call… |
    |---|---|
    | finished | returns the stored report: DBOS is not launched, and nothing is written |
    | executed by this process | waits for its end |
    | executed by another live process | waits; takes over if that process dies |
    | failed, cancelled, or lost again, since this call prepared it | raises `RunFailed` |
    | anything else | lets `prepare()` put it into this process's queue: see there |

    Raises:
        ResearchError: The run cannot go on here; the text says what to do. `RunFailed` is one:
            another call resumes the run.
    """
    run_id, prepared, waiting = request.run_id, list[Prepared](), Waiting(executor)
    # A second process or thread that is asked for the same run waits here. When it gets the lock,
    # it goes on by the same code: whatever the first has left, the look below finds it.
    with waiting.for_lock(run_id):
        while True:
            with waiting.while_the_database_is_away():  # after it, the loop looks again
                run = executor.look(run_id)
                if run and run.status == "SUCCESS":
                    steps = executor.client.list_workflow_steps(run_id)
                    break
                # A live process may execute it without the run's lock: recipes/worker.py does.
                if run and executor.is_in_hand(run):
                    waiting.for_a_moment(run)
                elif run and prepared and is_over(executor, run, tries=len(prepared)):
                    raise failure_of(executor, run)
                # If the lock was lost, this takes it again. Another process may have changed the
                # run meanwhile, so the loop looks again.
                elif waiting.still_has_lock(run_id):
                    prepared.append(prepare(executor, request, run))
                    tell_found(executor, request, prepared[-1].found)
                    while not executor.launched:  # not earlier: DBOS looks for queues as it starts
                        with waiting.while_the_database_is_away():
                            executor.launch()
    report = executor.brief.read_report(run_id, run.output)
    if not prepared:
        tell_found(executor, request, "finished earlier, so its stored report is replayed")
    return Finished(run, report, steps, prepared[-1].restored if prepared else steps)


OPEN = ("ENQUEUED", "PENDING")
"""The states of a run that has not ended."""


def prepare(
    executor: "Executor", request: ResearchRequest, run: WorkflowStatus | None
) -> "Prepared":
    """Put a run that no live process executes into this process's queue.

    Call it only while you hold the run's lock.

    | The run is… | It is… |
    |---|---|
    | not stored | enqueued: DBOS takes it from the queue, and calls `agent.run(prompt)` |
    | of another version, or its checkpoints do not fit today's types | refused |
    | failed, or its last step has failed | rewound to where it failed, and resumed there |
    | interrupted, lost, cancelled, in another queue, or at DBOS's limit of attempts | resumed |

    Raises:
        ResearchError: The run is refused, or the model cannot be used.
    """
    client, queue = executor.client, executor.queue
    if run is None:
        executor.make_ready()
        request.enqueue(client, queue)
        return Prepared("new", [])
    refuse_other_code(run)
    run_id = run.workflow_id
    steps = client.list_workflow_steps(run_id)
    executor.brief.refuse_unreadable(run_id, steps)
    executor.make_ready()
    executor.lost.pop(run_id, None)
    if failure := find_failure(run, steps):
        # The error is stored. If the run were resumed, DBOS would only raise it again. So it goes
        # on at the failed step; at the model's last answer, if that could not be used; or after its
        # last step, if it failed between two steps.
        number, error = failure
        if run.status in OPEN:  # its process died before the end was stored
            client.cancel_workflow(run_id)  # because DBOS rewinds only runs that have ended
        client.rewind_workflow(run_id, start_step=number, queue_name=queue)
        kept = [step for step in steps if step["function_id"] < number]
        return Prepared(f"failed ({describe(error)}), resumes at step {number}", kept)
    # Without queue_name, it would go to DBOS's internal queue, from which any process may take it.
    client.resume_workflow(run_id, queue_name=queue)
    state = "interrupted" if run.status == "PENDING" else run.status.lower().replace("_", " ")
    return Prepared(f"{state}, resumes after {count_finished(steps)}", steps)


# ---------------------------------------------------------------- 3. the executor


class Executor:
    """This process, as DBOS sees it: once it is launched, it executes the runs of one queue."""

    def __init__(
        self,
        settings: Settings,
        brief: Brief = BRIEF,
        build: Callable[[Settings, Brief], object] = build_agent,
        queue: str = "",
    ) -> None:
        """Connect to the database; raise `ResearchError` if it cannot be used.

        A process has one executor, because it has one DBOS.

        Args:
            settings: From `load_settings()`.
            brief: What the model is told, and may do.
            build: Makes a durable agent of it. It is called once, before the first run.
            queue: A queue that many processes share, as recipes/worker.py does. By default this
                process has its own, named like its ID, which is new in each process. If two
                processes took runs from one queue, the one without the run's lock could execute it.
        """
        self.settings, self.brief, self.build = settings, brief, build
        self.id = config.make_executor_id()
        self.queue = queue or self.id
        self.client, self.locks = config.open_database(settings)
        self.starting = threading.Lock()  # two threads may call research() for the first time
        self.agent: object = None
        self.launched = False
        self.lost: dict[str, str] = {}
        """Run ID to reason: runs that DBOS has given up here, and that are still stored PENDING."""
        self.trouble: BaseException | None = None  # with the database: only DBOS's log tells it

    def request(self, company: str, bucket: str = "") -> ResearchRequest:
        """Ask for a report. Another bucket is another run. `ResearchError`: the name is unfit."""
        return self.settings.request(self.brief, company, bucket)

    def look(self, run_id: str) -> WorkflowStatus | None:
        """Return what is stored of a run."""
        runs = self.client.list_workflows(workflow_ids=[run_id], load_input=False)
        return runs[0] if runs else None

    def is_in_hand(self, run: WorkflowStatus) -> bool:
        """Tell whether a live process executes a run, or this one is about to.

        A run that waits in the queue of another process is not in hand: `prepare()` moves it.
        """
        if run.status == "ENQUEUED" and run.queue_name == self.queue:
            shared = self.queue != self.id  # a queue that many share is never deleted
            return self.launched and (shared or self.has_queue())
        if run.status != "PENDING":
            return False
        if run.executor_id == self.id:
            return self.launched and loop_lives() and run.workflow_id not in self.lost
        return not self.locks.is_dead(f"{run.executor_id}")

    def has_queue(self) -> bool:
        """Tell whether the queue exists. Others delete it if this process seems to have died."""
        return self.client.retrieve_queue(self.queue) is not None

    def make_ready(self) -> None:
        """Do what must be done before a run is put into the queue.

        Raises:
            ResearchError: There is no key, or no such model. No run is stored then. (A key that the
                provider refuses is found by the first model request, and fails the run.)
        """
        with self.starting:
            self.trouble = None  # that of an earlier run may have passed
            if self.agent is None:
                self.agent = self.build(self.settings, self.brief)
                tools.service = self.settings.service
                logging.getLogger("dbos").addFilter(lambda record: read_log(self, record))
            # Others must see that this process lives before it takes its first run. So its lock is
            # taken now; on Postgres each connection of DBOS takes it, by these options.
            self.engine_options = self.locks.show_that_this_process_lives(self.id)
            # DBOS looks for new queues when it is launched, and then only once a second.
            if not self.has_queue():
                self.client.register_queue(
                    self.queue, worker_concurrency=10, polling_interval_sec=0.1
                )

    def launch(self) -> None:
        """Let DBOS execute the runs of the queue, from now on, in threads of this process."""
        with self.starting:
            if self.launched:
                return
            address = self.settings.database_url.render_as_string(hide_password=False)
            DBOS(
                config={
                    "name": config.APP_NAME,
                    "application_version": APP_VERSION,
                    "executor_id": self.id,
                    "system_database_url": address,
                    "db_engine_kwargs": self.engine_options,
                    "run_migrations": False,  # open_database() has done it
                }
            )
            # Without this line, this process would take runs from the queues of others, too.
            DBOS.listen_queues([self.queue])
            try:
                DBOS.launch()
            except BaseException:
                DBOS.destroy()  # or DBOS would believe that it is launched, at the next try
                raise
            self.launched = True
            delete_queues_of_the_dead(self)


# ---------------------------------------------------------------- 4. details


@dataclass(frozen=True)
class Finished:
    """A run that has its report."""

    run: WorkflowStatus
    report: Any
    steps: list[StepInfo]
    restored: list[StepInfo]
    """Those that were stored when this call last put the run into the queue."""


@dataclass(frozen=True)
class Prepared:
    """A run that is now in this process's queue."""

    found: str
    """The state in which it was found, for people: nothing depends on these words."""
    restored: list[StepInfo]


class RunFailed(ResearchError):  # noqa: N818 - it reads as what happened
    """The run has no report. The same command resumes it."""

    exit_code = 1


def is_over(executor: Executor, run: WorkflowStatus, tries: int) -> bool:
    """Tell whether a run has ended, or cannot be brought to its end by this process."""
    if executor.launched and not loop_lives():
        return True
    # Lost for the second time: then the reason is a lasting one.
    return run.status not in OPEN or (tries > 1 and run.workflow_id in executor.lost)


def loop_lives() -> bool:
    """Tell whether DBOS's event loop runs. A tool that calls `sys.exit()` ends its thread."""
    return any("_run_event_loop" in thread.name for thread in threading.enumerate())


def delete_queues_of_the_dead(executor: Executor) -> None:
    """Delete the queues of processes that have died, or their rows would pile up."""
    with suppress(*config.DATABASE_ERRORS):  # then the next process that launches does it
        for queue in executor.client.list_queues():
            if config.is_executor_id(queue.name) and executor.locks.is_dead(queue.name):
                executor.client.delete_queue(queue.name)


TROUBLE = (
    "Database connection",
    "Exception encountered in queue thread",
    "Exception finding work for queue",
    "Exception listing queues",
)


def read_log(executor: Executor, record: logging.LogRecord) -> bool:
    """Note a run that DBOS gives up, and why it cannot take one from a queue or store something.

    It is a log filter, which lets all records pass. DBOS 3.4 tells only its log that it could not
    store how a run ended, that a tool has raised CancelledError, or that it does not know a run's
    workflow. The run stays PENDING. While this process lives, everybody would wait for it.
    """
    text, run_id = record.getMessage(), None
    if text.startswith(TROUBLE):
        executor.trouble = sys.exc_info()[1]  # the error that DBOS is dealing with
    if text.startswith(("Exception encountered in asynchronous", "Asyncio task cancelled")):
        run_id = DBOS.workflow_id if DBOS.step_id is None else None
    elif text.startswith("Error executing workflow "):
        run_id, _, text = text.removeprefix("Error executing workflow ").partition(": ")
    if run_id:
        with suppress(*config.DATABASE_ERRORS):
            # The error of a run that fails is logged, too, but after its end was stored.
            run = executor.look(run_id)
            if run and (run.status, run.executor_id) != ("PENDING", executor.id):
                return True
        error = record.exc_info and record.exc_info[1]
        executor.lost[run_id] = describe(error) if error else text
    return True


def raise_trouble(executor: Executor) -> None:
    """Raise what keeps DBOS from its work, or all who wait for that would wait in silence."""
    error, executor.trouble = executor.trouble, None
    if isinstance(error, config.DATABASE_ERRORS):
        raise error  # `while_the_database_is_away()` decides
    if error:
        raise ResearchError(
            f"DBOS cannot take the run from its queue: {describe(error)}\n"
            "Run the same command again: what finished is stored."
        )


def refuse_other_code(run: WorkflowStatus) -> None:
    """Raise `ResearchError` if DBOS would wait for another program to execute a run, for ever."""
    if run.app_version != APP_VERSION:
        raise ResearchError(
            f"run {run.workflow_id} belongs to version {run.app_version} of this app, which is"
            f" version {APP_VERSION}.\n"
            "Finish it with that version, or start a new run with another --bucket."
        )
    if run.name != config.WORKFLOW_NAME:
        raise ResearchError(
            f"run {run.workflow_id} is one of another workflow, {run.name}.\n"
            "Start a new run with another --bucket."
        )


def find_failure(run: WorkflowStatus, steps: list[StepInfo]) -> tuple[int, object] | None:
    """Return the number of the step from which a failed run must go on, and the error."""
    asked = [step["function_id"] for step in steps if step["function_name"] == MODEL_REQUEST]
    last = steps[-1]["function_id"] if steps else 0
    for step in reversed(steps):
        number, error = step["function_id"], step["error"]
        # A ModelRetry is not a failure: it went back to the model, which has dealt with it.
        if error is None or isinstance(error, ModelRetry):
            continue
        # If other steps followed, the tool has caught the error, and has dealt with it, unless the
        # run ended by it: then the tool has raised it again, for example after it had cleaned up.
        ended_by_it = run.status == "ERROR" and describe(run.error) == describe(error)
        if number < last and not ended_by_it:
            continue
        earlier = [request for request in asked if request < number]
        if number in asked and earlier and is_refused_for_content(error):
            # What the provider refuses is in the history, so each later request would fail.
            return earlier[-1], error
        return number, error
    if run.status != "ERROR":
        return None
    # No step failed. If the run could not use the model's last answer, or what a tool returned for
    # it, ask the model again: that answer, and what it led to, is dropped. A tool's own code that
    # fails right after the answer may fail by its arguments.
    unusable = isinstance(run.error, UnicodeEncodeError | PydanticSerializationError)
    if last in (0, *asked):
        unusable = isinstance(run.error, ValueError | TypeError)
    if unusable or isinstance(run.error, ai_error.AgentRunError):
        return max(asked, default=1), run.error
    # It failed between two steps, for example by a bug in a tool that calls steps: keep them all.
    return last + 1, run.error


def is_refused_for_content(error: object) -> bool:
    """Tell whether a provider has refused what it was sent: not its size, the key or the model."""
    refused = isinstance(error, ai_error.ModelRequestRejectedError) or (
        isinstance(error, ai_error.ModelHTTPError) and error.status_code in (400, 422)
    )
    # Pydantic AI knows a refusal for want of money, but not Anthropic's at a spend limit: a 400.
    spent = "API usage limits" in str(error)
    return refused and not spent and not isinstance(error, OTHER_REFUSALS)


OTHER_REFUSALS = (
    ai_error.ModelAuthenticationError,
    ai_error.ModelNotFoundError,
    ai_error.ModelQuotaExceededError,
    ai_error.ModelContextWindowExceededError,
)


class Waiting:
    """What one call of `research()` does while it cannot go on: wait, and say for what."""

    def __init__(self, executor: Executor) -> None:
        """Wait on behalf of this process."""
        self.executor = executor
        self.told, self.printed = "", 0.0

    @contextmanager
    def for_lock(self, run_id: str) -> Iterator[None]:
        """Hold the lock of a run, as soon as no other process or thread holds it."""
        self._take(run_id)
        try:
            yield
        finally:
            self.executor.locks.free(run_id)

    def still_has_lock(self, run_id: str) -> bool:
        """Tell whether the lock of a run was held all the time; if not, wait until it is again.

        A cut connection or a deleted file frees it, and then another process may have had it.
        """
        if self.executor.locks.is_held(run_id):
            return True
        self.executor.locks.free(run_id)
        self._take(run_id)
        return False

    def _take(self, run_id: str) -> None:
        taken, holder = False, "another process"
        while not taken:
            with self.while_the_database_is_away():
                taken = self.executor.locks.take(run_id)
                if not taken:
                    run = self.executor.look(run_id)
                    if run and run.status == "PENDING":
                        holder = f"{run.executor_id}"
                    self._wait(run_id, holder)

    def for_a_moment(self, run: WorkflowStatus) -> None:
        """Wait a moment for a run that a live process has in hand."""
        if run.status == "ENQUEUED" or run.executor_id == self.executor.id:
            raise_trouble(self.executor)
            time.sleep(0.05)  # it is this process, which prints what it does
        else:
            self._wait(run.workflow_id, f"{run.executor_id}")

    @contextmanager
    def while_the_database_is_away(self) -> Iterator[None]:
        """Wait after a database error that passes, such as a lost connection; raise any other."""
        try:
            yield
        except config.DATABASE_ERRORS as error:
            if not config.passes(error):
                raise config.database_error(self.executor.settings, error) from error
            reason = config.reason_of(error)
            self._tell(f"  the database does not answer, so this waits: {reason}", always=True)
            time.sleep(1)  # DBOS waits as well

    def _wait(self, run_id: str, holder: str) -> None:
        self._tell(
            f"Run {run_id}: being executed by {holder}. Process"
            f" {os.getpid()} waits for it and executes nothing; every 15 seconds it says so."
        )
        self.executor.locks.rest()
        time.sleep(1)

    def _tell(self, text: str, always: bool = False) -> None:
        if tools.output.show == "nothing" and not always:
            return
        if text != self.told:
            print_wrapped(text)
        elif time.monotonic() > self.printed + 15:
            print_line("  still waiting")
        else:
            return
        self.told, self.printed = text, time.monotonic()


# ---------------------------------------------------------------- 5. what people see


def tell_found(executor: Executor, request: ResearchRequest, found: str) -> None:
    """Print the first line: which run this is, and how it was found."""
    if tools.output.show == "nothing":
        return
    script = ", a script" if request.model == "offline" else ""
    print_wrapped(f"Run {request.run_id}: {found}.")
    print_wrapped(
        f"Process {os.getpid()}. Model: {request.model}{script}."
        f" Database: {executor.settings.database_label}."
    )


def print_report(report: Any) -> None:
    """Print a report, field by field if it has fields."""
    print_line("")
    for name, value in report if isinstance(report, BaseModel) else [("answer", report)]:
        text = "; ".join(map(str, value)) if isinstance(value, list) else str(value)
        print_wrapped(f"{name:<24}{text}", indent=24)


def print_steps(steps: list[StepInfo], restored: list[StepInfo]) -> None:
    """Print where each step's result came from, and what checkpoints saved."""
    print_line(f"\n{'step':<31}{'this time':<11}{'seconds':>9}{'tokens':>9}{'US$':>11}")
    stored = {step["function_id"] for step in restored}
    requests, tokens, seconds = 0, 0, 0.0
    for step in steps:
        number = step["function_id"]
        took = ((step["completed_at_epoch_ms"] or 0) - (step["started_at_epoch_ms"] or 0)) / 1000
        usage = step["output"].usage if isinstance(step["output"], ai.ModelResponse) else None
        line = f"{number:>2}  {'model request' if usage else step['function_name']:<27}"
        if number in stored:
            line += "restored"
            requests += usage is not None
            tokens += usage.total_tokens if usage else 0
            seconds += took
        else:
            cost = f"{usage.cost:.5f}" if usage and usage.cost is not None else ""
            line += f"{'ran':<11}{took:>9.1f}{usage.total_tokens if usage else '':>9}{cost:>11}"
        print_line(line.rstrip())
    saved = f"model requests {requests}, tokens {tokens}, seconds {seconds:.1f}"
    # The first step is a model request, so without one nothing was restored.
    print_line(f"Saved by checkpoints: {saved if requests else 'nothing'}")


def failure_of(executor: Executor, run: WorkflowStatus) -> ResearchError:
    """Return the error that says how a run without a report has ended."""
    failed = [
        step for step in executor.client.list_workflow_steps(run.workflow_id) if step["error"]
    ]
    if isinstance(run.error, config.DATABASE_ERRORS) and not failed:
        return config.database_error(executor.settings, run.error)  # DBOS could not store a step
    return RunFailed(describe_end(executor, run))


def describe_end(executor: Executor, run: WorkflowStatus) -> str:
    """Say how a run without a report has ended, and what to do."""
    cure = "Finished steps are stored. Run the same command to resume."
    if run.status in OPEN:
        reason = executor.lost.get(run.workflow_id, "a step has ended DBOS's event loop")
        return f"DBOS has given the run up: {reason}\n{cure}"
    if run.status != "ERROR":
        return f"the run was {run.status.lower().replace('_', ' ')}\n{cure}"
    if isinstance(run.error, ai_error.ModelContextWindowExceededError) or (
        is_refused_for_content(run.error)
        and len(executor.client.list_workflow_steps(run.workflow_id)) == 1
    ):
        cure = "It would be refused again: take another --bucket, or another MODEL."
    return f"the run failed: {describe(run.error)}\n{cure}"


def describe(error: object) -> str:
    """Describe an error in one line."""
    if not isinstance(error, BaseException):
        return "an error that can no longer be read"
    if isinstance(error, dbos_error.DBOSMaxStepRetriesExceeded):
        last = describe(error.errors[-1])
        return f"{error.step_name} failed {error.max_retries} times, last {last}"
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200)


def count_finished(steps: list[StepInfo]) -> str:
    """Say how many steps are stored that did not fail."""
    count = sum(step["error"] is None for step in steps)
    return f"{count} finished step{'' if count == 1 else 's'}"


def print_wrapped(text: str, indent: int = 0) -> None:
    """Fold a paragraph to the 80 columns of a terminal."""
    for line in textwrap.wrap(text, 80, subsequent_indent=" " * indent, break_on_hyphens=False):
        print_line(line)


# ---------------------------------------------------------------- 6. the command


def main() -> int:
    """Run the command line; return its exit code."""
    parser = make_parser("Research a company with an agent that survives being killed.")
    parser.add_argument("--verbose", action="store_true", help="show DBOS's log and tracebacks")
    options = parser.parse_args()
    return run_command(lambda: research_company(options), options.verbose)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that `research_company()` reads; a command may add others."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Exit codes: 0 finished; 1 the run failed, run again to resume; 2 bad usage, "
        "configuration or database, or a run of other code; 130 interrupted by Ctrl-C.",
    )
    parser.add_argument("company", nargs="?", default="Quantum Compute Corp")
    parser.add_argument("--bucket", default="", help="any text: a new one is a new run")
    parser.add_argument("--crash", action="store_true", help="die by SIGKILL in the flaky tool")
    return parser


def research_company(
    options: argparse.Namespace,
    brief: Brief = BRIEF,
    build: Callable[[Settings, Brief], object] = build_agent,
) -> int:
    """Bring the run of one company to its end, and print its report."""
    settings = config.load_settings()
    settings.service.crash = options.crash
    request = settings.request(brief, options.company, options.bucket)
    executor = Executor(settings, brief, build)
    finished = research(executor, request)
    print_report(finished.report)
    print_steps(finished.steps, finished.restored)
    if options.crash:
        print_line("--crash found nothing to kill: this process did not call the flaky tool.")
    if executor.launched:
        # Once more: that a process of another machine is dead is known only after some seconds.
        delete_queues_of_the_dead(executor)
    with suppress(*config.DATABASE_ERRORS):  # the next process that launches does it, too
        executor.client.delete_queue(executor.id)
    return 0


def run_command(command: Callable[[], int], verbose: bool = False) -> int:
    """Run a command as a person expects it: an error is a line or two, and Ctrl-C loses nothing.

    Returns:
        The command's exit code. After an error, this process ends here.
    """
    signal.signal(signal.SIGINT, end_by_ctrl_c)
    if os.getpid() == 1:  # in a container, where the system would ignore SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name must not fail a run by being printed
            stream.reconfigure(errors="backslashreplace")
    for name in ("dbos", "psycopg"):  # without a handler, Python would print their warnings
        logging.getLogger(name).addHandler(logging.NullHandler())
    if sys.stdout is None:
        tools.output.error = OSError("it is closed")
    if verbose:
        logging.basicConfig(level=logging.INFO)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(ShownFormatter(logging.BASIC_FORMAT))
        # It logs each request's address, and there may be a password in a base URL.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        code = command()
        if tools.output.error and not isinstance(tools.output.error, BrokenPipeError):
            raise ResearchError(
                f"standard output cannot be written: {tools.output.error}\n"
                "The run has finished. Run the same command to print its report."
            )
        return code
    except (ResearchError, OSError) as error:
        told = traceback.format_exc() if verbose else ""
        write_error(tools.shown(f"{told}error: {error}\n"))
        # Not returned: a thread of DBOS may wait for the database, for ever, and Python for it.
        os._exit(getattr(error, "exit_code", 2))


def end_by_ctrl_c(*_: object) -> None:
    """Say that nothing is lost, and end before a thread of DBOS begins another step."""
    write_error("\nInterrupted: what finished is stored. Run the same command to resume.\n")
    os._exit(130)


def write_error(text: str) -> None:
    """Write to standard error, if there is one: its number may be that of another file."""
    if sys.stderr is not None:
        with suppress(OSError):
            os.write(2, text.encode(sys.stderr.encoding, "backslashreplace"))


class ShownFormatter(logging.Formatter):
    """Show control characters in the log: what a model or a service writes may be in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return tools.shown(super().format(record))


if __name__ == "__main__":
    gc.freeze()  # or Python would look through all the imports when it ends: that takes 0.3 s
    sys.exit(main())
