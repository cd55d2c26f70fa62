"""What runs in the processes that tests start and kill: agent.py itself, with ears and hooks.

The tests start them from a forkserver that has already imported the libraries, so that a process
costs a tenth of a second instead of two. The code under test is the product's: only the simulated
service, the offline script and DBOS's writing of checkpoints are listened to, and killed at.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import dbos._core
import dbos._sys_db
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo, DeltaToolCalls

import agent
import config
import tools


def note(line: str) -> None:
    """Append a line to the ledger: one write, so that processes do not mix theirs."""
    with Path(os.environ["LEDGER"]).open("ab", buffering=0) as ledger:
        ledger.write(f"{os.getpid()} {line}\n".encode())


async def kill_or_wait(point: str) -> None:
    """Die here, or wait here until the test opens the gate, if the test says so."""
    if point == os.environ.get("KILL_AT"):
        note(f"killed {point}")
        os.kill(os.getpid(), signal.SIGKILL)
    if point == os.environ.get("WAIT_AT"):
        note(f"waiting {point}")
        gate = os.environ["LEDGER"] + ".gate"
        while not os.access(gate, os.F_OK):  # noqa: ASYNC110 - another process opens it
            await asyncio.sleep(0.01)


class LedgerService(tools.SimulatedService):
    """The simulated service, with each call's effect noted outside the process."""

    async def overview(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
        await kill_or_wait("before overview")
        payload = await super().overview(company_name, idempotency_key)
        note(f"effect overview {idempotency_key}")
        await kill_or_wait("after overview")
        return payload

    async def financials(self, company_name: str, idempotency_key: str) -> dict[str, Any]:
        await kill_or_wait("before financials")
        payload = await super().financials(company_name, idempotency_key)
        note(f"effect financials {idempotency_key}")
        await kill_or_wait("after financials")
        return payload


def listen_to_model() -> None:
    """Note each request to the offline stand-in."""
    script = agent.offline_script

    async def noted(
        messages: list[ai.ModelMessage], info: AgentInfo
    ) -> AsyncIterator[DeltaToolCalls]:
        note("effect model")
        await kill_or_wait(f"model {len(messages)}")
        async for delta in script(messages, info):
            yield delta

    agent.offline_script = noted


def listen_to_checkpoints() -> None:
    """Note each committed step, and die right before or right after a commit if told so."""

    def hook(name: str, what: Callable[[Any], str]) -> None:
        write = getattr(dbos._sys_db.SystemDatabase, name)

        def listened(self: Any, *args: Any, **kwargs: Any) -> Any:
            point = what(args)
            asyncio.run(kill_or_wait(f"before commit {point}"))
            result = write(self, *args, **kwargs)
            note(f"committed {point}")
            asyncio.run(kill_or_wait(f"after commit {point}"))
            return result

        setattr(dbos._sys_db.SystemDatabase, name, listened)

    hook("record_operation_result", lambda args: str(args[0]["function_id"]))
    hook("update_workflow_outcome", lambda args: f"outcome {args[1]}")


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
    tools.SimulatedService = LedgerService  # type: ignore[misc]
    vars(agent)["APP_VERSION"] = patches.pop("version", config.APP_VERSION)
    agent.MODEL_STEP.update(patches)
    listen_to_model()
    listen_to_checkpoints()
    hasten_retries()
    sys.argv = ["agent.py", *arguments]
    sys.exit(agent.main())
