"""In which state each stored run really is, and which command moves it on.

Traps:
- A run that DBOS calls PENDING may be executed, wait for a person, or have lost its process.
- DBOS looks for attributes on Postgres only, so whoever needs them filters the runs itself.
- A workflow of the same name may have been stored by another program, with any attributes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy
from dbos import WorkflowStatus

from agent import APP_VERSION, DEFINITION, parse_question
from config import Settings
from durable import Database, DurableError, Executor, raise_as_outcome
from durable.console import quote
from durable.executor import LOST
from durable.failures import OPEN, describe, name_of_state
from recipes import many

WAITS_FOR = "waits_for"
"""The DBOS event in which a run tells for which answers of a person it waits: name to question."""
TEXTS = ("program", "label", "bucket", "model", "tenant_id", "user_id", "fingerprint")
"""What `Question.attributes` stores beside the words of a question."""


def attributes_of(run: WorkflowStatus) -> dict[str, Any]:
    """Return what a question has stored beside its run; {} if something else has stored that."""
    stored: Any = run.attributes
    if not isinstance(stored, dict) or not isinstance(stored.get("words"), list):
        return {}
    return stored if all(isinstance(stored.get(name), str) for name in TEXTS) else {}


def asker_of(run: WorkflowStatus) -> dict[str, str]:
    """Return what a run and its command must have in common, beside what was asked."""
    return {key: attributes_of(run).get(key, "") for key in ("model", "tenant_id", "user_id")}


def is_of_our_command(settings: Settings, run: WorkflowStatus) -> bool:
    """Tell whether the command of this agent with the stored words has this run, or its base."""
    stored = attributes_of(run)
    if stored.get("program") != DEFINITION.program:
        return False
    asker = replace(
        settings,
        tenant_id=stored["tenant_id"],
        user_id=stored["user_id"],
        model=replace(settings.model, name=stored["model"]),
    )
    try:
        words, bucket = stored["words"], stored["bucket"]
        question = parse_question(asker, DEFINITION, words, bucket=bucket)
    except DurableError:
        return False
    return question.run_id == (run.forked_from or run.workflow_id)


def command_of(settings: Settings, run: WorkflowStatus) -> str:
    """Return the command whose run this is; "" if it is not known."""
    stored, ours = attributes_of(run), settings.asker
    if not stored:
        return ""
    if stored["program"] == DEFINITION.program and not is_of_our_command(settings, run):
        return ""
    step = run.workflow_id.rpartition("-from-")[2]
    if run.forked_from and step.isdecimal():
        stored = {**stored, "program": "-m recipes.from_step", "words": [*stored["words"], step]}
    unlike = {key: value for key, value in asker_of(run).items() if value != ours[key]}
    variables = "".join(f"{key.upper()}={quote(value)} " for key, value in unlike.items())
    return variables + many.command_of(stored)


def find_living(executor: Executor[Any], runs: Iterable[WorkflowStatus]) -> set[str]:
    """Return the IDs of the executors of PENDING runs that live."""
    return executor.locks.find_living(
        {f"{run.executor_id}" for run in runs if run.status == "PENDING"}
    )


def why_left_alone(settings: Settings, run: WorkflowStatus, living: set[str]) -> str:
    """Return the reason why this code does not resume an unfinished run; "" if it does."""
    stored = attributes_of(run)
    if run.app_version != APP_VERSION:
        return "of another version"
    if stored.get("program") != DEFINITION.program:
        return "of another program"
    if stored["fingerprint"] != DEFINITION.fingerprint:
        return "under other instructions"
    if not is_of_our_command(settings, run):
        return "of another program"
    if run.status == "PENDING" and run.executor_id in living:
        return "executed by live processes"
    return "cancelled" if run.status == "CANCELLED" else ""


def find_question(executor: Executor[Any], run: WorkflowStatus) -> str:
    """Return the name of the question that waits for a person's answer; "" if none does."""
    if run.status not in OPEN:
        return ""
    asked = executor.client.get_event(run.workflow_id, WAITS_FOR, timeout_seconds=0) or {}
    names = (name for name in asked if not is_answered(executor.database, run.workflow_id, name))
    return next(names, "")


def is_answered(database: Database, run_id: str, name: str) -> bool:
    """Tell whether an answer is stored, received or not: DBOS has no function for that."""
    schema = "" if database.is_sqlite else "dbos."
    where = "WHERE destination_uuid = :run AND topic = :name"
    query = sqlalchemy.text(f"SELECT 1 FROM {schema}notifications {where}")  # noqa: S608
    engine = sqlalchemy.create_engine(database.url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return bool(connection.scalar(query, {"run": run_id, "name": name}))


@dataclass(frozen=True)
class Listed:
    """A run, and what a person must know of it."""

    run: WorkflowStatus
    kind: str
    """finished, failed, lost, cancelled, enqueued, interrupted, executed, or unreadable."""
    state: str
    """In words: the state, the reason for it, and what the run waits for."""
    command: str = ""
    """What moves the run on, if a command does."""
    waits_for_a_person: bool = False

    @property
    def name(self) -> str:
        """The question in one line."""
        stored = attributes_of(self.run)
        known = ", ".join(filter(None, [stored.get("label"), stored.get("bucket")]))
        return known or "not one of ours"

    def as_data(self) -> dict[str, object]:
        """Return the same for machines. Moments are in UTC."""
        stored, ended = attributes_of(self.run), self.run.completed_at
        return {
            "run_id": self.run.workflow_id,
            **{name: stored.get(name) for name in TEXTS if name != "fingerprint"},
            "version": self.run.app_version,
            "created_at": moment(self.run.created_at or 0).isoformat(),
            # When the run was last put into a queue or taken from one, or has ended.
            "updated_at": moment(self.run.updated_at or self.run.created_at or 0).isoformat(),
            "ended_at": moment(ended).isoformat() if ended else None,
            "kind": self.kind,
            "state": self.state,
            "waits_for_a_person": self.waits_for_a_person,
            "command": self.command or None,
        }


def list_runs(
    executor: Executor[Any], settings: Settings, runs: list[WorkflowStatus]
) -> list[Listed]:
    """Look at each of these runs. What one of them raises is told as its state."""
    living, listed = find_living(executor, runs), list[Listed]()
    for run in runs:
        try:
            with raise_as_outcome():
                listed.append(_look(executor, settings, run, living))
        except DurableError as error:
            listed.append(Listed(run, "unreadable", " ".join(f"{error}".split())))
    return listed


def _look(
    executor: Executor[Any], settings: Settings, run: WorkflowStatus, living: set[str]
) -> Listed:
    if run.status == "SUCCESS":
        return Listed(run, "finished", "finished")
    command, reason = command_of(settings, run), why_left_alone(settings, run, living)
    kind = state = name_of_state(run)
    if run.status == "ERROR":
        kind, state = "failed", f"failed: {describe(run.error)}"
    elif run.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
        kind = "failed"
    elif run.status == "CANCELLED" and (lost := reason_of_loss(run)):
        kind, state = "lost", f"lost, and cancelled: {lost}"
    elif run.status == "PENDING" and run.executor_id in living:
        kind, command = "executed", ""
        state = f"executed by {f'{run.executor_id}'.rpartition(':')[0]}"
    elif run.status == "PENDING":
        kind = state = "interrupted"
    if name := find_question(executor, run):
        program = attributes_of(run).get("program")
        command = f"uv run {program} --answer {run.workflow_id} {quote(name)} yes"
        return Listed(run, kind, f"waits for a person, {state}", command, waits_for_a_person=True)
    if reason in ("of another version", "under other instructions"):
        return Listed(run, kind, f"{state}, {reason}")
    return Listed(run, kind, state, command)


def reason_of_loss(run: WorkflowStatus) -> str:
    """Return why a worker has cancelled this run; "" if somebody else has."""
    lost: Any = (run.attributes or {}).get(LOST)
    # The mark stays when the run is resumed, by another process or by the same one.
    if isinstance(lost, dict) and lost.get("executor_id") == run.executor_id:
        return f"{lost.get('reason')}"
    return ""


def moment(milliseconds: float) -> datetime:
    """Return a moment as DBOS stores it."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
