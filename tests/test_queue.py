"""Many companies at once: batches and workers on one queue, killed and started again."""

import random
import signal

import pytest
from conftest import CRASH_SEED, App, Process, wait_for
from sqlalchemy import make_url

import config
import tools
from config import APP_VERSION, Settings
from recipes.worker import make_executor

NAMES = ["Acme", "Globex", "Initech"]
LOOK = {"look": 0.1}
"""A worker that looks often for what others have left."""
on_postgres = pytest.mark.parametrize("app", ["postgres"], indirect=True)


def words(process: Process) -> str:
    return " ".join(process.stdout.split())


def table(process: Process) -> dict[str, str]:
    """Return the table at the end: company to its outcome."""
    rows = process.stdout.split("  outcome\n", 1)[1].replace("\n    ", " ").splitlines()
    return {row[:38].strip(): " ".join(row[40:].split()) for row in rows}


def start_batch(app: App, *arguments: str, patches: object = None, **environment: str) -> Process:
    return app.start(*arguments, recipe="many", patches=patches, **environment)


def run_batch(app: App, *arguments: str, patches: object = None, **environment: str) -> Process:
    return app.run(*arguments, recipe="many", patches=patches, **environment)


def start_worker(app: App, patches: object = None, **environment: str) -> Process:
    return app.start(recipe="worker", patches=patches or LOOK, **environment)


def stop(worker: Process) -> None:
    """Ask a worker to stop, and expect a good end."""
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.stderr
    assert worker.stderr == ""


def kill(process: Process) -> None:
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def enqueue(app: App, *names: str, version: str = APP_VERSION) -> None:
    """Leave runs in the queue, by a batch that is killed before it executes any."""
    batch = start_batch(app, *names, WAIT_AT="before dequeue", patches={"version": version})
    kill(batch.until_prints(f"{len(names)} waiting"))


def leave_begun(app: App, *names: str) -> None:
    """Leave runs that have two finished steps, by a worker that is killed in the third."""
    enqueue(app, *names)
    worker = start_worker(app, WAIT_AT="inside 3")
    wait_for(lambda: len(app.ledger("done commit 2")) == len(names), "the second steps")
    kill(worker)


def until_all_finished(app: App, count: int) -> None:
    wait_for(lambda: app.statuses() == {"SUCCESS": count}, f"{count} runs to finish")


def until_looks(app: App, count: int) -> None:
    """Wait until workers have begun and ended so many more looks."""
    before = len(app.ledger("done look"))
    wait_for(lambda: len(app.ledger("done look")) > before + count, f"{count} looks")


def damage(app: App, company: str) -> None:
    """Store a result of step 2 that is not of today's type."""
    where = f"workflow_uuid LIKE 'research-{company}-%' AND function_id = 2"
    app.rows(f"UPDATE {{dbos}}operation_outputs SET output = 'of an older type' WHERE {where}")


# ---------------------------------------------------------------- a batch


def test_each_of_several_names_is_the_run_it_would_be_alone(app: App) -> None:
    assert app.run("Globex").wait() == 0
    batch = run_batch(app, *NAMES, "  ACME ")
    assert batch.wait() == 0, batch.stderr
    assert table(batch) == dict.fromkeys(NAMES, "finished")
    assert len(app.ledger("effect")) == 4 * 3
    assert "3 done, 0 running, 0 waiting, 0 failed\n" in batch.stdout
    assert "  step " not in batch.stdout
    assert max(len(line) for line in batch.stdout.splitlines()) <= 80
    assert "finished earlier" in app.run("Initech").stdout
    again = run_batch(app, *NAMES)
    assert again.wait() == 0
    assert table(again) == table(batch)
    assert len(app.ledger("effect")) == 4 * 3, "all were replayed"


def test_one_failure_stops_nobody_and_is_told_with_its_command(app: App) -> None:
    batch = run_batch(app, "Acme", "???", "Globex", "--bucket", "my bucket")
    assert batch.wait() == 1
    outcomes = table(batch)
    assert (outcomes.pop("Acme"), outcomes.pop("Globex")) == ("finished", "finished")
    assert outcomes["???"].startswith("the run failed: UnexpectedModelBehavior: ")
    assert "    resume it: uv run agent.py '--bucket=my bucket' '???'\n" in batch.stdout
    assert batch.stderr == ""


def test_a_name_that_begins_with_a_dash_is_quoted_as_one(app: App) -> None:
    batch = run_batch(app, "--", "-Dash", OUTAGE="1")
    assert batch.wait() == 1
    assert "    resume it: uv run agent.py -- -Dash\n" in batch.stdout
    assert app.run("--", "-Dash").wait() == 0


def test_failed_runs_go_on_from_their_failed_step(app: App) -> None:
    failed = run_batch(app, *NAMES, OUTAGE="1")
    assert failed.wait() == 1
    assert all("PermissionError" in outcome for outcome in table(failed).values())
    again = run_batch(app, *NAMES)
    assert again.wait() == 0, again.stdout
    assert len(app.ledger("effect overview")) == 3
    assert len(app.ledger("effect model")) == 6
    assert app.repeated() == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_batch_goes_on(app: App, signal_number: signal.Signals) -> None:
    killed = start_batch(app, *NAMES, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    killed.signal(signal_number)
    assert killed.wait() == (130 if signal_number == signal.SIGINT else -signal_number)
    if signal_number == signal.SIGINT:
        assert killed.stderr.endswith("is stored. Run the same command to resume.\n")
        assert "Traceback" not in killed.stderr
    again = run_batch(app, *NAMES)
    assert again.wait() == 0, again.stderr
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


def test_bad_input_prepares_nothing(sqlite_app: App) -> None:
    def refused(*arguments: str, text: bytes = b"") -> str:
        lines = sqlite_app.folder / "companies.txt"
        lines.write_bytes(text)
        process = run_batch(sqlite_app, *arguments, patches={"stdin": str(lines)})
        assert process.wait() == 2
        assert len(process.stderr.splitlines()) == 1
        return process.stderr

    told = refused("Acme", "bell\a", "Globex")
    assert told.startswith("error: name 2: the company's name contains the control character")
    assert refused("Acme", " ").startswith("error: name 2: the company's name has 0 characters")
    assert refused(text=b"Acme\n\nbell\a\n").startswith(
        "error: line 3: the company's name contains"
    )
    assert refused(text=b"Acme\nCaf\xe9\n").startswith("error: line 2: 'utf-8' codec can't decode")
    assert refused(text=b"# none\n \n").startswith("error: there are no names")
    assert not (sqlite_app.folder / "research.sqlite").exists()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_names_come_from_standard_input(sqlite_app: App, mark: str) -> None:
    names = sqlite_app.folder / "companies.txt"
    names.write_bytes(f"{mark}Caf\u00e9\r\n# customers\n\n  Globex  \n \ncaf\u00e9\n".encode())
    batch = run_batch(sqlite_app, patches={"stdin": str(names)})
    assert batch.wait() == 0, batch.stderr
    assert list(table(batch)) == ["Caf\u00e9", "Globex"]


def test_ten_runs_are_executed_at_once_in_each_process(app: App) -> None:
    batch = start_batch(app, *(f"Company {number}" for number in range(12)), WAIT_AT="inside 2")
    batch.until_prints("0 done, 10 running, 2 waiting, 0 failed")
    assert app.statuses() == {"PENDING": 10, "ENQUEUED": 2}
    app.open_gate()
    assert batch.wait() == 0


def test_a_tool_that_fails_with_an_error_of_its_own_database_fails_only_its_run(app: App) -> None:
    """It is not an error of DBOS's database, for which a batch would wait or end."""
    failed = run_batch(app, *NAMES, OUTAGE="database")
    assert failed.wait() == 1
    assert all("OperationalError" in outcome for outcome in table(failed).values())
    assert failed.stderr == ""


def test_a_report_that_no_longer_fits_is_told_and_stops_nobody(app: App) -> None:
    assert run_batch(app, *NAMES).wait() == 0
    where = "workflow_uuid LIKE 'research-globex-%'"
    app.rows(f"UPDATE {{dbos}}workflow_output SET output = 'of an older type' WHERE {where}")
    batch = run_batch(app, *NAMES)
    assert batch.wait() == 1
    outcomes = table(batch)
    assert "no longer fits" in outcomes.pop("Globex")
    assert set(outcomes.values()) == {"finished"}


def test_two_batches_of_the_same_names_execute_each_run_once(app: App) -> None:
    both = [start_batch(app, *NAMES), start_batch(app, *reversed(NAMES))]
    assert [batch.wait() for batch in both] == [0, 0], [batch.stderr for batch in both]
    assert len(app.ledger("effect")) == 12


def test_one_run_that_cannot_be_prepared_stops_no_other_of_a_batch(app: App) -> None:
    leave_begun(app, *NAMES)
    damage(app, "acme")
    batch = run_batch(app, *NAMES)
    assert batch.wait() == 1, batch.stderr
    outcomes = table(batch)
    assert "no longer fits" in outcomes.pop("Acme")
    assert outcomes == {"Globex": "finished", "Initech": "finished"}
    assert "resume it" not in batch.stdout, "the command would be refused as well"
    assert app.statuses() == {"SUCCESS": 2, "PENDING": 1}


# ---------------------------------------------------------------- a batch and others


def test_the_single_command_takes_over_after_a_killed_batch(app: App) -> None:
    batch = start_batch(app, *NAMES, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    kill(batch)
    alone = app.run("Globex")
    assert alone.wait() == 0, alone.stderr
    assert "interrupted, resumes after 2 finished steps" in words(alone)
    assert app.statuses() == {"SUCCESS": 1, "PENDING": 2}
    assert app.repeated() == []


def test_the_single_command_takes_a_queued_run_out_of_the_queue(app: App) -> None:
    enqueue(app, *NAMES)
    alone = app.run("Globex")
    assert alone.wait() == 0, alone.stderr
    assert "enqueued, resumes after 0 finished steps" in words(alone)
    assert app.statuses() == {"ENQUEUED": 2, "SUCCESS": 1}


def test_a_batch_waits_for_a_run_that_a_single_command_executes(app: App) -> None:
    alone = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    batch = start_batch(app, *NAMES).until_prints("2 done, 1 running")
    app.open_gate()
    assert batch.wait() == 0
    assert alone.wait() == 0
    assert len(app.ledger("effect")) == 12


@pytest.mark.parametrize("failure", [True, False])
def test_a_run_that_a_command_takes_and_ends_while_a_batch_waits_has_that_outcome(
    app: App, failure: bool
) -> None:
    batch = start_batch(app, "Acme", WAIT_AT="before dequeue").until_prints("1 waiting")
    alone = app.run("Acme", **({"OUTAGE": "1"} if failure else {}))
    assert alone.wait() == failure, alone.stderr
    assert batch.wait() == failure, "it executes nothing: it waits before it takes a run"
    assert ("the run failed: PermissionError" in table(batch)["Acme"]) == failure
    assert len(app.ledger("effect")) == 4 - 2 * failure


@pytest.mark.parametrize("end", ["finishes", "fails", "dies"])
def test_a_run_that_a_command_begins_just_before_a_batch_enqueues_it_is_not_begun_twice(
    app: App, end: str
) -> None:
    """The batch has looked, and enqueues what was not stored then, without the lock of the run."""
    batch = start_batch(app, "Acme", WAIT_AT="before enqueue")
    app.until("waiting before enqueue")
    environment = {"fails": {"OUTAGE": "1"}, "dies": {"KILL_AT": "before commit 3"}}.get(end, {})
    alone = app.run("Acme", **environment)
    assert alone.wait() == {"finishes": 0, "fails": 1, "dies": -signal.SIGKILL}[end]
    app.open_gate()
    assert batch.wait() == (end == "fails"), batch.stderr
    assert ("the run failed: PermissionError" in table(batch)["Acme"]) == (end == "fails")
    assert len(app.ledger("effect overview")) == 1
    assert app.repeated() == []


def test_runs_that_are_deleted_while_a_batch_waits_are_begun_anew(app: App) -> None:
    batch = start_batch(app, *NAMES, WAIT_AT="before dequeue").until_prints("3 waiting")
    app.rows("DELETE FROM {dbos}workflow_status")
    wait_for(lambda: app.statuses() == {"ENQUEUED": 3}, "them to be there again")
    app.open_gate()
    assert batch.wait() == 0, batch.stderr
    assert len(app.ledger("effect")) == 12


def test_runs_that_are_cancelled_while_a_batch_waits_are_told_and_go_on_by_the_same_command(
    app: App,
) -> None:
    batch = start_batch(app, *NAMES, WAIT_AT="before dequeue").until_prints("3 waiting")
    app.rows("UPDATE {dbos}workflow_status SET status = 'CANCELLED' WHERE status = 'ENQUEUED'")
    app.open_gate()
    assert batch.wait() == 1
    assert set(table(batch).values()) == {
        f"the run was cancelled resume it: uv run agent.py {name}" for name in NAMES
    }
    assert run_batch(app, *NAMES).wait() == 0
    assert len(app.ledger("effect")) == 12


def test_a_batch_that_is_started_again_waits_for_the_worker_that_executes_its_runs(
    app: App,
) -> None:
    enqueue(app, *NAMES)
    worker = start_worker(app, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    batch = start_batch(app, *NAMES, patches=LOOK).until_prints("0 done, 3 running")
    until_looks(app, 4)
    app.open_gate()
    assert batch.wait() == 0, batch.stderr
    assert len(app.ledger("effect")) == 12, "no step has run twice"
    stop(worker)


def test_a_batch_takes_over_its_runs_from_a_worker_that_is_gone(app: App) -> None:
    enqueue(app, *NAMES)
    worker = start_worker(app, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    batch = start_batch(app, *NAMES).until_prints("0 done, 3 running")
    assert len(app.ledger("effect")) == 9, "the worker is alive, so its runs are left to it"
    kill(worker)
    assert batch.wait() == 0
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


def test_a_batch_also_does_what_others_have_queued_or_left(app: App) -> None:
    leave_begun(app, "Acme")
    enqueue(app, "Globex")
    alone = app.start("Initech", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    batch = start_batch(app, "Initech", patches=LOOK)
    wait_for(lambda: app.statuses() == {"SUCCESS": 2, "PENDING": 1}, "those of others")
    app.open_gate()
    assert [alone.wait(), batch.wait()] == [0, 0], batch.stderr
    assert list(table(batch)) == ["Initech"]
    assert app.repeated() == []


@pytest.mark.parametrize("in_time", [True, False])
def test_a_batch_that_ends_while_it_executes_runs_of_others_finishes_or_leaves_them(
    app: App, in_time: bool
) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    enqueue(app, "Globex", "Initech")
    # Its own run has step 2 behind it.
    patches = {} if in_time else {"grace": 1}
    batch = start_batch(app, "Acme", WAIT_AT="after effect 2", patches=patches)
    wait_for(lambda: len(app.ledger("effect overview")) == 3, "the second steps of the others")
    batch.until_prints("outcome\nAcme                                    finished")
    if in_time:
        app.open_gate()
    assert batch.wait() == 0, batch.stderr
    if not in_time:
        assert app.statuses() == {"SUCCESS": 1, "PENDING": 2}
        start_worker(app)
    until_all_finished(app, 3)
    assert len(app.ledger("effect overview")) == (3 if in_time else 5)
    assert app.repeated() == []


# ---------------------------------------------------------------- workers


def test_a_worker_executes_what_is_queued_and_finishes_it_on_sigterm(app: App) -> None:
    enqueue(app, *(f"Company {number}" for number in range(12)))
    assert app.statuses() == {"ENQUEUED": 12}
    worker = start_worker(app, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 10, "ten calls")
    worker.signal(signal.SIGTERM)
    worker.until_prints("Asked to stop")
    app.open_gate()
    stop(worker)
    assert app.statuses() == {"SUCCESS": 10, "ENQUEUED": 2}
    assert "A worker serves the queue research/offline/" in worker.stdout
    assert "step 1: asks the model offline\n" in worker.stdout
    assert "  research-" in worker.stdout, "each line names its run"


@pytest.mark.parametrize("point", ["after effect 3", "before commit 3"])
def test_a_worker_that_cannot_finish_in_time_ends_and_another_one_goes_on(
    app: App, point: str
) -> None:
    """What keeps it busy is a step, or a thread that waits for the database."""
    enqueue(app, "Acme", "Globex")
    worker = start_worker(app, WAIT_AT=point, patches={"grace": 1})
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "two calls")
    app.until(f"waiting {point}")
    stop(worker)
    assert app.statuses() == {"PENDING": 2}
    again = start_worker(app)
    until_all_finished(app, 2)
    stop(again)
    assert "interrupted, resumes after 2 finished steps" in words(again)
    assert len(app.ledger("effect overview")) == 2
    assert app.repeated() == []


def test_another_worker_finishes_what_a_killed_one_had_begun(app: App) -> None:
    enqueue(app, *NAMES)
    killed = start_worker(app, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    other = start_worker(app).until_prints("A worker serves")
    until_looks(app, 4)
    assert len(app.ledger("effect")) == 9, "as long as it lives, nobody touches its runs"
    kill(killed)
    until_all_finished(app, 3)
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []
    stop(other)


def test_a_worker_finishes_what_a_killed_batch_had_begun(app: App) -> None:
    batch = start_batch(app, *NAMES, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    kill(batch)
    start_worker(app)
    until_all_finished(app, 3)
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


def test_one_run_that_cannot_be_prepared_stops_no_take_over(app: App) -> None:
    leave_begun(app, *NAMES)
    damage(app, "acme")
    worker = start_worker(app)
    wait_for(lambda: app.statuses() == {"SUCCESS": 2, "PENDING": 1}, "the others to finish")
    until_looks(app, 3)
    stop(worker)
    assert words(worker).count("is left alone: the fetch_company_overview that run") == 1


def test_a_worker_goes_on_with_runs_that_older_code_stored_with_fewer_attributes(app: App) -> None:
    leave_begun(app, "Acme", "Globex")
    attributes = "json_remove(attributes, '$.bucket', '$.recipe')"
    if app.database_url.startswith("postgresql"):
        attributes = "attributes - 'bucket' - 'recipe'"
    app.rows(f"UPDATE {{dbos}}workflow_status SET attributes = {attributes}")
    app.rows(
        "UPDATE {dbos}workflow_status SET attributes = NULL"
        " WHERE workflow_uuid LIKE 'research-globex-%'"
    )
    worker = start_worker(app)
    until_all_finished(app, 2)
    stop(worker)
    assert app.repeated() == []


def test_a_worker_that_cannot_use_its_database_any_more_says_so_and_ends(
    app_without_database: App,
) -> None:
    """DBOS 3.4 only logs that it cannot store how a run ended."""
    app = app_without_database  # others share theirs
    enqueue(app, "Acme", "Globex")
    worker = start_worker(app, WAIT_AT="before outcome SUCCESS")
    wait_for(lambda: len(app.ledger("stored")) == 8, "all steps of both to be stored")
    app.until("waiting before outcome SUCCESS")
    app.rows("ALTER TABLE {dbos}workflow_status RENAME TO damaged")
    app.open_gate()
    assert worker.wait() == 2
    assert worker.stderr.startswith("error: the database (")
    assert "workflow_status" in worker.stderr
    app.rows("ALTER TABLE {dbos}damaged RENAME TO workflow_status")
    start_worker(app)
    until_all_finished(app, 2)
    assert len(app.ledger("effect")) == 8
    assert app.repeated() == []


def test_the_single_command_waits_for_a_live_worker_and_prints_the_report(app: App) -> None:
    enqueue(app, *NAMES)
    worker = start_worker(app, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 3, "three calls")
    alone = app.start("Globex").until_prints("executes nothing")
    assert f":{worker.pid}:" in words(alone)
    app.open_gate()
    assert alone.wait() == 0
    assert "company_name            Globex" in alone.stdout
    assert len(app.ledger("effect")) == 12
    assert "step" in worker.stdout


def test_a_run_that_a_worker_takes_while_a_command_resumes_it_has_each_step_stored_once(
    app: App,
) -> None:
    """DBOS's dequeue knows no lock of ours: a step in flight may run twice, and one is stored."""
    enqueue(app, "Acme", "Globex")
    command = app.start("Acme", WAIT_AT="before resume")
    app.until("waiting before resume")
    worker = start_worker(app, WAIT_AT="after effect 3")
    wait_for(lambda: len(app.ledger("effect financials")) == 2, "two calls of the worker")
    app.open_gate()
    assert command.wait() == 0, command.stderr
    until_all_finished(app, 2)
    assert app.repeated() == []
    assert len(app.ledger("effect overview")) == 2
    assert len(app.ledger("effect")) <= 9
    stop(worker)


# ---------------------------------------------------------------- runs that DBOS has given up


@pytest.mark.parametrize("recipe", ["worker", "many"])
def test_a_run_of_a_workflow_that_is_not_registered_stops_nobody(app: App, recipe: str) -> None:
    enqueue(app, *NAMES)
    where = "workflow_uuid LIKE 'research-acme-%'"
    app.rows(f"UPDATE {{dbos}}workflow_status SET name = 'theirs' WHERE {where}")
    names = NAMES if recipe == "many" else []
    process = app.start(*names, recipe=recipe, patches=LOOK)
    wait_for(lambda: app.statuses() == {"SUCCESS": 2, "CANCELLED": 1}, "all to end")
    assert process.until_prints("is left alone: ")
    assert "is one of another workflow, theirs" in words(process)
    if recipe == "many":
        assert process.wait() == 1, process.stderr
        assert table(process)["Globex"] == "finished"
    else:
        stop(process)


def test_a_run_whose_tool_is_cancelled_goes_from_its_worker_to_the_command_that_waits(
    app: App,
) -> None:
    """DBOS leaves it PENDING at the worker, which lives: the command would wait for ever."""
    enqueue(app, "Acme", "Globex")
    worker = start_worker(app, WAIT_AT="inside 3", RAISE="CancelledError")
    wait_for(lambda: len(app.ledger("done commit 2")) == 2, "the second steps")
    command = app.start("Acme").until_prints("executes nothing")
    app.open_gate()
    assert command.wait() == 0, command.stderr
    wait_for(lambda: app.statuses() == {"SUCCESS": 1, "CANCELLED": 1}, "the end of the other run")
    assert words(worker).count("is left alone: DBOS has given it up twice: ") == 2
    stop(worker)
    assert len(app.ledger("effect overview")) == 2
    assert app.repeated() == []
    assert app.run("Globex").wait() == 0


def test_a_run_that_comes_back_to_the_worker_that_had_given_it_up_is_executed_once(
    app: App,
) -> None:
    enqueue(app, "Acme")
    worker = start_worker(app, WAIT_AT="inside 3", RAISE="CancelledError")
    app.until("waiting inside 3")
    app.open_gate()
    wait_for(lambda: app.statuses() == {"CANCELLED": 1}, "it to be given up")
    (app.folder / "ledger.gate").unlink()
    resumed, begun = len(app.ledger("done resume")), len(app.ledger("done body 3"))
    batch = start_batch(app, "Acme", WAIT_AT="before dequeue")  # which only puts it into the queue
    wait_for(lambda: len(app.ledger("done body 3")) > begun, "the worker to be in step 3 again")
    kill(batch)
    until_looks(app, 4)
    assert len(app.ledger("done resume")) == resumed + 1
    app.open_gate()
    wait_for(lambda: app.statuses() == {"CANCELLED": 1}, "it to be given up again")
    stop(worker)
    assert run_batch(app, "Acme").wait() == 0
    assert len(app.ledger("effect overview")) == 1


def test_a_worker_whose_event_loop_a_tool_has_ended_says_so_and_ends(app: App) -> None:
    enqueue(app, "Acme", "Globex")
    worker = start_worker(app, WAIT_AT="inside 3", RAISE="SystemExit")
    wait_for(lambda: len(app.ledger("done commit 2")) == 2, "the second steps")
    command = app.start("Acme").until_prints("executes nothing")
    app.open_gate()
    assert worker.wait() == 1
    # Python may warn before it of a coroutine of DBOS that was never awaited.
    told = "error: a step has ended DBOS's event loop: start this program again.\n"
    assert worker.stderr.endswith(told)
    assert "Traceback" not in worker.stderr
    assert command.wait() == 0, command.stderr
    assert run_batch(app, "Acme", "Globex").wait() == 0
    assert app.repeated() == []


@pytest.mark.parametrize("raised", ["CancelledError", "SystemExit"])
def test_a_tool_that_raises_what_dbos_does_not_store_ends_the_batch_and_not_the_runs(
    app: App, raised: str
) -> None:
    batch = run_batch(app, *NAMES, RAISE=raised, patches=LOOK)
    assert batch.wait() == 1, batch.stdout
    assert "Traceback" not in batch.stderr
    told = "given it up twice" if raised == "CancelledError" else "ended DBOS's event loop"
    assert told in words(batch) + batch.stderr
    again = run_batch(app, *NAMES)
    assert again.wait() == 0, again.stdout
    assert len(app.ledger("effect overview")) == 3
    assert app.repeated() == []


# ---------------------------------------------------------------- other code, other instructions


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_of_another_version_is_refused_and_stops_nobody(app: App, begun: bool) -> None:
    if begun:
        app.run("Acme", KILL_AT="before commit 3", patches={"version": "old"})
    else:
        enqueue(app, "Acme", "Umbrella", version="old")
    batch = run_batch(app, *NAMES)
    assert batch.wait() == 1
    outcomes = table(batch)
    assert "belongs to version old" in outcomes.pop("Acme")
    assert outcomes == {"Globex": "finished", "Initech": "finished"}
    assert "resume it" not in batch.stdout, "that command could not"


def test_workers_of_two_versions_leave_each_others_runs_alone(app: App) -> None:
    enqueue(app, "Acme", version="old")
    leave_begun(app, "Globex")
    new = start_worker(app)
    wait_for(lambda: app.statuses() == {"SUCCESS": 1, "ENQUEUED": 1}, "the new one")
    until_looks(app, 3)
    assert app.statuses() == {"SUCCESS": 1, "ENQUEUED": 1}
    old = start_worker(app, patches={**LOOK, "version": "old"})
    until_all_finished(app, 2)
    assert old.until_prints("serves").stdout.split()[:6] != new.stdout.split()[:6]
    stop(old)
    stop(new)


def test_runs_that_are_queued_under_other_instructions_are_left_to_those_who_have_these(
    app: App,
) -> None:
    enqueue(app, "Acme", "Globex")
    others = {**LOOK, "instructions": "Be brief."}
    worker = start_worker(app, others).until_prints("serves the queue")
    assert run_batch(app, "Initech", "Hooli", patches=others).wait() == 0
    assert app.statuses() == {"SUCCESS": 2, "ENQUEUED": 2}
    stop(worker)
    assert run_batch(app, "Acme", "Globex").wait() == 0
    assert app.statuses() == {"SUCCESS": 4}


@pytest.mark.parametrize("model", ["offline", "openrouter:free:5", "x:12:deadbeef", "a/b:1:c"])
def test_the_name_of_the_shared_queue_does_not_look_like_an_executor_id(
    sqlite_app: App, model: str
) -> None:
    """Queues that do are deleted when their process is dead."""
    executor = make_executor(
        Settings(
            model=model,
            database_url=make_url(sqlite_app.database_url),
            database_label="SQLite",
            tenant_id="local",
            user_id="local",
            cost_limit=1,
            service=tools.SimulatedService(),
        )
    )
    executor.client.destroy()
    assert not config.is_executor_id(executor.queue)
    assert config.is_executor_id(executor.id)


# ---------------------------------------------------------------- cut off, and killed


@on_postgres
def test_a_cut_of_all_connections_makes_no_step_of_live_workers_run_twice(app: App) -> None:
    """Their steps take longer than many looks. A cut frees all locks for a moment."""
    names = [f"Company {number}" for number in range(12)]
    app.patches = {**LOOK, "patience": 2}
    enqueue(app, *names)
    workers = [start_worker(app, WAIT_AT="inside 3") for _ in range(2)]
    wait_for(lambda: len(app.ledger("done commit 2")) == 12, "the second steps")
    batch = start_batch(app, *names).until_prints("0 done, 12 running")
    app.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    until_looks(app, 100)  # of three processes: more than three seconds
    app.open_gate()
    assert batch.wait() == 0, batch.stderr
    assert app.statuses() == {"SUCCESS": 12}
    assert len(app.ledger("effect")) == 4 * 12
    for worker in workers:
        stop(worker)


def test_many_runs_finish_though_their_workers_are_killed_at_random(app: App) -> None:
    """A hundred on PostgreSQL; on SQLite, where processes take turns to write, fewer."""
    many, kills = (20, 2) if app.database_url.startswith("sqlite") else (100, 4)
    dice = random.Random(f"{CRASH_SEED} workers")
    names = [f"Company {number}" for number in range(many)]
    environment = {"DEMO_LATENCY": "0.02"}
    enqueue(app, *names)
    batch = start_batch(app, *names, **environment)
    app.until_effects(4)
    kill(batch)
    workers = [start_worker(app, **environment) for _ in range(3)]
    for number in range(1, kills + 1):
        app.until_effects(number * 2 * many // kills)
        killed = dice.randrange(3)
        kill(workers[killed])
        workers[killed] = start_worker(app, **environment)
    last = run_batch(app, *names)
    assert last.wait() == 0, last.stdout
    assert app.statuses() == {"SUCCESS": many}
    assert app.repeated() == []
    # Only steps in flight are repeated: at most those of the ten runs in each killed process.
    assert len(app.ledger("effect")) <= 4 * many + 10 * (kills + 1)
