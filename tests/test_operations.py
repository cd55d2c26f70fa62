"""One run's error stops no other; batches read JSON and end at once; SIGTERM within the grace."""

import signal
import time
from pathlib import Path

import pytest
from conftest import App, Process, wait_for
from test_service import ask, post, serve

from durable.errors import DurableError
from recipes.many import read_words
from recipes.worker import GRACE

UNFIT = {"unfit": "acme", "look": 0.1}
"""What the run of Acme has stored makes the code raise a TypeError. A worker looks often."""
REASON = "this code cannot go on with the run: TypeError: what is stored is odd"
NAMES = ["Acme", "Globex", "Initech"]


def words(process: Process) -> str:
    return " ".join(process.stdout.split())


# ---------------------------------------------------------------- one run's error


def leave_interrupted(app: App) -> None:
    """Leave runs that have two finished steps, by a worker that is killed in the third."""
    batch = app.start(*NAMES, recipe="many", WAIT_AT="inside 3")
    wait_for(lambda: len(app.ledger("done commit 2")) == 3, "the second steps")
    batch.signal(signal.SIGKILL)
    batch.wait()


def test_a_worker_goes_on_with_the_other_runs_and_tells_an_odd_one_once(app: App) -> None:
    leave_interrupted(app)
    worker = app.start(recipe="worker", patches=UNFIT)
    wait_for(lambda: app.statuses() == {"SUCCESS": 2, "PENDING": 1}, "the other two")
    looks = len(app.ledger("done look"))
    wait_for(lambda: len(app.ledger("done look")) > looks + 3, "more looks")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    assert words(worker).count(f"is left alone: {REASON}") == 1
    assert worker.stderr == ""
    assert app.run("Acme").wait() == 0, "it can still be resumed"
    assert app.repeated() == []


def test_a_batch_brings_the_other_runs_to_their_ends(app: App) -> None:
    leave_interrupted(app)
    batch = app.run(*NAMES, recipe="many", patches=UNFIT)
    assert batch.wait() == 1
    assert app.statuses() == {"SUCCESS": 2, "PENDING": 1}
    assert f"Acme {REASON} Globex finished Initech finished" in words(batch)
    assert "2 done, 0 running, 0 waiting, 1 failed" in batch.stdout
    assert batch.stderr == ""


def test_a_report_that_cannot_be_read_is_the_outcome_of_its_run(app: App) -> None:
    assert app.run(*NAMES, recipe="many").wait() == 0
    batch = app.run(*NAMES, recipe="many", patches=UNFIT)
    assert batch.wait() == 1
    assert f"Acme {REASON} Globex finished Initech finished" in words(batch)


def test_unfinished_runs_go_on_beside_an_odd_one_and_the_exit_code_tells(app: App) -> None:
    leave_interrupted(app)
    done = app.run("--unfinished", recipe="runs", patches=UNFIT)
    assert done.wait() == 1
    assert app.statuses() == {"SUCCESS": 2, "PENDING": 1}
    assert f"Acme: {REASON}" in words(done)
    assert done.stderr == ""
    assert app.run("--unfinished", recipe="runs").wait() == 0
    assert app.statuses() == {"SUCCESS": 3}


ODD = """
from durable.definition import AgentDefinition

def odd(self, run_id, *_):
    if "-acme-" in run_id:
        raise TypeError("what is stored is odd")
    return REAL(self, run_id, *_)

REAL = AgentDefinition.read_report
AgentDefinition.read_report = odd
AgentDefinition.refuse_unreadable = lambda self, run_id, _: "-acme-" in run_id and odd(self, run_id)
from recipes.service import app
"""


def test_the_service_answers_502_for_an_odd_run_and_serves_the_others(app: App) -> None:
    app.run("Acme", "Globex", recipe="many")
    app.run("Acme", "--bucket", "2", KILL_AT="before commit 3")
    with serve(app, mine=ODD) as (_, url):
        answer = post(url, "Globex")[1]
        assert ask("GET", url + answer["report"])[0] == 200
        report = post(url, "Acme")[1]["report"]
        assert ask("GET", url + report) == (502, {"detail": REASON})
        odd = ask(
            "POST",
            f"{url}/reports",
            {"words": ["Acme"], "bucket": "2"},
            **{"Content-Type": "application/json"},
        )
        assert odd == (502, {"detail": REASON})
        assert ask("GET", f"{url}/healthz")[0] == 200


# ---------------------------------------------------------------- what a batch reads


def test_a_batch_reads_names_and_json(app: App) -> None:
    lines = app.folder / "lines"
    lines.write_text('\ufeff# comment\n\nAcme\n"Glo\\u0062ex"\n["Initech"]\n', "utf-8")
    batch = app.run(recipe="many", patches={"stdin": str(lines)})
    assert batch.wait() == 0, batch.stderr
    assert "3 done" in batch.stdout
    assert {run.split("-")[1] for (run,) in app.rows(RUN_IDS)} == {"acme", "globex", "initech"}


RUN_IDS = "SELECT workflow_uuid FROM {dbos}workflow_status"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('"Globex', "it begins like JSON, and is no JSON string or array of strings."),
        ('["Globex", 5]', "it begins like JSON, and is no JSON string or array of strings."),
        ("[]", "it begins like JSON, and is no JSON string or array of strings."),
        ('["Globex", "Initech"]', "a question is one word"),
        ('""', "the company's name has 0 characters"),
        ('"two\\nlines"', "the company's name contains the control character U+000A"),
    ],
)
def test_a_line_that_is_unfit_is_told_by_its_number_before_anything_is_stored(
    sqlite_app: App, line: str, told: str
) -> None:
    lines = sqlite_app.folder / "lines"
    lines.write_text(f"Acme\n{line}\n")
    batch = sqlite_app.run(recipe="many", patches={"stdin": str(lines)})
    assert batch.wait() == 2
    assert batch.stderr.startswith(f"error: line 2: {told}"), batch.stderr
    assert not (sqlite_app.folder / "research.sqlite").exists()


def test_a_json_line_keeps_the_ends_of_lines_in_a_message() -> None:
    assert read_words(b'"Dear all,\\n\\n\\tsee \\"it\\" {x}"\n') == ['Dear all,\n\n\tsee "it" {x}']
    assert read_words(b'["A-1", "two\\nlines"]\n') == ["A-1", "two\nlines"]
    assert read_words("Größe [x]\n".encode()) == ["Größe [x]"]
    assert read_words(b"   \n") == read_words(b"# x\n") == []
    with pytest.raises(DurableError, match="begins like JSON"):
        read_words(b'[{"a": 1}]\n')


# ---------------------------------------------------------------- how a process ends


def test_a_batch_that_executes_nothing_any_more_does_not_wait_for_dbos(app: App) -> None:
    batch = app.run("Acme", "Globex", recipe="many", WAIT_AT="in destroy", patches={"grace": 1000})
    assert batch.wait() == 0, batch.stderr
    assert app.statuses() == {"SUCCESS": 2}
    assert app.run("Acme").wait() == 0, "its locks are free"


def test_a_batch_ends_after_the_runs_of_others_that_it_executes(app: App) -> None:
    """It has taken a run of another batch from the queue that they share."""
    other = app.start("Globex", recipe="many", WAIT_AT="before dequeue").until_prints("1 waiting")
    batch = app.start("Acme", recipe="many", WAIT_AT="inside 3", patches={"grace": 1000})
    wait_for(lambda: app.ledger().count("waiting inside 3") == 1, "the third step")
    wait_for(lambda: len(app.ledger("done commit 2")) == 2, "both runs")
    other.signal(signal.SIGKILL)
    other.wait()
    app.open_gate()
    assert batch.wait() == 0, batch.stderr
    assert app.statuses() == {"SUCCESS": 2}
    assert app.repeated() == []


TEN_SECONDS = 10.0
"""After which a container platform kills (`docker stop`)."""
LESS = 4.0
"""The grace period here, so that a busy machine has three seconds more than the product's one."""


@pytest.mark.parametrize("point", ["inside 3", "before commit 3"])
def test_a_worker_ends_within_the_grace_period_while_a_step_runs_or_is_stored(
    app: App, point: str
) -> None:
    """The interpreter would wait, at its end, for the thread that stores a checkpoint."""
    app.run("Acme", recipe="many", KILL_AT="after enqueue")
    assert GRACE + 1 < TEN_SECONDS
    worker = app.start(recipe="worker", WAIT_AT=point, patches={"grace": LESS})
    app.until(f"waiting {point}")
    worker.signal(signal.SIGTERM)
    asked = time.monotonic()
    assert worker.wait() == 0, worker.stderr
    assert time.monotonic() - asked < LESS + 4
    assert app.run("Acme").wait() == 0
    assert app.repeated() == []


BLOCKS = f"""
import os, time
import demo.service
from pathlib import Path

async def financials(self, company_name, key):
    Path(os.environ["DEMO_BILL"]).with_name("blocked").touch()
    time.sleep(600)  # it blocks DBOS's event loop

demo.service.SimulatedService.financials = financials
from recipes import worker
worker.GRACE = {LESS}
from recipes.service import app
"""


AGAIN = """
import signal, threading, types
from recipes import service

class Event(threading.Event):
    def set(self):
        with self._cond:  # as it is in threading.Event
            signal.raise_signal(signal.SIGTERM)
            self._flag = True

service.threading = types.SimpleNamespace(Event=Event)
from recipes.service import app
"""


def test_the_service_ends_though_the_signal_comes_again_while_it_is_dealt_with(app: App) -> None:
    """`timeout` and `uv run` both send it on, to the process and to its group."""
    with serve(app, mine=AGAIN) as (server, _):
        server.terminate()
        wait_for(lambda: server.poll() is not None, "the service to end")


def test_the_service_ends_within_the_grace_period_while_a_step_blocks(app: App) -> None:
    with serve(app, mine=BLOCKS) as (server, url):
        assert post(url, "Acme")[0] == 202
        blocked = Path(app.folder / "blocked")
        wait_for(blocked.exists, "the step")
        server.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        wait_for(lambda: server.poll() is not None, "the service to end")
        assert time.monotonic() - asked < LESS + 4
    assert app.status() == "PENDING"
    assert app.run("Acme").wait() == 0
    assert app.repeated() == []
