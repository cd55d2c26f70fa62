"""List the runs, bring the unfinished ones to their ends, delete old ones.

    uv run -m recipes.runs                          # in which state each really is, and its command
    uv run -m recipes.runs --unfinished             # finish what this code can resume
    uv run -m recipes.runs --delete-older-than 30   # what finished more than 30 days ago
    uv run -m recipes.runs --delete-older-than 30 --failed    # failed and cancelled runs as well

Traps:
- A run that DBOS calls PENDING may be executed, wait for a person, or have lost its process.
- DBOS looks for attributes on Postgres only, so this program filters the runs itself.
- Whoever resumes a failed run holds its lock. So whoever deletes one must hold it, too.
"""

import argparse
import shlex
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from dbos import WorkflowStatus
from pydantic_ai import messages as ai

import agent
import config
from agent import OPEN, Executor
from config import ResearchRequest
from recipes import approval, conversation, own_tool, worker
from recipes.from_step import Fork
from recipes.many import Batch
from tools import BRIEF, output, print_line

BRIEFS = {
    brief.recipe: brief for brief in (BRIEF, own_tool.BRIEF, approval.BRIEF, conversation.BRIEF)
}
"""Recipe to what its runs are told today: only then is a run's command known."""
SETTINGS = ("model", "tenant_id", "user_id")
"""What a run and its command must have in common, beside what was asked."""
FAILED = ["ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
LEFT_ALONE = {
    "of another version": "finish them with the code of that version",
    "under other instructions": "finish them with the code that began them",
    "of another recipe or program": "the list shows the command of each, if it is known",
    "cancelled": "the list shows the command that resumes each",
    "executed by live processes": "wait for these processes, or stop them",
}
"""Why this code does not bring an unfinished run to its end, and what to do."""


def request_of(run: WorkflowStatus) -> ResearchRequest:
    """Return what was asked: a request with another ID than the run's if that is not our own."""
    request, step = worker.request_of(run), run.workflow_id.rpartition("-from-")[2]
    if run.forked_from and step.isdecimal():
        return Fork(**vars(request), step=int(step))
    return request


def command_of(executor: Executor, run: WorkflowStatus) -> str:
    """Return the command whose run this is; "" if it is not known."""
    asked, program = request_of(run), "agent.py"
    words = [asked.company, *(run.attributes or {}).get("turns", [])]
    if asked.recipe not in BRIEFS:
        return ""
    if asked.recipe != BRIEF.recipe:
        program = f"-m recipes.{asked.recipe}"
    elif asked.run_id != run.workflow_id:
        return ""
    elif isinstance(asked, Fork):
        program, words = "-m recipes.from_step", [*words, f"{asked.step}"]
    theirs, ours = vars(asked), vars(executor.settings)
    unlike = [key for key in SETTINGS if theirs[key] != ours[key]]
    settings = "".join(f"{key.upper()}={shlex.quote(theirs[key])} " for key in unlike)
    options = [f"--bucket={asked.bucket}"] if asked.bucket else []
    options += ["--"] if any(word.startswith("-") for word in words) else []
    return f"{settings}uv run {program} {shlex.join([*options, *words])}"


def find_living(executor: Executor, runs: list[WorkflowStatus]) -> set[str]:
    """Return the IDs of the executors of PENDING runs that live."""
    names = {f"{run.executor_id}" for run in runs if run.status == "PENDING"}
    living = {name for name in names if not executor.locks.is_dead(name)}
    if living & getattr(executor.locks, "found_free", {}).keys():
        time.sleep(config.SessionLocks.PATIENCE)  # on another machine: dead if it stays free
        living = {name for name in living if not executor.locks.is_dead(name)}
    return living


def why_left_alone(run: WorkflowStatus, living: set[str]) -> str:
    """Return the reason why this code does not resume an unfinished run; "" if it does."""
    asked = request_of(run)
    if run.app_version != config.APP_VERSION:
        return "of another version"
    brief = BRIEFS.get(asked.recipe)
    if brief and asked.told != config.digest_of(brief.told):
        return "under other instructions"
    if brief is not BRIEF or asked.run_id != run.workflow_id:
        return "of another recipe or program"
    if run.status == "PENDING" and run.executor_id in living:
        return "executed by live processes"
    return "cancelled" if run.status == "CANCELLED" else ""


def find_question(executor: Executor, run: WorkflowStatus) -> str:
    """Return the name of the tool call that waits for a person's answer; "" if none does."""
    if run.status not in OPEN:
        return ""
    outputs = [step["output"] for step in executor.client.list_workflow_steps(run.workflow_id)]
    answers = [answer for answer in outputs if isinstance(answer, ai.ModelResponse)]
    for call in (call for answer in answers[-1:] for call in answer.tool_calls):
        name = approval.name_of(call, answers)
        asked = executor.client.get_event(run.workflow_id, name, timeout_seconds=0)
        if asked and not approval.is_answered(executor.settings, run.workflow_id, name):
            return name
    return ""


def describe_state(executor: Executor, run: WorkflowStatus, living: set[str]) -> tuple[str, str]:
    """Return the state that a run is really in, and the command that moves it on, if any does."""
    command, reason = command_of(executor, run), why_left_alone(run, living)
    if run.status == "SUCCESS":
        return "finished", ""
    state = run.status.lower().replace("_", " ")
    if run.status == "ERROR":
        state = f"failed: {agent.describe(run.error)}"
    elif run.status == "PENDING" and run.executor_id in living:
        state, command = f"executed by {f'{run.executor_id}'.rpartition(':')[0]}", ""
    elif run.status == "PENDING":
        state = "interrupted"
    if call := find_question(executor, run):
        command = f"uv run -m recipes.approval --answer {run.workflow_id} {call} yes"
        return f"waits for a person, {state}", command
    if reason in ("of another version", "under other instructions"):
        return f"{state}, {reason}", ""
    return state, command


def print_runs(executor: Executor, limit: int) -> None:
    """Print the newest runs."""
    runs = executor.client.list_workflows(
        name=config.WORKFLOW_NAME, sort_desc=True, limit=limit + 1, load_input=False
    )
    living = find_living(executor, runs[:limit])
    for run in runs[:limit]:
        state, command = describe_state(executor, run, living)
        asked = request_of(run)
        when = datetime.fromtimestamp((run.created_at or 0) / 1000).strftime("%Y-%m-%d %H:%M")
        name = ", ".join(filter(None, [asked.company, asked.bucket])) or "not one of ours"
        agent.print_wrapped(f"{when}  {name}: {state}", indent=4)
        print_line(f"    {run.workflow_id}" + (f"\n    {command}" if command else ""))
    if len(runs) > limit:
        print_line(f"These are the {limit} newest; --limit {limit * 10} shows more.")
    if not runs:
        print_line("No runs are stored in this database.")


def finish_unfinished(executor: Executor) -> int:
    """Bring to their ends the runs of this tenant, user and model that this code can resume."""
    runs = executor.client.list_workflows(
        name=config.WORKFLOW_NAME, status=[*OPEN, *FAILED], load_input=False, load_output=False
    )
    ours = [vars(executor.settings)[key] for key in SETTINGS]
    runs = [run for run in runs if [vars(request_of(run))[key] for key in SETTINGS] == ours]
    living = find_living(executor, runs)
    reasons = {run.workflow_id: why_left_alone(run, living) for run in runs}
    going_on = {run.workflow_id: run for run in runs if not reasons[run.workflow_id]}
    print_line(f"Unfinished runs that go on: {len(going_on)}.")
    for reason, count in Counter(filter(None, reasons.values())).items():
        agent.print_wrapped(f"Left alone: {count} {reason}: {LEFT_ALONE[reason]}.", indent=4)
    if not going_on:
        return 0
    batch, serving = Batch(executor, map(request_of, going_on.values())), worker.Worker(executor)
    batch.finish(serving)
    failed = {run_id: end for run_id, end in batch.outcomes.items() if end != "finished"}
    for run_id, outcome in failed.items():
        agent.print_wrapped(f"{request_of(going_on[run_id]).company}: {outcome}", indent=4)
        if run_id in batch.begun:  # or it was refused, and would be again
            print_line(f"    resume it: {command_of(executor, going_on[run_id])}")
    worker.end_in_time(int(bool(failed)))
    serving.stop()  # this process may execute runs that others have asked for
    return int(bool(failed))


def delete_old(executor: Executor, days: float, statuses: list[str]) -> None:
    """Delete what ended in one of these states more than so many days ago."""
    client, before = executor.client, datetime.now(UTC) - timedelta(days=days)
    old = client.list_workflows(
        name=config.WORKFLOW_NAME,
        status=statuses,
        completed_before=before.isoformat(),
        load_input=False,
        load_output=False,
    )
    count, ended = 0, [run.workflow_id for run in old if run.status == "SUCCESS"]
    for start in range(0, len(ended), 200):  # nothing can happen to them any more
        client.delete_workflows(ended[start : start + 200])
    for run_id in {run.workflow_id for run in old} - set(ended):
        if executor.locks.take(run_id):
            run = executor.look(run_id)
            if run and run.status in statuses:
                client.delete_workflows([run_id])
                count += 1
            executor.locks.free(run_id)
    print_line(f"Runs deleted: {len(ended) + count}.")
    settings, room = executor.settings, "Postgres uses the room again, after its autovacuum."
    if settings.database_url.drivername == "sqlite":
        size = Path(f"{settings.database_url.database}").stat().st_size / 1e6
        room = f"{settings.database_label} keeps its size, {size:.1f} MB, until VACUUM; new runs"
        room += " use the room again."
    agent.print_wrapped(room)


def main() -> int:
    """List, finish or delete runs; return 1 if one that should finish has failed."""
    parser = argparse.ArgumentParser(description="List, finish or delete the stored runs.")
    add = parser.add_argument
    add("--limit", type=int, default=50, metavar="N", help="list the N newest (50)")
    add("--unfinished", action="store_true", help="bring them to their ends")
    add("--delete-older-than", type=float, metavar="DAYS", help="delete what finished before")
    add("--failed", action="store_true", help="delete what failed or was cancelled as well")
    options = parser.parse_args()
    days, output.show = options.delete_older_than, "nothing"
    if options.unfinished + (days is not None) > 1 or (options.failed and days is None):
        parser.error("--failed belongs to --delete-older-than, and --unfinished stands alone")
    if not 1 <= options.limit <= 1_000_000 or not 0 <= (days or 0) <= 36500:
        parser.error("give a number of runs from 1 to 1000000, or of days from 0 to 36500")
    settings = config.load_settings()
    executor = worker.make_executor(settings)
    try:
        if options.unfinished:
            return finish_unfinished(executor)
        if days is None:
            print_runs(executor, options.limit)
        else:
            delete_old(executor, days, ["SUCCESS", *FAILED * options.failed])
    except config.DATABASE_ERRORS as error:
        raise config.database_error(settings, error) from error
    return 0


if __name__ == "__main__":  # it defines no step and no stored type, so it may run as `__main__`
    sys.exit(agent.run_command(main))
