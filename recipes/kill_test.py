"""Kill a command at random moments, run it again until it has finished, and judge what it leaves.

    uv run -m recipes.kill_test --kills 50 -- uv run agent.py "Acme"

It works on any command that uses DBOS, and that goes on when it is run again. In each round it has
a database and a file of side effects of its own, of which it is told by its environment. A line of
that file is "KEY billed", or another word, if something was done for an idempotency key, and "KEY
answered from the record" if nothing was done, because the key was known.

These are repeats, as they are seen from outside:

- The checkpoint of a finished step changes or goes. Excepted is what a failure costs: the failed
  step, or the model's last answer and what it led to, if that could not be used.
- A key acts twice, or more keys act than in the undisturbed run that is measured first. So the
  command must do the same each time: let a script stand in for the model.
- A key comes again after a later one of its run. Tools that work side by side need `--parallel`.

A command that does not finish, or that exits with 0 and leaves a run unfinished, fails as well.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Row, column, create_engine, inspect, make_url, select, table
from sqlalchemy.exc import OperationalError, SQLAlchemyError

KILLS, FAILURES = 3, 5
"""How often a command is killed in one round at most, and how often it may fail by itself."""
Step = tuple[str, int]
"""Run ID and number."""


@dataclass
class Look:
    """What is there while no process of the command lives."""

    asked: list[str] = field(default_factory=list)
    """The key of each line of the file of side effects."""
    acted: Counter[str] = field(default_factory=Counter)
    """Key to how often something was done."""
    statuses: dict[str, str] = field(default_factory=dict)
    finished: dict[Step, Row[Any]] = field(default_factory=dict)
    """The checkpoints of the steps that did not fail."""
    may_go: set[Step] = field(default_factory=set)
    """Steps that the command may drop, because their run has failed."""


def look(url: str, bill: Path) -> Look:
    """Read the file of side effects, and the database with plain SQL, which unpickles nothing."""
    seen = Look()
    for line in bill.read_text(errors="replace").splitlines() if bill.exists() else []:
        key, _, done = line.partition(" ")
        seen.asked.append(key)
        seen.acted[key] += done != "answered from the record"
    sqlite = url.startswith("sqlite")
    engine = create_engine(url if sqlite else make_url(url).set(drivername="postgresql+psycopg"))
    schema = None if sqlite else "dbos"
    names = "workflow_uuid function_id function_name output error completed_at_epoch_ms"
    steps = table("operation_outputs", *map(column, names.split()), schema=schema)
    runs = table("workflow_status", column("workflow_uuid"), column("status"), schema=schema)
    # On PostgreSQL, a command that is killed early has not created its database yet.
    with suppress(OperationalError), engine.connect() as connection:
        if inspect(connection).has_table(steps.name, schema):
            rows = connection.execute(select(steps).order_by(steps.c.function_id)).all()
            for run_id, status in connection.execute(select(runs)):
                seen.statuses[run_id] = status
                of_run = [row for row in rows if row.workflow_uuid == run_id]
                first = find_droppable(of_run, status)
                seen.may_go |= {(run_id, row.function_id) for row in of_run[first:]}
                seen.finished |= {
                    (run_id, row.function_id): row for row in of_run if row.error is None
                }
    engine.dispose()
    return seen


def find_droppable(rows: list[Row[Any]], status: str) -> int:
    """Return the index of the first step that a run may lose because it has failed.

    It is the model's last answer, if the run's end or a failed request of the model is stored.
    """
    asked = [number for number, row in enumerate(rows) if "model.request" in row.function_name]
    answered = [number for number in asked if rows[number].error is None]
    if status == "ERROR" or len(answered) < len(asked):
        return answered[-1] if answered else 0
    return len(rows)


def find_repeats(before: Look, now: Look, parallel: bool) -> list[str]:
    """Say what one life of the command has done again."""
    found = [
        f"step {step} of run {run_id} had finished, and its checkpoint has changed or is gone"
        for (run_id, step), row in before.finished.items()
        if (run_id, step) not in before.may_go and now.finished.get((run_id, step)) != row
    ]
    if not parallel:
        runs = [*now.statuses, ""]
        run_of = {key: next(run_id for run_id in runs if run_id in key) for key in now.asked}
        # The last key of each run may come again: perhaps its checkpoint was not stored.
        last = {run_of[key]: key for key in before.asked}
        dropping = {run_id for run_id, _ in before.may_go}
        if dropping:
            dropping.add("")  # a key that names no run may be of this one
        found += [
            f"{key} came again after a later key"
            for key in sorted({*now.asked[len(before.asked) :]} & {*before.asked})
            if key != last[run_of[key]] and run_of[key] not in dropping
        ]
    return found


class UnfinishedError(Exception):
    """The command does not bring its runs to their ends."""


def execute(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Run the command, and kill its process group after that time; return exit code and output."""
    try:
        process = subprocess.Popen(  # noqa: S603 - it is the reader's own command
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise UnfinishedError(f"it cannot be started: {error}") from None
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()  # ends when the last process of the group has
            if isinstance(end, KeyboardInterrupt):
                raise
    return process.returncode, output.decode(errors="replace")


def play(
    options: argparse.Namespace, folder: str, kills: int = 0, length: float = 360
) -> tuple[list[str], list[str], Look]:
    """Run the command on a database of its own, until it exits with 0 after so many kills at most.

    Returns:
        The moments of the kills, in seconds; the repeats; and what is there at the end.
    """
    name, now, moments, found = uuid.uuid4().hex[:8], Look(), list[str](), list[str]()
    url = options.database.replace("{}", name) or f"sqlite:///{folder}/{name}.sqlite"
    bill = Path(folder, f"{name}.bill")
    environment = {options.database_variable: url, options.bill_variable: str(bill)}
    code, failures = -1, 0
    while code != 0:
        kill = len(moments) < kills
        moment = random.uniform(0, length) if kill else 3 * length + 30
        code, output = execute(options.command, environment, moment)
        before, now = now, look(url, bill)
        found += find_repeats(before, now, options.parallel)
        if kill and code == -signal.SIGKILL:
            moments.append(f"{moment:.1f}")
            continue
        failures += code != 0
        if failures == FAILURES:
            raise UnfinishedError(f"it fails again and again, with exit code {code}: {output}")
    if left := [run_id for run_id, status in now.statuses.items() if status in OPEN]:
        raise UnfinishedError(f"it exits with 0, and leaves these unfinished: {' '.join(left)}")
    found += [f"{key} acted {times} times" for key, times in now.acted.items() if times > 1]
    return moments, found, now


OPEN = ("DELAYED", "ENQUEUED", "PENDING")


def main() -> int:
    """Measure the command, kill it so many times, and return 1 if something was found."""
    parser = argparse.ArgumentParser(description="Kill a command at random moments, and judge.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--database-variable", default="DBOS_SYSTEM_DATABASE_URL", metavar="NAME")
    parser.add_argument("--bill-variable", default="DEMO_BILL", metavar="NAME")
    parser.add_argument("--parallel", action="store_true", help="do not judge the order of keys")
    parser.add_argument("--database", default="", metavar="URL", help=DATABASE)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    if options.database and not re.match(r"postgres\w*://.*\{\}", options.database):
        parser.error("--database needs a URL with {} in its name: each round has one of its own")
    for number in (signal.SIGINT, signal.SIGTERM):  # the command under test ends, too
        signal.signal(number, signal.default_int_handler)
    kills = runs = repeats = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            start = time.monotonic()
            first = play(options, folder)[2]
            alone, length = len(+first.acted), time.monotonic() - start
            if not first.finished:  # then nothing could be judged
                name = options.database_variable
                raise UnfinishedError(f"it stores no step in the database that {name} names.")
            print(f"Undisturbed, it takes {length:.1f} s, and {alone} keys act.", flush=True)
            if not alone:
                print("So only checkpoints are judged: no file of side effects was written.")
            while kills < options.kills:
                most = min(KILLS, options.kills - kills)
                moments, found, left = play(options, folder, most, length)
                if len(+left.acted) > alone:
                    found.append(f"{len(+left.acted)} keys acted: {' '.join(+left.acted)}")
                kills, runs, repeats = kills + len(moments), runs + 1, repeats + len(found)
                told = f"killed after {', '.join(moments)} s" if moments else "not killed"
                print("\n  ".join([f"run {runs}: {told}, finished", *found]), flush=True)
        except SQLAlchemyError as error:
            reason = getattr(error, "orig", error)
            print(f"error: its database cannot be read: {reason}", file=sys.stderr)
            return 1
        except UnfinishedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    print(f"{kills} kills, {runs} runs, {repeats} repeats")
    return int(repeats > 0)


DATABASE = """postgresql://USER:PASSWORD@HOST/kill_test_{}: the command creates a database of this
name in each round, with other letters in place of {}, and leaves it there (default: SQLite files,
which are deleted)"""


if __name__ == "__main__":
    sys.exit(main())
