"""What the app takes from DBOS beside its interface, and how the app's own parts hang together.

DBOS promises neither its private names, nor the words of its log, nor the names of its threads. If
an upgrade changes one of them, a test here fails, and not a command that then waits for ever.
"""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import NO_CACHE, PROJECT, fresh_postgres

from durable import dbos_internals

INTERNALS = PROJECT / "durable" / "dbos_internals.py"
ROOMS = {
    "recipes": {"recipes", "agent", "config", "tools", "demo", "durable"},
    "agent": {"config", "tools", "demo", "durable"},
    "config": {"durable"},
    "tools": {"demo", "durable"},
    "demo": {"demo", "durable"},
    "durable": {"durable"},
}
"""Each part of the app, and the parts from which it may import."""
APP = sorted(
    path
    for room in ROOMS
    for path in [PROJECT / f"{room}.py", *(PROJECT / room).glob("*.py")]
    if path.exists()
)
WORDS_OF_THE_APP = re.compile(
    r"--bucket|(?<!\w)\.env\b|COST_LIMIT_USD|DBOS_SYSTEM_DATABASE_URL|NEON_DATABASE_URL|\bMODEL\b"
)


def name_of(path: Path) -> str:
    """Return the name of a file of the app, from the project's folder on."""
    return str(path.relative_to(PROJECT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


# ---------------------------------------------------------------- what DBOS does not promise


@pytest.fixture(scope="module")
def dbos_nodes() -> list[ast.AST]:
    """The parsed source of the installed DBOS."""
    spec = importlib.util.find_spec("dbos")
    assert spec is not None
    assert spec.origin is not None
    paths = Path(spec.origin).parent.glob("*.py")
    return [node for path in paths for node in ast.walk(parse(path))]


def logged_texts(nodes: Iterable[ast.AST]) -> set[str]:
    """Return how each line begins that the code logs, with {} in place of what is filled in."""
    levels = ("debug", "info", "warning", "error", "exception", "critical")
    return {
        text_of(node.args[0])
        for node in nodes
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute)
        if node.func.attr in levels and "logger" in ast.unparse(node.func.value)
    }


def text_of(node: ast.AST) -> str:
    """Return a text, with {} for each value that is filled in; "" if the node is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def defined_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the name of each function, class, variable and attribute that the code defines."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def constants_of_the_internals() -> dict[str, str]:
    """Return each text among the constants of dbos_internals.py, with the constant's name."""
    return {
        text: name
        for name, value in vars(dbos_internals).items()
        if name.isupper() and isinstance(value, str | tuple)
        for text in ([value] if isinstance(value, str) else value)
    }


def names_taken_from_dbos() -> set[str]:
    """Return the names that dbos_internals.py uses, and that no page of DBOS names."""
    found = set()
    for node in ast.walk(parse(INTERNALS)):
        if isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if is_private(node) or owner.startswith("_get_dbos_instance()"):
                found.add(node.attr)
    return found


def is_private(node: ast.Attribute) -> bool:
    """Tell whether the name belongs to another's object."""
    owner = ast.unparse(node.value)
    private = node.attr.startswith("_") and not node.attr.startswith("__")
    return private and owner not in ("self", "cls") and f"{owner}.{node.attr}" != "os._exit"


def test_dbos_logs_in_the_words_by_which_we_know_a_lost_run(dbos_nodes: list[ast.AST]) -> None:
    logged, names = logged_texts(dbos_nodes), defined_names(dbos_nodes)
    texts = constants_of_the_internals()
    names |= {text_of(node) for node in dbos_nodes}
    assert texts
    for text, constant in texts.items():
        known = any(one.startswith(text) for one in {*names, *logged})
        assert known, f"{constant}: DBOS has no such name, and logs nothing like it: {text!r}"


def test_dbos_logs_the_id_and_the_error_of_a_run_that_it_cannot_start(
    dbos_nodes: list[ast.AST],
) -> None:
    assert f"{dbos_internals.NOT_STARTED}{{}}: {{}}" in logged_texts(dbos_nodes)


def test_dbos_has_each_private_name_that_we_use(dbos_nodes: list[ast.AST]) -> None:
    used = names_taken_from_dbos()
    assert "_get_dbos_instance" in used
    assert used <= defined_names(dbos_nodes), used - defined_names(dbos_nodes)


SCRIPT = """
import logging, sys, threading
from dbos import DBOS
from durable.dbos_internals import find_active_runs, is_event_loop_alive

began, may_end = threading.Event(), threading.Event()
lines = []
logging.getLogger("dbos").addFilter(lambda record: lines.append(record.name) or True)
DBOS(config={"name": "internals", "system_database_url": sys.argv[1]})

@DBOS.workflow()
async def work():
    began.set()
    await __import__("asyncio").to_thread(may_end.wait)

assert not is_event_loop_alive()
DBOS.launch()
assert is_event_loop_alive()
assert lines, "DBOS logs under another name than dbos"
assert find_active_runs() == []
DBOS.register_queue("a-queue", polling_interval_sec=0.1)
run = DBOS.enqueue_workflow("a-queue", work)
began.wait()
assert find_active_runs() == [run.workflow_id], find_active_runs()
may_end.set()
run.get_result(polling_interval_sec=0.1)
DBOS.destroy()
assert not is_event_loop_alive()
print("done")
"""


def test_a_running_dbos_shows_its_event_loop_and_its_active_runs(
    postgres: str, tmp_path: Path
) -> None:
    url = fresh_postgres(postgres, tmp_path)
    command = [sys.executable, "-c", SCRIPT, url]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("path", [path for path in APP if path != INTERNALS], ids=name_of)
def test_only_one_file_of_the_app_uses_what_dbos_does_not_promise(path: Path) -> None:
    for node in ast.walk(parse(path)):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        for name in imported(node):
            assert not re.match(r"dbos\._", name), f"{where} imports {name}"
        if isinstance(node, ast.Attribute):
            assert not is_private(node), f"{where} uses {ast.unparse(node)}"
            assert ast.unparse(node) != "threading.enumerate", f"{where} looks for threads"
        for text in constants_of_the_internals():
            assert text not in text_of(node), f"{where} has words of DBOS's log: {text!r}"


# ---------------------------------------------------------------- durable/ is used like a library


def test_durable_is_imported_without_the_rest_of_the_app(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "durable", tmp_path / "durable", ignore=NO_CACHE)
    modules = [f"durable.{path.stem}" for path in sorted((tmp_path / "durable").glob("*.py"))]
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {', '.join(modules)}"
    command = [sys.executable, "-I", "-c", script.replace(".__init__", "")]
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["durable"]  # nor is anything written


@pytest.mark.parametrize("path", [p for p in APP if p.parent.name == "durable"], ids=name_of)
def test_durable_reads_no_environment_variable_and_names_none_of_the_app(path: Path) -> None:
    for node in ast.walk(parse(path)):
        where = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute | ast.Name):
            used = node.attr if isinstance(node, ast.Attribute) else node.id
            assert used not in ("environ", "environb", "getenv"), f"{where} reads the environment"
        text = text_of(node)
        found = WORDS_OF_THE_APP.search(text)
        assert found is None, f"{where} names {found and found[0]}, a word of the app: {text!r}"


# ---------------------------------------------------------------- imports run one way


def imported(node: ast.AST) -> Iterator[str]:
    """Name each thing that a statement imports, in full."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "the app imports by full names"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(path: Path) -> set[str]:
    """Return the files of the app that a file imports: `durable.steps`, `tools`, …"""
    modules = {module_of(other) for other in APP}
    found = set()
    for node in ast.walk(parse(path)):
        for name in imported(node):
            owners = [name, name.rpartition(".")[0]]
            found |= {next((owner for owner in owners if owner in modules), "")} - {""}
    return found


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("path", APP, ids=name_of)
def test_no_import_runs_back_up(path: Path) -> None:
    room = module_of(path).partition(".")[0]
    rooms = {name.partition(".")[0] for name in modules_imported(path)}
    assert rooms <= ROOMS[room], f"{name_of(path)} imports {rooms - ROOMS[room]}"


def test_no_import_runs_in_a_circle() -> None:
    TopologicalSorter({module_of(path): modules_imported(path) for path in APP}).prepare()
