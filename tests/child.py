"""What runs in the processes that tests start and kill: agent.py itself, with ears and hooks.

The tests start them from a forkserver that has already imported the libraries, so that a process
costs a tenth of a second instead of two. The code under test is the product's: only the simulated
service, the offline script and DBOS's writing of checkpoints are listened to, and killed at.
"""

import asyncio
import itertools
import os
import resource
import signal
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import dbos._core
import dbos._dbos
import sqlalchemy
from dbos import DBOS
from dbos._sys_db import SystemDatabase
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo, DeltaToolCalls

import agent
import config
import tools


def note(line: str) -> None:
    """Append a line to the ledger: one write, so that processes do not mix theirs."""
    with Path(os.environ["LEDGER"]).open("ab", buffering=0) as ledger:
        ledger.write(f"{os.getpid()} {line}\n".encode())


def reach(point: str) -> None:
    """Die here, or wait here until the test opens the gate, if the test says so."""
    while at_gate(point):
        time.sleep(0.01)


async def reach_async(point: str) -> None:
    """Like `reach`, in an event loop."""
    while at_gate(point):
        await asyncio.sleep(0.01)  # another process opens the gate


def at_gate(point: str) -> bool:
    """Die, or tell whether to wait."""
    if point == os.environ.get("KILL_AT"):
        note(f"killed {point}")
        os.kill(os.getpid(), signal.SIGKILL)
    if point != os.environ.get("WAIT_AT"):
        return False
    if point not in waited:
        waited.add(point)
        note(f"waiting {point}")
    return not os.access(os.environ["LEDGER"] + ".gate", os.F_OK)


waited: set[str] = set()


class LedgerService(tools.SimulatedService):
    """The simulated service, with each call's effect noted outside the process."""

    async def overview(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
        await reach_async("inside 2")
        payload = await super().overview(company_name, idempotency_key)
        note(f"effect overview {idempotency_key}")
        await reach_async("after effect 2")
        return payload

    async def financials(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
        await reach_async("inside 3")
        if "OUTAGE" in os.environ:
            raise PermissionError("the service is closed today")
        payload = await super().financials(company_name, idempotency_key)
        note(f"effect financials {idempotency_key}")
        await reach_async("after effect 3")
        return payload


def listen_to_model() -> None:
    """Note each request to the offline stand-in."""
    script = agent.offline_script

    async def noted(
        messages: list[ai.ModelMessage], info: AgentInfo
    ) -> AsyncIterator[DeltaToolCalls]:
        await reach_async(f"inside {DBOS.step_id}")
        note(f"effect model {DBOS.workflow_id}:{DBOS.step_id}")
        await reach_async(f"after effect {DBOS.step_id}")
        async for delta in script(messages, info):
            yield delta

    agent.offline_script = noted


def listen_to_database() -> None:
    """Note each commit, and come past a point before and after every write that matters."""

    def hook(name: str, what: Callable[[tuple[Any, ...]], str]) -> None:
        write = getattr(SystemDatabase, name)

        def listened(self: Any, *args: Any, **kwargs: Any) -> Any:
            point = what(args)
            reach(f"before {point}")
            note(f"try {point}")
            result = write(self, *args, **kwargs)
            if name == "record_operation_result" and args[0]["error"] is None:
                note(f"stored {args[0]['workflow_uuid']}:{args[0]['function_id']}")
            if name != "start_queued_workflows" or result[0]:
                note(f"done {point}")
                reach(f"after {point}")
            return result

        setattr(SystemDatabase, name, listened)

    hook("init_workflow", lambda _: "start")
    hook("check_operation_execution", lambda args: f"body {args[1]}")
    hook("record_operation_result", lambda args: f"commit {args[0]['function_id']}")
    hook("update_workflow_outcome", lambda args: f"outcome {args[1]}")
    hook("resume_workflows", lambda _: "resume")
    hook("cancel_workflows", lambda _: "cancel")
    hook("rewind_workflow", lambda _: "rewind")
    hook("start_queued_workflows", lambda _: "dequeue")
    hook("init_workflow_with_connection", lambda args: f"insert {args[0]['attributes']['company']}")


def listen_to_statements() -> None:
    """Die at the nth SQL statement of this process, if the test says so."""
    fatal = int(os.environ.get("KILL_AT_STATEMENT", "0"))
    numbers = itertools.count(1)

    def before(*_: Any) -> None:
        if next(numbers) == fatal:
            note(f"killed at statement {fatal}")
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", before)


class Impatient:
    """An event on which nobody waits for longer than a moment."""

    def __init__(self, event: threading.Event) -> None:
        self.is_set = event.is_set
        self.wait = lambda timeout: event.wait(min(timeout, 0.1))


def hasten_queues() -> None:
    """Let DBOS look for queues, their runs and runs in flight more often than once a second."""
    clock = types.SimpleNamespace(time=time.time, sleep=lambda wait: time.sleep(min(wait, 0.05)))
    vars(dbos._dbos)["time"] = clock
    serve = vars(dbos._dbos)["queue_thread"]
    vars(dbos._dbos)["queue_thread"] = lambda event, engine: serve(Impatient(event), engine)


def hasten_retries() -> None:
    """Note how long DBOS may wait between attempts, and let it wait a hundredth of that."""
    invoke = dbos._core.invoke_step

    def invoke_soon(*args: Any, interval_seconds: float, **kwargs: Any) -> Any:
        waits = range(kwargs["max_attempts"] - 1 if kwargs["retries_allowed"] else 0)
        seconds = sum(interval_seconds * kwargs["backoff_rate"] ** wait for wait in waits)
        note(f"waits {kwargs['step_name']} {seconds}")
        return invoke(*args, interval_seconds=interval_seconds / 100, **kwargs)

    dbos._core.invoke_step = invoke_soon


def listen_to_traces() -> None:
    """Note each span, and send none."""
    import logfire
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Noted(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            for span in spans:
                note(f"span {span.name}")
            return SpanExportResult.SUCCESS

    configure = logfire.configure
    vars(logfire)["configure"] = lambda **settings: configure(
        **settings,
        send_to_logfire=False,
        additional_span_processors=[SimpleSpanProcessor(Noted())],
    )


def main(
    arguments: list[str], environment: dict[str, str], output: str, patches: dict[str, Any]
) -> None:
    """Run agent.py's command line in this process, which is a fresh one."""
    os.setsid()
    os.chdir("/")
    for path, stream in ((output + ".out", sys.stdout), (output + ".err", sys.stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1 if stream is sys.stdout else 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    config.PROJECT = Path(environment["HOME"])
    tools.service = LedgerService()
    vars(agent)["APP_VERSION"] = patches.pop("version", config.APP_VERSION)
    vars(agent)["GRACE"] = patches.pop("grace", agent.GRACE)
    vars(agent)["RELOCK"] = patches.pop("relock", agent.RELOCK)
    if stdin := patches.pop("stdin", None):
        sys.stdin = open(stdin)  # noqa: SIM115
    if limit := patches.pop("file_size", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if patches.pop("unprivileged", None) and os.getuid() == 0:
        os.setuid(65534)  # root may write everything
    agent.MODEL_STEP.update(patches)
    listen_to_model()
    listen_to_database()
    listen_to_statements()
    hasten_queues()
    hasten_retries()
    if "LOGFIRE_TOKEN" in environment:
        listen_to_traces()
    signal.signal(signal.SIGINT, agent.end_by_ctrl_c)  # as where agent.py is the main program
    sys.argv = ["agent.py", *arguments]
    sys.exit(agent.main())
