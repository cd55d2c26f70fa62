"""The list of runs, what brings the unfinished ones to their ends, and what deletes old ones."""

import signal
import subprocess
from pathlib import Path

import pytest
from conftest import App, Process, wait_for

NAMES = ["Acme", "Globex", "Initech"]


def runs(app: App, *arguments: str, **environment: str) -> str:
    """Run the recipe, which must exit with 0; return what it prints, without line breaks."""
    done = app.run(*arguments, recipe="runs", **environment)
    assert done.wait() == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 or "--answer" in done.stdout
    return " ".join(done.stdout.split())


def commands(app: App) -> list[str]:
    """Return the commands that the list shows."""
    lines = app.run(recipe="runs").stdout.splitlines()
    return [line.strip() for line in lines if "uv run " in line]


def run_command(app: App, command: str) -> Process:
    """Run a command that the list shows, as a person would copy it into a shell."""
    names = ["MODEL", "TENANT_ID", "USER_ID"]
    settings = " ".join(f'"${name}"' for name in names)
    shell = f"""uv() {{ shift; printf '%s\\n' {settings} "$@"; }}; {command}"""
    done = subprocess.run(["sh", "-c", shell], env={}, check=True, capture_output=True, text=True)
    values, words = done.stdout.splitlines()[:3], done.stdout.splitlines()[3:]
    environment = {name: value for name, value in zip(names, values, strict=True) if value}
    if words.pop(0) == "agent.py":
        return app.run(*words, **environment)
    return app.run(*words[1:], recipe=words[0].removeprefix("recipes."), **environment)


def enqueue(app: App, *names: str) -> None:
    """Leave runs in the queue, by a batch that is killed before it executes any."""
    batch = app.start(*names, recipe="many", WAIT_AT="before dequeue")
    batch.until_prints(f"{len(names)} waiting").signal(signal.SIGKILL)
    batch.wait()


def cancel(app: App, name: str) -> None:
    app.rows(
        "UPDATE {dbos}workflow_status SET status = 'CANCELLED', queue_name = NULL,"
        f" completed_at = updated_at WHERE workflow_uuid LIKE 'research-{name}-%'"
    )


# ---------------------------------------------------------------- the list


def test_the_list_has_a_limit_and_says_how_to_see_more(sqlite_app: App) -> None:
    assert runs(sqlite_app) == "No runs are stored in this database."
    sqlite_app.run(*NAMES, recipe="many")
    listed = sqlite_app.run("--limit", "2", recipe="runs").stdout.splitlines()
    assert len(listed) == 5
    assert listed[-1] == "These are the 2 newest; --limit 20 shows more."
    assert len(sqlite_app.run("--limit", "3", recipe="runs").stdout.splitlines()) == 6


def test_the_list_tells_in_which_state_each_run_really_is_and_changes_nothing(app: App) -> None:
    app.run("Finished", "--bucket", "Q4")
    app.run("Failed", OUTAGE="1")
    app.run("Interrupted", KILL_AT="before commit 3")
    app.run("Old", KILL_AT="before commit 3", patches={"version": "old"})
    app.run("Told", KILL_AT="before commit 3", patches={"instructions": "Be brief."})
    app.run("Cancelled", KILL_AT="before commit 3")
    cancel(app, "cancelled")
    enqueue(app, "Queued", "Queued too")
    live = app.start("Live", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    before, ledger = (
        app.rows("SELECT * FROM {dbos}workflow_status ORDER BY 1"),
        app.ledger("try launch"),
    )
    told = runs(app)
    for line in [
        "Finished, Q4: finished research-finished-",
        "Failed: failed: PermissionError: the service is closed today research-failed-",
        "Interrupted: interrupted research-interrupted-",
        "Old: interrupted, of another version research-old-",
        "Told: interrupted, under other instructions research-told-",
        "Cancelled: cancelled research-cancelled-",
        "Queued too: enqueued research-queued-too-",
        f":{live.pid} research-live-",
        "Live: executed by ",
    ]:
        assert line in told, told
    assert app.rows("SELECT * FROM {dbos}workflow_status ORDER BY 1") == before
    assert app.ledger("try launch") == ledger
    assert set(commands(app)) == {
        "uv run agent.py 'Queued too'",
        "uv run agent.py Queued",
        "uv run agent.py Cancelled",
        "uv run agent.py Interrupted",
        "uv run agent.py Failed",
    }


def test_each_command_of_the_list_moves_its_run_on(app: App) -> None:
    app.run("Acme")
    app.run("Acme", "3", recipe="from_step", KILL_AT="before commit 3")
    app.run("Acme", "--bucket", "my bucket")
    app.run("Acme", "--bucket", "my bucket", "2", recipe="from_step", OUTAGE="1")
    app.run("--bucket=-b", "--", "-Acme", KILL_AT="before commit 3")
    app.run("O'Neill", OUTAGE="1", TENANT_ID="a tenant", USER_ID="$me")
    app.run("--", "talk", "Who is Acme?", "-And?", recipe="conversation")
    at = {"KILL_AT": "before commit 1"}
    app.run("--", "talk", "Who is Acme?", "-And?", "So?", recipe="conversation", **at)
    assert app.statuses() == {"SUCCESS": 4, "PENDING": 3, "ERROR": 2}
    shown = commands(app)
    assert set(shown) == {
        "uv run -m recipes.from_step Acme 3",
        "uv run -m recipes.from_step '--bucket=my bucket' Acme 2",
        "uv run agent.py --bucket=-b -- -Acme",
        "TENANT_ID='a tenant' USER_ID='$me' uv run agent.py 'O'\"'\"'Neill'",
        "uv run -m recipes.conversation -- talk 'Who is Acme?' '-And?' 'So?'",
    }
    for command in shown:
        moved = run_command(app, command)
        assert moved.wait() == 0, command + moved.stderr
    assert app.statuses() == {"SUCCESS": 9}
    assert app.repeated() == []
    assert commands(app) == []


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_that_waits_for_a_person_is_listed_with_the_command_that_answers(
    app: App, killed: bool
) -> None:
    asking = app.start("Acme", recipe="approval").until_prints("answer: ")
    if killed:
        asking.signal(signal.SIGKILL)
        asking.wait()
    told = runs(app)
    state = "interrupted" if killed else "executed by "
    assert f"Acme: waits for a person, {state}" in told
    [command] = commands(app)
    assert run_command(app, command).wait() == 0
    assert "waits for a person" not in runs(app)
    if killed:
        assert "Acme: interrupted" in runs(app)
        [command] = commands(app)
        assert command == "uv run -m recipes.approval Acme"
        assert run_command(app, command).wait() == 0
    else:
        assert asking.wait() == 0
    assert app.statuses() == {"SUCCESS": 1}


@pytest.mark.parametrize("app", ["postgres"], indirect=True)
def test_a_process_on_another_machine_is_dead_when_its_lock_stays_free(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    app.rows("UPDATE {dbos}workflow_status SET executor_id = 'elsewhere:1:01234567'")
    app.patches["patience"] = 0.5
    assert "Acme: interrupted" in runs(app)
    assert "Unfinished runs that go on: 1." in runs(app, "--unfinished")
    assert app.status() == "SUCCESS"


def test_runs_of_other_programs_are_listed_as_far_as_they_are_known(sqlite_app: App) -> None:
    sqlite_app.run("Acme", OUTAGE="1")
    sqlite_app.rows("UPDATE workflow_status SET workflow_uuid = 'theirs', attributes = NULL")
    assert "not one of ours: failed: " in runs(sqlite_app)
    assert commands(sqlite_app) == []


def test_a_run_of_a_recipe_whose_instructions_have_changed_is_shown_without_a_command(
    sqlite_app: App,
) -> None:
    at = {"KILL_AT": "before commit 2"}
    sqlite_app.run("Acme", recipe="approval", **at)
    sqlite_app.run("talk", "Who is Acme?", recipe="conversation", **at)
    assert len(commands(sqlite_app)) == 2
    older = "json_set(attributes, '$.told', 'older')"
    sqlite_app.rows(f"UPDATE workflow_status SET attributes = {older}")
    assert runs(sqlite_app).count(": interrupted, under other instructions ") == 2
    assert commands(sqlite_app) == [], "they would begin another run"
    assert "Left alone: 2 under other instructions" in runs(sqlite_app, "--unfinished")


# ---------------------------------------------------------------- what is unfinished


def test_everything_unfinished_goes_on_and_what_this_code_cannot_resume_is_counted_apart(
    app: App,
) -> None:
    app.run("Base")
    app.run("Base", "3", recipe="from_step", KILL_AT="before commit 3")
    app.run("Failed", "Failed too", recipe="many", OUTAGE="1")
    app.run("Interrupted", KILL_AT="before commit 3")
    enqueue(app, "Queued", "Queued too")
    app.run("Other", OUTAGE="1", USER_ID="other")
    app.run("Cancelled", KILL_AT="before commit 3")
    cancel(app, "cancelled")
    app.run("Old", OUTAGE="1", patches={"version": "old"})
    app.run("Told", OUTAGE="1", patches={"instructions": "Be brief."})
    app.run("talk", "Who is Acme?", recipe="conversation", KILL_AT="before commit 2")
    live = app.start("Live", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    told = runs(app, "--unfinished")
    assert told.startswith("Unfinished runs that go on: 6. ")
    for line in [
        "Left alone: 1 executed by live processes: wait for these processes, or stop them.",
        "Left alone: 1 cancelled: the list shows the command that resumes each.",
        "Left alone: 1 of another version: finish them with the code of that version.",
        "Left alone: 1 under other instructions: finish them with the code that began them.",
        "Left alone: 1 of another recipe or program: the list shows the command of each,",
    ]:
        assert line in told, told
    assert told.endswith("6 done, 0 running, 0 waiting, 0 failed")
    assert app.statuses() == {"SUCCESS": 7, "CANCELLED": 1, "PENDING": 2, "ERROR": 3}
    app.open_gate()
    assert live.wait() == 0
    assert app.repeated() == []
    ledger = app.ledger()
    assert runs(app, "--unfinished").startswith("Unfinished runs that go on: 0. Left alone: 1 ")
    assert app.ledger() == ledger, "nothing was launched"
    others = app.run("--unfinished", recipe="runs", patches={"instructions": "Be brief."})
    assert others.wait() == 0
    assert "go on: 1." in others.stdout


def test_what_fails_again_is_told_with_its_command_and_stops_nobody(app: App) -> None:
    app.run("Acme", "Globex", "--bucket", "my bucket", recipe="many", OUTAGE="1")
    app.run("???")
    again = app.run("--unfinished", recipe="runs")
    assert again.wait() == 1
    assert app.statuses() == {"SUCCESS": 2, "ERROR": 1}
    assert "???: the run failed: UnexpectedModelBehavior" in again.stdout
    assert "    resume it: uv run agent.py '???'\n" in again.stdout
    assert "2 done, 0 running, 0 waiting, 1 failed\n" in again.stdout


@pytest.mark.parametrize(
    "point",
    ["before rewind", "after rewind", "after dequeue", "before commit 3", "before commit 4"],
)
def test_the_same_command_goes_on_when_it_was_killed(app: App, point: str) -> None:
    app.run(*NAMES, recipe="many", OUTAGE="1")
    killed = app.run("--unfinished", recipe="runs", KILL_AT=point)
    assert killed.wait() == -signal.SIGKILL
    assert runs(app, "--unfinished").endswith(" 0 failed")
    assert app.statuses() == {"SUCCESS": 3}
    assert app.repeated() == []
    assert len(app.ledger("effect overview")) == 3


def test_two_of_these_commands_at_once_execute_each_run_once(app: App) -> None:
    app.run(*NAMES, recipe="many", OUTAGE="1")
    first = app.start("--unfinished", recipe="runs", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    second = app.run("--unfinished", recipe="runs")
    assert second.wait() == 0
    assert "Left alone: 3 executed by live processes" in second.stdout
    app.open_gate()
    assert first.wait() == 0, first.stderr
    assert len(app.ledger("effect financials")) == 3


# ---------------------------------------------------------------- what is old


def make_old(app: App, name: str, days: int) -> None:
    """Let a run have ended some days earlier than it did."""
    app.rows(
        f"UPDATE {{dbos}}workflow_status SET completed_at = completed_at - {days * 86_400_000}"
        f" WHERE workflow_uuid LIKE 'research-{name}-%'"
    )


def left(app: App) -> set[str]:
    """Return the names of the runs that are stored."""
    return {
        row[0].split("-")[1] for row in app.rows("SELECT workflow_uuid FROM {dbos}workflow_status")
    }


def test_only_what_has_ended_long_ago_is_deleted(app: App) -> None:
    app.run("Old", "Older", "New", recipe="many")
    app.run("Failed", OUTAGE="1")
    app.run("Cancelled", KILL_AT="before commit 3")
    cancel(app, "cancelled")
    app.run("Interrupted", KILL_AT="before commit 3")
    app.run("Exhausted", KILL_AT="before commit 3")
    app.rows(  # as DBOS stores a run whose process has died a hundred times
        "UPDATE {dbos}workflow_status SET status = 'MAX_RECOVERY_ATTEMPTS_EXCEEDED',"
        " queue_name = NULL, completed_at = updated_at WHERE workflow_uuid LIKE '%exhausted%'"
    )
    enqueue(app, "Queued", "Waiting")
    asking = app.start("Asking", recipe="approval").until_prints("answer: ")
    failed = {"failed", "cancelled", "exhausted"}
    for name in ("old", *failed, "interrupted", "queued", "waiting", "asking"):
        make_old(app, name, days=31)
    make_old(app, "older", days=400)
    unfinished = {"interrupted", "queued", "waiting", "asking"}
    assert "Runs deleted: 1." in runs(app, "--delete-older-than", "365")
    assert "Runs deleted: 1." in runs(app, "--delete-older-than", "30")
    assert left(app) == {"new", *failed, *unfinished}
    assert "Runs deleted: 3." in runs(app, "--delete-older-than", "30", "--failed")
    assert left(app) == {"new", *unfinished}
    assert "Runs deleted: 1." in runs(app, "--delete-older-than", "0", "--failed")
    assert left(app) == unfinished
    kept = app.rows("SELECT count(DISTINCT workflow_uuid) FROM {dbos}operation_outputs")
    assert kept == [(2,)], "the steps of what was deleted are gone"
    asking.signal(signal.SIGKILL)
    asking.wait()
    assert "Runs deleted: 0." in runs(app, "--delete-older-than", "0", "--failed")
    assert runs(app, "--unfinished").endswith("3 done, 0 running, 0 waiting, 0 failed")


def test_a_failed_run_is_not_deleted_while_its_command_is_about_to_resume_it(app: App) -> None:
    app.run("Acme", OUTAGE="1")
    resuming = app.start("Acme", WAIT_AT="before rewind")
    app.until("waiting before rewind")
    assert "Runs deleted: 0." in runs(app, "--delete-older-than", "0", "--failed")
    app.open_gate()
    assert resuming.wait() == 0, resuming.stderr


def test_many_old_runs_are_deleted(app: App) -> None:
    app.run("Acme")
    columns = "status, name, application_version, created_at, updated_at, completed_at"
    for number in range(450):
        app.rows(
            f"INSERT INTO {{dbos}}workflow_status (workflow_uuid, {columns})"
            f" SELECT 'old-{number}', {columns} FROM {{dbos}}workflow_status LIMIT 1"
        )
    assert "Runs deleted: 451." in runs(app, "--delete-older-than", "0")
    assert app.statuses() == {}


def test_a_file_keeps_its_size_and_new_runs_use_the_room_again(sqlite_app: App) -> None:
    names = [f"Company {number}" for number in range(12)]
    sqlite_app.run(*names, recipe="many")
    file = Path(sqlite_app.folder / "research.sqlite")
    full = file.stat().st_size
    told = runs(sqlite_app, "--delete-older-than", "0")
    size = f"{full / 1e6:.1f} MB"
    assert f"research.sqlite keeps its size, {size}, until VACUUM; new runs use the room" in told
    assert file.stat().st_size == full
    assert sqlite_app.run(*names[:6], recipe="many").wait() == 0
    assert file.stat().st_size == full


@pytest.mark.parametrize(
    "arguments",
    [
        ["--failed"],
        ["--unfinished", "--delete-older-than", "1"],
        ["--delete-older-than", "-1"],
        ["--delete-older-than", "nan"],
        ["--delete-older-than", "soon"],
        ["--limit", "0"],
        ["--limit", "99999999999999999999"],
        ["Acme"],
    ],
)
def test_wrong_usage_is_told_and_does_nothing(sqlite_app: App, arguments: list[str]) -> None:
    wrong = sqlite_app.run(*arguments, recipe="runs")
    assert wrong.wait() == 2
    assert wrong.stderr.startswith("usage: ")
    assert not (sqlite_app.folder / "research.sqlite").exists()


def test_a_database_that_fails_is_one_clear_error(sqlite_app: App) -> None:
    sqlite_app.run("Acme")
    sqlite_app.rows("ALTER TABLE workflow_status RENAME COLUMN forked_from TO something")
    for arguments in ([], ["--unfinished"], ["--delete-older-than", "0"]):
        failed = sqlite_app.run(*arguments, recipe="runs")
        assert failed.wait() == 2
        assert failed.stderr.startswith("error: the database (SQLite research.sqlite) cannot be")
        assert "Traceback" not in failed.stderr
