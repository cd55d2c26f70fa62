"""Every row of the promise, by real processes that are really killed."""

import signal
import sqlite3
from pathlib import Path

import pytest
from conftest import App

from config import APP_VERSION


def report_of(text: str) -> str:
    """Return the report in what was printed."""
    return text[text.index("company_name") : text.index("step  ")]


def test_a_new_run_is_started_and_each_step_is_executed_once(app: App) -> None:
    run = app.run("Acme")
    assert run.wait() == 0, run.stderr
    assert "research-acme-" in run.stdout
    assert run.stdout.splitlines()[0].startswith("Run research-acme-")
    assert ": new." in run.stdout
    effects = [line.split(":")[-1] for line in app.ledger("effect")]
    assert effects == ["1", "2", "3", "4"]
    assert app.ledger("done commit") == [f"done commit {step}" for step in effects]
    assert app.status() == "SUCCESS"


def test_a_finished_run_is_replayed_without_any_request_call_or_write(app: App) -> None:
    first = app.run("Acme")
    before = app.ledger("effect") + app.ledger("done commit")
    tables = ["workflow_status", "operation_outputs", "workflow_input", "workflow_output"]
    rows = {table: app.rows(f"SELECT * FROM {{dbos}}{table}") for table in tables}
    again = app.run("Acme")
    assert again.wait() == 0
    assert "finished earlier" in again.stdout
    assert report_of(again.stdout) == report_of(first.stdout)
    assert "  step " not in again.stdout
    assert again.stdout.count("restored") == 4
    assert app.ledger("effect") + app.ledger("done commit") == before
    assert {table: app.rows(f"SELECT * FROM {{dbos}}{table}") for table in tables} == rows


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_goes_on_after_its_last_checkpoint(
    app: App, signal_number: signal.Signals
) -> None:
    killed = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    killed.signal(signal_number)
    assert killed.wait() == (130 if signal_number == signal.SIGINT else -signal_number)
    assert app.status() == "PENDING"
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps" in again.stdout.replace("\n", " ")
    assert "step 1:" not in again.stdout
    assert "step 2:" not in again.stdout
    assert len(app.ledger("effect model")) == 2
    assert len(app.ledger("effect overview")) == 1


def test_ctrl_c_says_what_is_stored_and_how_to_go_on(app: App) -> None:
    interrupted = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    interrupted.signal(signal.SIGINT)
    assert interrupted.wait() == 130
    assert interrupted.stderr.strip() == (
        "Interrupted: what finished is stored. Run the same command to resume."
    )


def test_the_step_in_flight_runs_twice_with_one_idempotency_key(app: App) -> None:
    killed = app.start("Acme", KILL_AT="before commit 3")
    assert killed.wait() == -signal.SIGKILL
    assert app.run("Acme").wait() == 0
    effects = app.ledger("effect financials")
    assert len(effects) == 2
    assert effects[0] == effects[1]
    assert effects[0].endswith(":3")


def bill(app: App) -> list[str]:
    """Return what the service has noted: the tool of each lookup, and what became of it."""
    lines = (app.folder / "service.log").read_text().splitlines()
    return [f"{key.split(':')[1]} {did}" for key, _, did in (x.partition(" ") for x in lines)]


def test_crash_kills_after_the_service_has_acted_and_its_record_answers_the_rerun(app: App) -> None:
    crashed = app.run("Acme", "--crash")
    assert crashed.wait() == -signal.SIGKILL
    assert "the service has acted, and nothing is stored yet" in crashed.stdout
    names = app.rows("SELECT function_name FROM {dbos}operation_outputs ORDER BY function_id")
    assert names[-1] == ("fetch_company_overview",)
    assert bill(app) == ["fetch_company_overview billed", "fetch_financial_metrics billed"]
    again = app.run("Acme")
    assert again.wait() == 0
    assert "answers from its record" in again.stdout
    assert bill(app)[2:] == ["fetch_financial_metrics answered from the record"]
    late = app.run("Acme", "--crash")
    assert late.wait() == 0
    assert "--crash found nothing to kill" in late.stdout


def test_a_service_that_ignores_keys_bills_the_step_that_ran_twice_twice(app: App) -> None:
    assert app.run("Acme", "--crash", DEMO_IDEMPOTENT="0").wait() == -signal.SIGKILL
    assert app.run("Acme", DEMO_IDEMPOTENT="0").wait() == 0
    assert bill(app).count("fetch_financial_metrics billed") == 2
    assert bill(app).count("fetch_company_overview billed") == 1


def test_the_bill_stays_when_the_database_is_deleted(sqlite_app: App) -> None:
    assert sqlite_app.run("Acme").wait() == 0
    (sqlite_app.folder / "research.sqlite").unlink()
    again = sqlite_app.run("Acme")
    assert ": new." in again.stdout
    assert again.stdout.count("the service knows this key") == 2
    assert [line.split()[1] for line in bill(sqlite_app)] == ["billed"] * 2 + ["answered"] * 2


def test_everybody_sees_acme_fail_once_and_then_succeed_at_the_default_rate(app: App) -> None:
    run = app.run("Acme", DEMO_FAILURE_RATE="0.5")
    assert run.wait() == 0
    failed = [line for line in run.stdout.splitlines() if "failed with" in line]
    assert failed == [
        "  step 3: failed with ConnectionResetError: simulated outage; again in 0.5 s"
    ]


@pytest.mark.parametrize("raised", ["CancelledError", "SystemExit"])
def test_a_tool_that_raises_what_dbos_does_not_store_ends_the_command_and_not_the_run(
    app: App, raised: str
) -> None:
    failed = app.run("Acme", RAISE=raised)
    assert failed.wait() == 1, failed.stdout + failed.stderr
    assert failed.stderr.startswith("error: DBOS has given the run up: ")
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert app.repeated() == []


def test_a_failed_run_says_what_failed_and_goes_on_from_the_failed_step(app: App) -> None:
    failed = app.run("Acme", DEMO_FAILURE_RATE="1")
    assert failed.wait() == 1
    assert failed.stderr.startswith(
        "error: the run failed: fetch_financial_metrics failed 10 times"
    )
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.splitlines()) == 2
    assert app.status() == "ERROR"
    before = app.ledger("effect")
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "resumes at step 3" in " ".join(again.stdout.split())
    assert [line.split()[1] for line in app.ledger("effect")[len(before) :]] == [
        "financials",
        "model",
    ]


def test_a_permanent_failure_is_not_retried_and_the_same_command_goes_on_from_it(app: App) -> None:
    failed = app.run("Acme", OUTAGE="1")
    assert failed.wait() == 1
    assert failed.stderr.startswith(
        "error: the run failed: PermissionError: the service is closed today\n"
    )
    assert failed.stdout.count("fetch_financial_metrics calls the service") == 1
    before = app.ledger("effect")
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    done = [line.split()[1] for line in app.ledger("effect")[len(before) :]]
    assert done == ["financials", "model"]


def test_a_run_killed_between_its_failure_and_its_end_does_not_repeat_the_failure(app: App) -> None:
    killed = app.run("???", KILL_AT="before outcome ERROR")
    assert killed.wait() == -signal.SIGKILL
    again = app.run("???")
    assert again.wait() == 1
    assert app.status() == "ERROR"


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("CANCELLED", "cancelled, resumes"),
        ("MAX_RECOVERY_ATTEMPTS_EXCEEDED", "max recovery attempts exceeded, resumes"),
    ],
)
def test_a_run_that_was_given_up_goes_on_from_its_last_checkpoint(
    app: App, status: str, told: str
) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    app.rows(f"UPDATE {{dbos}}workflow_status SET status = '{status}', queue_name = NULL")
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert told in again.stdout.replace("\n", " ")
    assert len(app.ledger("effect overview")) == 1
    assert app.status() == "SUCCESS"


def test_a_second_process_waits_executes_nothing_and_prints_the_same_report(app: App) -> None:
    first = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    second = app.start("Acme").until_prints("waits for it and executes nothing")
    assert f":{first.pid}:" in second.stdout.replace("\n", " ")
    app.open_gate()
    assert first.wait() == 0
    assert second.wait() == 0, second.stderr
    assert report_of(first.stdout) == report_of(second.stdout)
    assert len(app.ledger("effect")) == 4


def test_a_waiting_process_takes_over_when_the_first_is_killed(app: App) -> None:
    first = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    second = app.start("Acme").until_prints("waits for it and executes nothing")
    first.signal(signal.SIGKILL)
    assert second.wait() == 0, second.stderr
    assert len(app.ledger("effect overview")) == 1
    assert len(app.ledger("effect financials")) == 2


def test_a_waiting_process_that_is_killed_does_not_disturb_the_first(app: App) -> None:
    first = app.start("Acme", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    second = app.start("Acme").until_prints("waits for it and executes nothing")
    second.signal(signal.SIGKILL)
    second.wait()
    app.open_gate()
    assert first.wait() == 0
    assert len(app.ledger("effect")) == 4


def test_other_peoples_unfinished_runs_are_left_alone(app: App) -> None:
    app.run("Theirs", KILL_AT="before commit 3")
    live = app.start("Live", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    theirs = "SELECT * FROM {dbos}workflow_status WHERE workflow_uuid LIKE 'research-theirs-%'"
    before = app.rows(theirs)
    assert app.run("Ours").wait() == 0
    assert app.rows(theirs) == before
    app.open_gate()
    assert live.wait() == 0
    assert app.rows(theirs) == before


def test_a_resumed_run_is_executed_by_its_own_process_not_by_another_live_one(app: App) -> None:
    """DBOS's internal queue would hand it to whichever process polls first."""
    app.run("Ours", KILL_AT="before commit 3")
    live = app.start("Live", WAIT_AT="after effect 2")
    app.until("waiting after effect 2")
    ours = app.run("Ours")
    assert ours.wait() == 0, ours.stderr
    assert "step 3: fetch_financial_metrics" in ours.stdout
    assert "step 3" not in live.stdout


def test_a_run_of_another_version_is_refused_at_once_with_both_versions(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3", patches={"version": "old"})
    refused = app.run("Acme")
    assert refused.wait() == 2
    assert "version old" in refused.stderr
    assert f"version {APP_VERSION}." in refused.stderr
    assert "--bucket" in refused.stderr
    assert app.run("Acme", patches={"version": "old"}).wait() == 0
    assert "finished earlier" in app.run("Acme").stdout


def test_another_bucket_is_another_run(app: App) -> None:
    assert app.run("Acme").wait() == 0
    assert app.run("Acme", "--bucket", "2026-Q4").wait() == 0
    assert app.statuses() == {"SUCCESS": 2}


def test_a_waiting_process_resumes_what_has_failed_or_was_cancelled_while_it_waited(
    app: App,
) -> None:
    first = app.start("Acme", OUTAGE="1", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    second = app.start("Acme").until_prints("executes nothing")
    app.open_gate()
    assert first.wait() == 1
    assert second.wait() == 0, second.stderr
    assert app.repeated() == []
    told = second.stdout
    assert told.count("restored") == 2, "what the first has finished was restored to the second"
    assert "Saved by checkpoints: model requests 1" in told


def test_a_run_of_another_workflow_under_our_id_is_refused(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    app.rows("UPDATE {dbos}workflow_status SET name = 'theirs'")
    refused = app.run("Acme")
    assert refused.wait() == 2
    assert "is one of another workflow, theirs" in refused.stderr


def test_a_run_starts_on_a_database_that_does_not_exist_yet(app_without_database: App) -> None:
    assert app_without_database.run("Acme").wait() == 0


def test_two_processes_start_on_a_database_that_does_not_exist_yet(
    app_without_database: App,
) -> None:
    app = app_without_database
    both = [app.start("Acme"), app.start("Acme")]
    assert [process.wait() for process in both] == [0, 0], [p.stderr for p in both]
    assert len(app.ledger("effect")) == 4


def test_no_queue_is_left_behind(app: App) -> None:
    app.run("Acme", KILL_AT="before commit 3")
    assert app.run("Acme").wait() == 0
    assert app.rows("SELECT name FROM {dbos}queues") == []


def test_an_sqlite_database_is_a_file_that_plain_sql_can_read(
    sqlite_app: App, tmp_path: Path
) -> None:
    sqlite_app.run("Acme")
    with sqlite3.connect(tmp_path / "research.sqlite") as connection:
        [(count,)] = connection.execute("SELECT count(*) FROM operation_outputs")
    connection.close()
    assert count == 4
