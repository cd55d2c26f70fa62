"""The app, broken on purpose: the kill tests have to catch each of these variants.

A variant changes the process of the app in which it is applied: see `child.main`.

Two locks guard a run: its own, and that of the process which executes it. For most of what can
happen, one of them is enough. So some of these variants are without both.
"""

import inspect
import uuid
from typing import Any, cast

from dbos import DBOS, DBOSClient

import agent
import config
import tools


def break_app(variant: str) -> None:
    """Break the app in this process."""
    {
        "a tool without @DBOS.step": make_a_tool_no_step,
        "the checkpoint of a step is deleted when its run is resumed": delete_a_checkpoint,
        "all processes have DBOS's default executor ID": share_the_executor_id,
        "no lock of the run": take_no_lock_of_the_run,
        "no lock of the process, and that of the run is let go before the execution": let_go,
        "a dead process is taken for a live one": believe_in_life,
        "a failed run is resumed, not rewound": find_no_failure,
        "a run is resumed whose step has failed, and whose end was not stored": find_few_failures,
        "a failed run is rewound to one step too early": rewind_too_far,
        "a random run ID": make_the_run_id_random,
        "a key that changes with each attempt": change_the_key,
        "a run of another version is not refused": refuse_nothing,
    }[variant]()


LOCKS: list[Any] = [config.FileLocks, config.SessionLocks]


def make_a_tool_no_step() -> None:
    first, *others = tools.BRIEF.tools
    object.__setattr__(tools.BRIEF, "tools", [inspect.unwrap(cast(Any, first)), *others])


def delete_a_checkpoint() -> None:
    resume = DBOSClient.resume_workflow

    def resume_with_less(self: DBOSClient, workflow_id: str, **options: Any) -> Any:
        outputs = self._sys_db.tables.operation_outputs
        with self._sys_db.engine.begin() as connection:
            connection.execute(outputs.delete().where(outputs.c.function_id == 2))
        return resume(self, workflow_id, **options)

    replace(DBOSClient, resume_workflow=resume_with_less)


def share_the_executor_id() -> None:
    replace(config, make_executor_id=lambda: "local")


def take_no_lock_of_the_run() -> None:
    for kind in LOCKS:
        take, free = kind.take, kind.free
        replace(
            kind,
            take=lambda self, name, take=take: name.startswith("research-") or take(self, name),
            free=lambda self, name, free=free: name.startswith("research-") or free(self, name),
            is_held=lambda *_: True,
        )


def let_go() -> None:
    prepare = agent.prepare

    def prepare_and_let_go(executor: Any, request: Any, run: Any) -> Any:
        prepared = prepare(executor, request, run)
        executor.locks.free(request.run_id)
        return prepared

    replace(agent, prepare=prepare_and_let_go)
    config.SessionLocks.PATIENCE = 0
    for kind in LOCKS:
        replace(kind, show_that_this_process_lives=lambda *_: {})
    free = config.FileLocks.free
    replace(
        config.FileLocks,
        free=lambda self, name: free(self, name) if name in self.held else None,
    )


def believe_in_life() -> None:
    for kind in LOCKS:
        replace(kind, is_dead=lambda *_: False)


def find_no_failure() -> None:
    replace(agent, find_failure=lambda *_: None)


def find_few_failures() -> None:
    find = agent.find_failure
    replace(
        agent,
        find_failure=lambda run, steps: None if run.status in agent.OPEN else find(run, steps),
    )


def rewind_too_far() -> None:
    find = agent.find_failure

    def find_earlier(run: Any, steps: Any) -> Any:
        found = find(run, steps)
        return found and (found[0] - 1, found[1])

    replace(agent, find_failure=find_earlier)


def make_the_run_id_random() -> None:
    run_id = f"research-acme-{uuid.uuid4().hex[:16]}"
    replace(config.ResearchRequest, run_id=property(lambda _: run_id))


def change_the_key() -> None:
    def key(tool: str, **_: object) -> str:
        return f"{DBOS.workflow_id}:{tool}:{uuid.uuid4().hex[:16]}"

    replace(tools, idempotency_key=key)


def refuse_nothing() -> None:
    replace(agent, refuse_other_code=lambda _: None)


def replace(owner: Any, **functions: Any) -> None:
    """Replace functions of a module or a class."""
    for name, function in functions.items():
        assert hasattr(owner, name), f"{owner} has no {name} to break"
        setattr(owner, name, function)
