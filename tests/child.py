"""What runs in the processes that tests start and kill: the app itself, with ears and hooks.

The tests start them from a forkserver that has already imported the libraries, so that a process
costs a tenth of a second instead of two. The code under test is the product's. Replaced are

- the simulated service and the offline script, by ones that note each call and then do the same;
- DBOS's wait between two attempts of a step, by a hundredth of it, and what is the whole of it is
  noted: which attempts there are, and what is stored of them, is DBOS's own work as before;
- the clock of `DBOS.destroy()`, which looks once a second whether all runs have ended.

Everything else only listens: methods of DBOS's system database note that they are entered and left,
and are done by DBOS. So a kill at one of these points is a real SIGKILL of a real process between
two real writes, and the judges are outside: the ledger file, the database, a provider's requests.

The points at which a test can kill (KILL_AT), or let a process wait (WAIT_AT) until it opens the
gate. Each of the first ones has a "before" and an "after":

| point            | the moment                                                                    |
|------------------|-------------------------------------------------------------------------------|
| enqueue          | a new run is stored in a queue                                                |
| look             | a worker looks for runs that dead processes have left                         |
| register         | the queue is registered                                                       |
| launch           | DBOS is launched                                                              |
| dequeue          | DBOS takes a run from the queue (after: when there was one)                   |
| body N           | DBOS looks whether step N is stored (after: its body comes next, or not)      |
| commit N         | the checkpoint of step N is stored                                            |
| outcome STATUS   | the end of the run is stored                                                  |
| resume, rewind   | a run that was left is put into a queue                                       |
| cancel           | a run whose step has failed is made ready for the rewind                      |
| fork             | a fork of a run is stored                                                     |
| inside N         | step N has begun, and had no effect yet                                       |
| after effect N   | step N has had its effect, and has not returned yet                           |
"""

import asyncio
import functools
import importlib
import itertools
import os
import resource
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import dbos._core
import dbos._dbos
import sqlalchemy
from dbos import DBOS
from dbos._sys_db import SystemDatabase
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo
from variants import break_app

import agent
import config
import tools
from recipes import worker


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

    async def overview(self, company_name: str, key: str) -> dict[str, Any]:
        await reach_async("inside 2")
        payload = await super().overview(company_name, key)
        note(f"effect overview {DBOS.workflow_id}:{DBOS.step_id}")
        await reach_async("after effect 2")
        return payload

    async def financials(self, company_name: str, key: str) -> dict[str, Any]:
        await reach_async("inside 3")
        if "RAISE" in os.environ:
            raise RAISED[os.environ["RAISE"]]
        if os.environ.get("OUTAGE") == "database":
            raise sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("no such table"))
        if "OUTAGE" in os.environ:
            raise PermissionError("the service is closed today")
        payload = await super().financials(company_name, key)
        note(f"effect financials {DBOS.workflow_id}:{DBOS.step_id}")
        await reach_async("after effect 3")
        return payload


RAISED = {"CancelledError": asyncio.CancelledError(), "SystemExit": SystemExit(1)}


def listen_to_model() -> None:
    """Note each request to the offline stand-in."""
    script = tools.offline_script

    async def noted(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
        await reach_async(f"inside {DBOS.step_id}")
        note(f"effect model {DBOS.workflow_id}:{DBOS.step_id}")
        await reach_async(f"after effect {DBOS.step_id}")
        return await script(messages, info)

    tools.offline_script = noted


def listen(owner: Any, name: str, what: Callable[[tuple[Any, ...]], str]) -> None:
    """Note that a function is entered and left, and come past a point before and after it."""
    function = getattr(owner, name)

    def listened(*args: Any, **kwargs: Any) -> Any:
        point = what(args)
        reach(f"before {point}")
        note(f"try {point}")
        result = function(*args, **kwargs)
        if name == "record_operation_result" and args[1]["error"] is None:
            note(f"stored {args[1]['workflow_uuid']}:{args[1]['function_id']}")
        if name != "start_queued_workflows" or result[0]:
            note(f"done {point}")
            reach(f"after {point}")
        return result

    setattr(owner, name, listened)


def listen_to_database() -> None:
    """Note each write that matters."""
    listen(config.ResearchRequest, "enqueue", lambda _: "enqueue")
    listen(worker.Worker, "take_over", lambda _: "look")
    listen(DBOS, "launch", lambda _: "launch")
    for method, what in {
        "upsert_queue": lambda _: "register",
        "start_queued_workflows": lambda _: "dequeue",
        "check_operation_execution": lambda args: f"body {args[2]}",
        "record_operation_result": lambda args: f"commit {args[1]['function_id']}",
        "update_workflow_outcome": lambda args: f"outcome {args[2]}",
        "resume_workflows": lambda _: "resume",
        "cancel_workflows": lambda _: "cancel",
        "rewind_workflow": lambda _: "rewind",
        "fork_workflow": lambda _: "fork",
    }.items():
        listen(SystemDatabase, method, what)


def listen_to_statements() -> None:
    """Die at the nth SQL statement of this process, if the test says so."""
    fatal = int(os.environ.get("KILL_AT_STATEMENT", "0"))
    numbers = itertools.count(1)

    def before(*_: Any) -> None:
        if next(numbers) == fatal:
            note(f"killed at statement {fatal}")
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", before)


def hasten_destroy() -> None:
    """Let `DBOS.destroy()` look more often than once a second whether all runs have ended."""
    clock = types.SimpleNamespace(time=time.time, sleep=lambda wait: time.sleep(min(wait, 0.05)))
    vars(dbos._dbos)["time"] = clock


def hasten_retries() -> None:
    """Note how long DBOS may wait between attempts, and let it wait a hundredth of that."""
    invoke = dbos._core.invoke_step

    def invoke_soon(*args: Any, interval_seconds: float, **kwargs: Any) -> Any:
        waits = range(kwargs["max_attempts"] - 1 if kwargs["retries_allowed"] else 0)
        seconds = sum(interval_seconds * kwargs["backoff_rate"] ** wait for wait in waits)
        note(f"waits {kwargs['step_name']} {seconds}")
        return invoke(*args, interval_seconds=interval_seconds / 100, **kwargs)

    dbos._core.invoke_step = invoke_soon


def main(
    arguments: list[str], environment: dict[str, str], output: str, patches: dict[str, Any]
) -> None:
    """Run a command line of the app in this process, which is a fresh one."""
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
    vars(config)["SimulatedService"] = LedgerService
    version = patches.pop("version", config.APP_VERSION)
    vars(agent)["APP_VERSION"] = vars(config)["APP_VERSION"] = version
    worker.GRACE = patches.pop("grace", worker.GRACE)
    worker.LOOK = patches.pop("look", worker.LOOK)
    object.__setattr__(
        tools.BRIEF, "instructions", patches.pop("instructions", tools.BRIEF.instructions)
    )
    config.SessionLocks.PATIENCE = patches.pop("patience", config.SessionLocks.PATIENCE)
    if stdin := patches.pop("stdin", None):
        sys.stdin = open(stdin)  # noqa: SIM115
    if limit := patches.pop("file_size", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if patches.pop("unprivileged", None) and os.getuid() == 0:
        os.setuid(65534)  # root may write everything
    if variant := patches.pop("variant", None):
        break_app(variant)
    recipe, build = patches.pop("recipe", None), patches.pop("build", None)
    cast(dict[str, Any], agent.MODEL_STEP).update(patches)
    listen_to_model()
    listen_to_database()
    listen_to_statements()
    hasten_destroy()
    hasten_retries()
    sys.argv = [recipe or "agent.py", *arguments]
    if recipe:
        main = importlib.import_module(f"recipes.{recipe}").main
        if build:  # agents can be combined: one recipe's, built as another one does it
            main = functools.partial(main, importlib.import_module(f"recipes.{build}").build)
        sys.exit(agent.run_command(main))
    sys.exit(agent.main())
