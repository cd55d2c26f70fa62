"""What docs/operations.md says of moving, restoring and sharing a database, done and judged."""

import re
import subprocess
import sys

import pytest
from conftest import PROJECT, App, fresh_postgres

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
    lost = sqlite_app.run("Globex")
    assert ": new." in lost.stdout
    assert (sqlite_app.folder / "service.log").read_text().count("billed") == billed


def test_two_agents_on_one_database_leave_each_others_runs_alone(app: App) -> None:
    other = {"name": "support_agent", "instructions": "Answer the customer."}
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
