"""The kill test for everybody: it lets a sound command pass, and catches broken ones."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT, wait_for
from sqlalchemy import make_url

from recipes.kill_test import Look, find_droppable, find_repeats

# A program of three steps. It sleeps where a kill shows whether it is broken.
JOB = """
import os, sqlite3, sys, time, uuid
from pathlib import Path
import sqlalchemy
from dbos import DBOS, SetWorkflowID

url, effects, lives, broken = (os.environ[name] for name in ["STORE", "EFFECTS", "LIVES", "BROKEN"])
engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
outputs = "operation_outputs" if url.startswith("sqlite") else "dbos.operation_outputs"
if url.startswith("sqlite") and sqlite3.sqlite_version_info < (3, 42):  # dbos needs it
    listen = sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
    listen(lambda new, _: new.create_function("unixepoch", 1, lambda _: round(time.time(), 3)))

def note(path, line):
    with Path(path).open("a") as file:
        file.write(line + "\\n")

def act(name, pause=0.0):
    key = f"{DBOS.workflow_id}:{name}"
    if broken == "its key changes with each attempt":
        key += uuid.uuid4().hex
    known = Path(effects).exists() and f"{key} done" in Path(effects).read_text()
    if broken == "its service ignores keys":
        known = False
    note(effects, f"{key} answered from the record" if known else f"{key} done")
    time.sleep(pause)

def first():
    act("first")

if broken != "its first step is none":
    first = DBOS.step()(first)

@DBOS.step()
def second():
    act("second", 1.5)

@DBOS.step()
def third():
    act("third", 1.5)

@DBOS.workflow()
def work():
    first()
    second()
    third()

note(lives, "start")
begun = Path(effects).exists()
if begun and broken == "it deletes a checkpoint when it resumes":
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DELETE FROM {outputs} WHERE function_id = 1"))
if begun and broken == "it does not resume":
    sys.exit("it has begun already")
DBOS(config={"name": "job", "system_database_url": url, "application_version": "1"})
DBOS.launch()
with SetWorkflowID(uuid.uuid4().hex if broken == "its run ID is random" else "job"):
    DBOS.start_workflow(work).get_result(polling_interval_sec=0.1)
note(lives, "end")
os._exit(0)  # DBOS.destroy() would wait
"""


RECIPE = ["-m", "recipes.kill_test"]
# Most of a short program's life are its imports. So that few kills are enough, they come late.
RECIPE_THAT_KILLS_LATE = [
    "-c",
    """
import random, sys
draw = random.uniform
random.uniform = lambda low, high: draw(0.65 * high, 0.9 * high)
from recipes import kill_test
sys.exit(kill_test.main())
""",
]


def kill(
    recipe: list[str], kills: int, *words: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the recipe."""
    return subprocess.run(
        [sys.executable, *recipe, "--kills", str(kills), *words],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def kill_job(
    recipe: list[str], tmp_path: Path, kills: int, broken: str, *words: str
) -> tuple[int, str]:
    """Run it on the program; return its exit code and what it printed."""
    job = tmp_path / "job.py"
    job.write_text(JOB)
    variables = ["--database-variable", "STORE", "--bill-variable", "EFFECTS"]
    done = kill(
        recipe,
        kills,
        *variables,
        *words,
        "--",
        sys.executable,
        str(job),
        LIVES=str(tmp_path / "lives"),
        BROKEN=broken,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL"])
def test_a_sound_program_passes_and_the_numbers_are_measured(
    kind: str, tmp_path: Path, postgres: str
) -> None:
    url = make_url(postgres).set(database="kill_test_{}").render_as_string(hide_password=False)
    words = ["--database", url.replace("%7B", "{").replace("%7D", "}")]
    code, printed = kill_job(RECIPE, tmp_path, 5, "", *(words if kind == "PostgreSQL" else []))
    assert code == 0, printed
    assert "3 keys act" in printed
    kills, runs = map(int, re.findall(r"^(\d+) kills, (\d+) runs, 0 repeats$", printed, re.M)[0])
    assert kills == 5
    moments = re.findall(r"killed after ([\d., ]+) s", printed)
    assert len(", ".join(moments).split(", ")) == kills
    assert runs >= 2, "a run is killed three times at most"
    lives = (tmp_path / "lives").read_text().split()
    assert lives.count("end") == runs + 1, "the first one is undisturbed"
    assert lives.count("start") <= kills + runs + 1


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("its first step is none", "job:first came again after a later key"),
        ("its key changes with each attempt", "4 keys acted"),
        ("its service ignores keys", " acted "),
        ("it deletes a checkpoint when it resumes", "step 1 of run job had finished"),
        # Killed in a run, it leaves that run behind; killed after its end, it does all again.
        ("its run ID is random", r"it exits with 0, and leaves these unfinished|\d keys acted: "),
        ("it does not resume", "it fails again and again, with exit code 1: it has begun already"),
    ],
)
def test_a_broken_program_is_caught(broken: str, found: str, tmp_path: Path) -> None:
    code, printed = kill_job(RECIPE_THAT_KILLS_LATE, tmp_path, 4, broken)
    assert code == 1, printed
    assert re.search(found, printed), printed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--", "/nowhere/command"], "error: it cannot be started: "),
        (["--", "true"], "error: it stores no step in the database that DBOS_SYSTEM_DATABASE_URL"),
        (["--database", "name-{}", "--", "true"], "--database needs a URL with {}"),
        (
            ["--database", "postgresql://localhost/same", "--", "true"],
            "--database needs a URL with {}",
        ),
    ],
)
def test_a_command_that_cannot_be_judged_does_not_pass(words: list[str], told: str) -> None:
    done = kill(RECIPE, 1, *words)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_kill_test_that_is_stopped_leaves_nothing_running(
    tmp_path: Path, number: signal.Signals
) -> None:
    file = tmp_path / "pid"
    code = f"import os, time; open({str(file)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
    command = [sys.executable, *RECIPE, "--", sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=PROJECT) as process:
        pid = int(wait_for(lambda: file.exists() and file.read_text(), "a process ID"))
        process.send_signal(number)
        assert process.wait() == 130
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def row(number: int, name: str, error: str | None = None) -> Any:
    return SimpleNamespace(function_id=number, function_name=name, error=error)


def test_only_a_failure_excuses_a_checkpoint_that_goes() -> None:
    model = "agent__model.request"
    rows = [row(1, model), row(2, "tool", "the model's mistake"), row(3, "tool")]
    assert find_droppable(rows, "PENDING") == 3, "none"
    assert find_droppable(rows, "ERROR") == 0, "the answer, and what it led to"
    refused = [*rows, row(4, model), row(5, "tool"), row(6, model, "refused")]
    assert find_droppable(refused, "PENDING") == 3
    assert find_droppable(refused[:5], "CANCELLED") == 5


def test_a_run_that_failed_excuses_no_key_of_another() -> None:
    before = Look(asked=["a:1", "b:1", "a:2", "b:2"], statuses={"a": "ERROR", "b": "PENDING"})
    before.may_go = {("a", 1)}
    now = replace(before, asked=[*before.asked, "a:1", "b:1"])
    assert find_repeats(before, now, parallel=False) == ["b:1 came again after a later key"]


def test_the_app_passes() -> None:
    command = [sys.executable, str(PROJECT / "agent.py"), "Acme"]
    done = kill(RECIPE, 4, "--", *command, DEMO_LATENCY="0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 keys act" in done.stdout
    assert re.search(r"^4 kills, \d+ runs, 0 repeats$", done.stdout, re.M)


def test_a_copy_of_the_app_whose_tool_is_no_step_is_caught(tmp_path: Path) -> None:
    for name in ("agent.py", "config.py", "tools.py"):
        shutil.copy(PROJECT / name, tmp_path)
    code = (tmp_path / "tools.py").read_text()
    step = "@DBOS.step(timeout_seconds=30, preemptible=True)\n"
    assert step in code
    # Most of the time passes in the flaky tool after it has acted.
    acted = "        payload = await service.financials(company_name, key)\n"
    assert acted in code
    code = code.replace(step, "").replace(acted, acted + "        await asyncio.sleep(4)\n")
    (tmp_path / "tools.py").write_text(code)
    command = [sys.executable, str(tmp_path / "agent.py"), "Acme"]
    done = kill(RECIPE_THAT_KILLS_LATE, 4, "--", *command, DEMO_LATENCY="0", DEMO_FAILURE_RATE="0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "came again after a later key" in done.stdout
