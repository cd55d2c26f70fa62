"""Many companies at once: batches and workers on one queue, killed and started again."""

import random
import signal

import pytest
from conftest import CRASH_SEED, App, Process, wait_for

from config import APP_VERSION

NAMES = ["Acme", "Globex", "Initech"]


def table(process: Process) -> dict[str, str]:
    """Return the table at the end: company to the first word of its state."""
    rows = process.stdout.split("  state\n", 1)[1].splitlines()
    return {row[:38].strip(): row[51:].split()[0] for row in rows if not row.startswith(" ")}


def enqueue(app: App, *names: str, version: str = APP_VERSION) -> None:
    """Leave runs in the queue, by a batch that is killed before it executes any."""
    batch = app.start(*names, WAIT_AT="before dequeue", patches={"version": version})
    batch.until_prints(f"{len(names)} waiting").signal(signal.SIGKILL)
    batch.wait()


def test_runs_that_are_queued_under_other_instructions_are_left_to_those_who_have_these(
    app: App,
) -> None:
    enqueue(app, "Acme", "Globex")
    others = {"instructions": "Be brief."}
    worker = app.start("--worker", patches=others).until_prints("serves the queue")
    assert app.run("Initech", "Hooli", patches=others).wait() == 0
    assert app.statuses() == {"SUCCESS": 2, "ENQUEUED": 2}
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    unfinished = app.run("--unfinished", patches=others)
    assert unfinished.wait() == 1
    assert "stored for another request" in " ".join(unfinished.stdout.split())
    assert "resume it" not in unfinished.stdout, "that command could not resume it"
    assert app.run("Acme", "Globex").wait() == 0
    assert app.statuses() == {"SUCCESS": 4}


def test_each_of_several_names_is_the_run_it_would_be_alone(app: App) -> None:
    assert app.run("Globex").wait() == 0
    batch = app.run(*NAMES, "  ACME ")
    assert batch.wait() == 0, batch.stderr
    assert set(table(batch).values()) == {"finished"}
    assert list(table(batch)) == NAMES
    assert len(app.ledger("effect")) == 4 * 3
    assert "3 done, 0 running, 0 waiting, 0 failed\n" in batch.stdout
    assert "  step " not in batch.stdout
    assert max(len(line) for line in batch.stdout.splitlines()) <= 80
    assert "finished earlier" in app.run("Initech").stdout
    again = app.run(*NAMES)
    assert again.wait() == 0
    assert table(again) == table(batch)
    assert len(app.ledger("effect")) == 4 * 3, "all were replayed"


def test_one_failure_stops_nobody_and_is_told_with_its_cure(app: App) -> None:
    batch = app.run("Acme", "???", "Globex", "--bucket", "my bucket")
    assert batch.wait() == 1
    assert list(table(batch).values()) == ["finished", "failed:", "finished"]
    assert "failed: UnexpectedModelBehavior: " in " ".join(batch.stdout.split())
    assert "    resume it: uv run agent.py '--bucket=my bucket' '???'\n" in batch.stdout
    assert batch.stderr == ""


def test_the_command_that_resumes_a_run_with_an_id_of_its_own_names_it(app: App) -> None:
    assert app.run("Acme", "--run-id", "mine", OUTAGE="1").wait() == 1
    unfinished = app.run("--unfinished", "--bucket", "unused", OUTAGE="1")
    assert unfinished.wait() == 1
    assert "resume it: uv run agent.py --run-id=mine Acme\n" in unfinished.stdout
    assert app.run("--run-id", "mine", "Acme").wait() == 0
    assert app.statuses() == {"SUCCESS": 1}


def test_a_failed_run_that_somebody_has_put_into_another_queue_goes_on(app: App) -> None:
    """Its process died before it could store the failure, and then another program resumed it."""
    app.run("Acme", OUTAGE="1", KILL_AT="before outcome ERROR")
    app.rows("UPDATE {dbos}workflow_status SET status = 'ENQUEUED', queue_name = 'theirs'")
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "failed at step 3" in again.stdout
    assert app.repeated() == []


def test_failed_runs_go_on_from_their_failed_step(app: App) -> None:
    failed = app.run(*NAMES, OUTAGE="1")
    assert failed.wait() == 1
    assert set(table(failed).values()) == {"failed:"}
    again = app.run(*NAMES)
    assert again.wait() == 0, again.stdout
    assert len(app.ledger("effect overview")) == 3
    assert len(app.ledger("effect model")) == 6
    assert app.repeated() == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_batch_goes_on(app: App, signal_number: signal.Signals) -> None:
    killed = app.start(*NAMES, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    killed.signal(signal_number)
    assert killed.wait() == (130 if signal_number == signal.SIGINT else -signal_number)
    if signal_number == signal.SIGINT:
        assert killed.stderr.endswith("is stored. Run the same command to resume.\n")
        assert "Traceback" not in killed.stderr
    again = app.run(*NAMES)
    assert again.wait() == 0, again.stderr
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


def test_names_are_enqueued_all_or_none(app: App) -> None:
    killed = app.run(*NAMES, KILL_AT="after insert Globex")
    assert killed.wait() == -signal.SIGKILL
    assert app.statuses() == {}
    assert app.run(*NAMES).wait() == 0


def test_bad_input_enqueues_nothing(sqlite_app: App) -> None:
    refused = sqlite_app.run("Acme", "bell\a", "Globex")
    assert refused.wait() == 2
    assert refused.stderr.startswith("error: name 2: the company's name contains the control")
    assert not (sqlite_app.folder / "research.sqlite").exists()
    for arguments, told in [
        (["Acme", "Globex", "--run-id", "mine"], "--run-id and --from-step are for one company"),
        (["Acme", "--worker"], "--worker and --unfinished find their runs"),
        (["Acme", "--unfinished"], "--worker and --unfinished find their runs"),
        (["--unfinished", "--run-id", "mine"], "--run-id and --from-step are for one company"),
        (["Acme", "Globex", "--from-step", "2"], "--run-id and --from-step are for one company"),
        (["Acme", "--from-step", "0"], "--from-step takes a number from 1 to 1000"),
        (["Acme", "-"], '"-" reads the names from standard input'),
        (["--list", "0"], "--list takes a number"),
        (["Acme", "Globex", "--concurrency", "0"], "--concurrency takes a number from 1 to 1000"),
    ]:
        refused = sqlite_app.run(*arguments)
        assert refused.wait() == 2
        assert told in refused.stderr


def test_names_come_from_standard_input(app: App) -> None:
    names = app.folder / "companies.txt"
    names.write_bytes("\ufeff# customers\nAcme\r\n\n  Globex  \nacme\n".encode())
    batch = app.run("-", patches={"stdin": str(names)})
    assert batch.wait() == 0, batch.stderr
    assert list(table(batch)) == ["Acme", "Globex"]


def test_no_more_runs_execute_at_once_than_concurrency_allows(app: App) -> None:
    batch = app.start(*NAMES, "Umbrella", "--concurrency", "2", WAIT_AT="inside 2")
    batch.until_prints("0 done, 2 running, 2 waiting, 0 failed")
    app.until("waiting inside 2")
    assert app.statuses() == {"PENDING": 2, "ENQUEUED": 2}
    app.open_gate()
    assert batch.wait() == 0


def test_a_worker_executes_what_is_queued_and_finishes_it_on_sigterm(app: App) -> None:
    enqueue(app, *NAMES)
    assert app.statuses() == {"ENQUEUED": 3}
    worker = app.start("--worker", "--concurrency", "1", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    worker.signal(signal.SIGTERM)
    worker.until_prints("Asked to stop")
    app.open_gate()
    assert worker.wait() == 0, worker.stderr
    assert worker.stderr == ""
    assert app.statuses() == {"SUCCESS": 1, "ENQUEUED": 2}
    assert "A worker serves the queue research:offline:" in worker.stdout
    assert "step 1: asks the model offline\n" in worker.stdout
    assert "  research-" in worker.stdout, "each line names its run"


@pytest.mark.parametrize("point", ["after effect 3", "before commit 3"])
def test_a_worker_that_cannot_finish_in_time_stops_and_goes_on_when_it_is_started_again(
    app: App, point: str
) -> None:
    """What keeps it busy is a step, or a thread that waits for the database."""
    enqueue(app, "Acme", "Globex")
    worker = app.start("--worker", WAIT_AT=point, patches={"grace": 1})
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "two calls")
    app.until(f"waiting {point}")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.stderr == ""
    assert app.statuses() == {"PENDING": 2}
    again = app.start("--worker", patches={"look": 0.1})
    wait_for(lambda: app.statuses() == {"SUCCESS": 2}, "both runs to finish")
    again.signal(signal.SIGTERM)
    assert again.wait() == 0
    assert len(app.ledger("effect overview")) == 2
    assert app.repeated() == []


def test_another_worker_finishes_what_a_killed_one_had_begun(app: App) -> None:
    enqueue(app, *NAMES)
    killed = app.start("--worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    other = app.start("--worker", patches={"look": 0.1}).until_prints("A worker serves")
    looks = len(app.ledger("done look"))
    wait_for(lambda: len(app.ledger("done look")) > looks + 1, "two looks")
    assert len(app.ledger("effect")) == 9, "as long as it lives, nobody touches its runs"
    killed.signal(signal.SIGKILL)
    wait_for(lambda: app.statuses() == {"SUCCESS": 3}, "all to finish")
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []
    other.signal(signal.SIGTERM)
    assert other.wait() == 0


def test_a_worker_finishes_what_a_killed_command_had_begun(app: App) -> None:
    batch = app.start(*NAMES, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    batch.signal(signal.SIGKILL)
    batch.wait()
    app.start("--worker", patches={"look": 0.1})
    wait_for(lambda: app.statuses() == {"SUCCESS": 3}, "all to finish")
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


def test_a_worker_that_cannot_store_how_a_run_ended_says_so_and_ends(
    app_without_database: App,
) -> None:
    """DBOS 3.4 would leave the run PENDING, and not execute it again."""
    app = app_without_database  # others share theirs
    enqueue(app, "Acme", "Globex")
    worker = app.start("--worker", WAIT_AT="before outcome SUCCESS")
    wait_for(lambda: len(app.ledger("stored")) == 8, "all steps of both to be stored")
    app.until("waiting before outcome SUCCESS")
    app.rows("ALTER TABLE {dbos}workflow_status RENAME TO damaged")
    app.open_gate()
    assert worker.wait() == 2
    assert worker.stderr.startswith("error: the database (")
    assert "workflow_status" in worker.stderr
    app.rows("ALTER TABLE {dbos}damaged RENAME TO workflow_status")
    app.start("--worker", patches={"look": 0.1})
    wait_for(lambda: app.statuses() == {"SUCCESS": 2}, "both runs to finish")
    assert len(app.ledger("effect")) == 8
    assert app.repeated() == []


def test_a_tool_that_fails_with_an_error_of_its_own_database_fails_only_its_run(app: App) -> None:
    """It is not the error of DBOS's database, at which the process ends."""
    failed = app.run(*NAMES, OUTAGE="database")
    assert failed.wait() == 1
    assert set(table(failed).values()) == {"failed:"}
    assert failed.stderr == ""


def test_a_run_that_a_worker_takes_while_a_command_launches_is_executed_once(app: App) -> None:
    enqueue(app, "Acme", "Globex")
    command = app.start("Acme", WAIT_AT="before launch")
    app.until("waiting before launch")
    worker = app.start("--worker", DEMO_LATENCY="2")
    app.until_effects(3)  # of four that the worker has had by the end of step 2 of both runs
    app.open_gate()
    assert command.wait() == 0, command.stderr
    assert "being executed by" in command.stdout
    wait_for(lambda: app.statuses() == {"SUCCESS": 2}, "both runs to finish")
    assert worker.process.is_alive()
    assert len(app.ledger("effect")) == 8, "no step has run twice"


def test_a_run_that_a_worker_fails_while_a_command_launches_keeps_its_checkpoints(
    app: App,
) -> None:
    enqueue(app, "Acme", "Globex")
    command = app.start("Acme", WAIT_AT="before launch")
    app.until("waiting before launch")
    assert app.run("Acme", "Globex", OUTAGE="1").wait() == 1
    app.open_gate()
    assert command.wait() == 0, command.stderr
    assert "failed at step 3" in command.stdout
    assert len(app.ledger("effect overview")) == 2
    assert app.repeated() == []


def test_a_worker_passes_over_runs_that_older_code_stored_with_fewer_attributes(app: App) -> None:
    enqueue(app, "Acme", "Globex")
    app.run("--worker", KILL_AT="inside 2")
    attributes = "json_remove(attributes, '$.bucket')"
    if app.database_url.startswith("postgresql"):
        attributes = "attributes - 'bucket'"
    app.rows(f"UPDATE {{dbos}}workflow_status SET attributes = {attributes}")
    worker = app.start("--worker", patches={"look": 0.1})
    wait_for(lambda: app.ledger().count("done look") > 3, "the worker to look")
    assert worker.process.is_alive()
    assert app.run("--unfinished").wait() == 0
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr


def test_a_live_batch_takes_over_from_a_worker_that_is_gone(app: App) -> None:
    enqueue(app, *NAMES)
    worker = app.start("--worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    batch = app.start(*NAMES).until_prints("0 done, 3 running")
    assert len(app.ledger("effect")) == 9, "the worker is alive, so its runs are left to it"
    worker.signal(signal.SIGKILL)
    assert batch.wait() == 0
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


def test_a_single_command_takes_a_queued_run_out_of_the_queue(app: App) -> None:
    enqueue(app, *NAMES)
    alone = app.run("Globex")
    assert alone.wait() == 0, alone.stderr
    assert "enqueued, resumes after 0 finished steps" in alone.stdout.replace("\n", " ")
    assert app.statuses() == {"ENQUEUED": 2, "SUCCESS": 1}


def test_a_single_command_waits_for_a_live_worker_and_prints_the_report(app: App) -> None:
    enqueue(app, *NAMES)
    worker = app.start("--worker", WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    alone = app.start("Globex").until_prints("executes nothing")
    assert f":{worker.pid}:" in alone.stdout.replace("\n", " ")
    app.open_gate()
    assert alone.wait() == 0
    assert "company_name            Globex" in alone.stdout
    assert len(app.ledger("effect")) == 12
    assert "step" in worker.stdout


def test_a_batch_waits_for_a_run_that_a_single_command_executes(app: App) -> None:
    alone = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    batch = app.start(*NAMES).until_prints("2 done, 1 running")
    app.open_gate()
    assert batch.wait() == 0
    assert alone.wait() == 0
    assert len(app.ledger("effect")) == 12


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_of_another_version_is_refused_and_stops_nobody(app: App, begun: bool) -> None:
    if begun:
        app.run("Acme", KILL_AT="before commit 3", patches={"version": "old"})
    else:
        enqueue(app, "Acme", "Umbrella", version="old")
    batch = app.run(*NAMES)
    assert batch.wait() == 1
    assert list(table(batch).values()) == ["not", "finished", "finished"]
    assert "belongs to version old" in batch.stdout.replace("\n", " ")


def test_runs_that_are_cancelled_meanwhile_are_told_and_go_on_by_the_same_command(app: App) -> None:
    batch = app.start(*NAMES, "--concurrency", "1", WAIT_AT="inside 2")
    app.until("waiting inside 2")
    app.rows("UPDATE {dbos}workflow_status SET status = 'CANCELLED' WHERE status = 'ENQUEUED'")
    app.open_gate()
    assert batch.wait() == 1
    assert sorted(table(batch).values()) == ["cancelled"] * 2 + ["finished"]
    assert "  cancelled\n    resume it: uv run agent.py " in batch.stdout
    assert app.run(*NAMES).wait() == 0
    assert len(app.ledger("effect")) == 12


def test_two_batches_of_the_same_names_execute_each_run_once(app: App) -> None:
    both = [app.start(*NAMES), app.start(*reversed(NAMES))]
    assert [batch.wait() for batch in both] == [0, 0], [batch.stderr for batch in both]
    assert len(app.ledger("effect")) == 12


def test_many_runs_finish_though_their_workers_are_killed_at_random(app: App) -> None:
    """A hundred on PostgreSQL; on SQLite, where processes take turns to write, fewer."""
    many, kills = (20, 2) if app.database_url.startswith("sqlite") else (100, 4)
    dice = random.Random(f"{CRASH_SEED} workers")
    names = [f"Company {number}" for number in range(many)]
    environment = {"DEMO_LATENCY": "0.02"}
    batch = app.start(*names, "--concurrency", "5", **environment)
    app.until_effects(4)
    batch.signal(signal.SIGKILL)
    assert batch.wait() == -signal.SIGKILL
    look = {"look": 0.2}
    workers = [app.start("--worker", patches=look, **environment) for _ in range(3)]
    for kill in range(1, kills + 1):
        app.until_effects(kill * 2 * many // kills)
        killed = dice.randrange(3)
        workers[killed].signal(signal.SIGKILL)
        assert workers[killed].wait() == -signal.SIGKILL
        workers[killed] = app.start("--worker", patches=look, **environment)
    last = app.run(*names)
    assert last.wait() == 0, last.stdout
    assert app.statuses() == {"SUCCESS": many}
    assert app.repeated() == []
    # Only steps in flight are repeated: at most those of the five runs in each killed process.
    assert len(app.ledger("effect")) <= 4 * many + 5 * (kills + 1)


def test_the_list_has_a_limit_and_says_how_to_see_more(app: App) -> None:
    app.run(*NAMES)
    listed = app.run("--list", "2").stdout.splitlines()
    assert len(listed) == 5
    assert listed[-1] == "These are the 2 newest; --list 20 shows more."
    assert len(app.run("--list", "3").stdout.splitlines()) == 6


def test_the_list_tells_in_which_state_each_run_really_is(app: App) -> None:
    app.run("Finished", "--bucket", "Q4")
    app.run("Failed", OUTAGE="1")
    app.run("Interrupted", KILL_AT="before commit 3")
    app.run("Old", KILL_AT="before commit 3", patches={"version": "old"})
    enqueue(app, "Queued", "Queued too")
    live = app.start("Live", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    told = " ".join(app.run("--list").stdout.split())
    for line in [
        "Finished, Q4: finished, 4 finished steps research-finished-",
        "Failed: failed: PermissionError: the service is closed today, 2 finished steps",
        "Interrupted: interrupted, 2 finished steps",
        "Old, version old: interrupted, 2 finished steps",
        "Queued: enqueued, 0 finished steps",
        f":{live.pid}:",
        "Live: executed by ",
    ]:
        assert line in told, told
    assert "Finished, Q4, model offline: finished" in " ".join(
        app.run("--list", MODEL="anthropic:x", ANTHROPIC_API_KEY="sk-any").stdout.split()
    )


def test_everything_unfinished_goes_on_and_what_others_have_or_was_cancelled_is_left(
    app: App,
) -> None:
    app.run("Failed", "Failed too", OUTAGE="1")
    app.run("Interrupted", KILL_AT="before commit 3")
    app.run("Other", OUTAGE="1", USER_ID="other")
    enqueue(app, "Queued", "Queued too")
    app.run("Cancelled", KILL_AT="before commit 3")
    name = "research-cancelled-%"
    app.rows(
        "UPDATE {dbos}workflow_status SET status = 'CANCELLED', queue_name = NULL"
        f" WHERE workflow_uuid LIKE '{name}'"
    )
    live = app.start("Live", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    everything = app.run("--unfinished")
    assert everything.wait() == 0, everything.stdout + everything.stderr
    told = " ".join(everything.stdout.split())
    assert "Unfinished runs that go on: 5. Left alone: 1 that live processes execute, 1" in told
    assert set(table(everything)) == {"Failed", "Failed too", "Interrupted", "Queued", "Queued too"}
    assert app.statuses() == {"SUCCESS": 5, "CANCELLED": 1, "PENDING": 1, "ERROR": 1}
    app.open_gate()
    assert live.wait() == 0
    assert app.repeated() == []
    nothing = app.run("--unfinished")
    assert nothing.wait() == 0
    assert "Unfinished runs that go on: 0." in nothing.stdout


def test_a_batch_is_told_of_runs_that_somebody_deletes(app: App) -> None:
    batch = app.start(*NAMES, "--concurrency", "1", WAIT_AT="inside 2")
    app.until("waiting inside 2")
    app.rows("DELETE FROM {dbos}workflow_status WHERE status = 'ENQUEUED'")
    app.open_gate()
    assert batch.wait() == 1
    assert "it was deleted meanwhile" in " ".join(batch.stdout.split())
    assert sorted(table(batch).values()) == ["finished", "not", "not"]
    assert app.run(*NAMES).wait() == 0
