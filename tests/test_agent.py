"""From which step a failed run goes on. And what a process that executes nothing leaves undone."""

import json
import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import App, Process
from dbos import StepInfo, WorkflowStatus
from provider import Provider, tool_calls
from pydantic_ai import ModelHTTPError, ModelRetry, UnexpectedModelBehavior
from pydantic_ai import exceptions as ai_error
from sqlalchemy.exc import OperationalError

import config
from agent import find_failure


def step(number: int, name: str, error: Exception | None = None) -> StepInfo:
    return StepInfo(
        function_id=number,
        function_name=name,
        output=None,
        error=error,
        child_workflow_id=None,
        child_shard_key=None,
        started_at_epoch_ms=0,
        completed_at_epoch_ms=0,
    )


def run(status: str, error: Exception | None = None) -> WorkflowStatus:
    return cast(WorkflowStatus, SimpleNamespace(status=status, error=error))


MODEL = "research_agent__model.request"
MENDED = [step(1, MODEL), step(2, "overview", ModelRetry("")), step(3, MODEL)]


def test_the_failed_step_is_the_first_with_an_error_that_the_model_did_not_get() -> None:
    outage = TimeoutError()
    assert find_failure(run("PENDING"), MENDED) is None
    failed = [*MENDED, step(4, "financials", outage)]
    assert find_failure(run("PENDING"), failed) == (4, outage)
    assert find_failure(run("ERROR", outage), failed) == (4, outage)


@pytest.mark.parametrize("error", [OperationalError("SELECT 1", {}, Exception("full")), OSError()])
def test_a_run_that_failed_between_its_steps_keeps_them_all(error: Exception) -> None:
    assert find_failure(run("ERROR", error), MENDED) == (4, error)
    assert find_failure(run("ERROR", error), []) == (1, error)


@pytest.mark.parametrize("error", [UnexpectedModelBehavior("nonsense"), ValueError(), TypeError()])
def test_a_run_that_failed_on_the_models_answers_drops_the_last_one(error: Exception) -> None:
    assert find_failure(run("ERROR", error), MENDED) == (3, error)
    assert find_failure(run("ERROR", error), []) == (1, error)


def test_an_error_that_a_tools_code_has_caught_fails_no_run() -> None:
    caught = [step(1, MODEL), step(2, "primary", TimeoutError()), step(3, "backup")]
    assert find_failure(run("PENDING"), caught) is None
    assert find_failure(run("PENDING"), caught[:2]) == (2, caught[1]["error"])


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError()])
def test_a_bug_in_a_tool_that_calls_steps_drops_none_of_them(error: Exception) -> None:
    steps = [step(1, MODEL), step(2, "start_job"), step(3, "is_done")]
    assert find_failure(run("ERROR", error), steps) == (4, error)
    unwritable = UnicodeEncodeError("utf-8", "", 0, 1, "")
    assert find_failure(run("ERROR", unwritable), steps) == (1, unwritable)


def refusal(
    category: type[ai_error.ModelQuotaExceededError] | type[ai_error.ModelRequestRejectedError],
    status: int = 400,
) -> ModelHTTPError:
    return ModelHTTPError.for_category(category, status_code=status, model_name="m")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ModelHTTPError(400, "m"), 3),
        (ModelHTTPError(422, "m"), 3),
        (refusal(ai_error.ModelRequestRejectedError, 403), 3),  # for what it holds
        (refusal(ai_error.ModelRequestRejectedError, 451), 3),
        (ModelHTTPError(500, "m"), 5),
        (ModelHTTPError(400, "m", {"message": "You have reached your API usage limits."}), 5),
        (ModelHTTPError(400, "m", {"message": "invalid: 'quota', 'balance sheet'"}), 3),
        (refusal(ai_error.ModelAuthenticationError), 5),
        (refusal(ai_error.ModelNotFoundError), 5),
        (refusal(ai_error.ModelQuotaExceededError), 5),
        (refusal(ai_error.ModelContextWindowExceededError), 5),
    ],
)
def test_a_request_that_is_refused_for_its_content_drops_the_answer_before_it(
    error: Exception, number: int
) -> None:
    steps = [*MENDED, step(4, "financials"), step(5, MODEL, error)]
    assert find_failure(run("ERROR", error), steps) == (number, error)
    assert find_failure(run("ERROR", error), [step(1, MODEL, error)]) == (1, error)


def test_a_call_that_the_model_can_mend_goes_back_to_it_without_a_retry_and_is_restored(
    app: App, provider: Provider
) -> None:
    misspelt = ("fetch_financial_metrics", json.dumps({"company_name": "???"}))
    provider.script, provider.custom = ["custom"], tool_calls(misspelt)
    killed = app.run("Acme", KILL_AT="before commit 3", **provider.environment)
    assert killed.wait() == -signal.SIGKILL
    assert killed.stdout.count("fetch_financial_metrics calls the service") == 1
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert "interrupted" in again.stdout, "a ModelRetry is not a failure from which to go on"
    assert "calls the service" not in again.stdout
    # The request in flight was made once more, and each time with what the model can mend.
    assert ["check the name" in json.dumps(request) for request in provider.requests] == [
        False,
        True,
        True,
    ]


# ---------------------------------------------------------------- nothing to execute


def without_key(provider: Provider) -> dict[str, str]:
    """Return an environment in which the provider's model cannot be built."""
    return {"MODEL": provider.environment["MODEL"]}


def noted_by(app: App, process: Process) -> list[str]:
    """Return what one process has noted: launches, all kinds of writes, and effects of steps."""
    lines = (app.folder / "ledger").read_text().splitlines()
    return [line for line in lines if line.startswith(f"{process.pid} ")]


def stored(app: App) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row that the launch of an executor, a decision or a step would change."""
    tables = ["workflow_status", "workflow_input", "workflow_output", "operation_outputs"]
    tables += ["queues", "application_versions"]
    return {table: app.rows(f"SELECT * FROM {{dbos}}{table}") for table in tables}


def test_a_replay_launches_no_executor_builds_no_model_and_writes_nothing(
    app: App, provider: Provider
) -> None:
    first = app.run("Acme", **provider.environment)
    assert first.wait() == 0, first.stderr
    assert noted_by(app, first) != []
    before = stored(app)
    replay = app.run("Acme", **without_key(provider))
    assert replay.wait() == 0, replay.stderr
    assert "finished earlier" in replay.stdout
    assert "anvils" in replay.stdout
    assert noted_by(app, replay) == []
    assert stored(app) == before
    assert len(provider.requests) == 2


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("new", f"belongs to version {config.APP_VERSION} of this app"),
        (config.APP_VERSION, "cannot be used: "),  # the model
    ],
)
def test_a_refusal_launches_no_executor_builds_no_model_and_writes_nothing(
    app: App, provider: Provider, version: str, told: str
) -> None:
    killed = app.run("Acme", KILL_AT="before commit 3", **provider.environment)
    assert killed.wait() == -signal.SIGKILL
    before = stored(app)
    refused = app.start("Acme", patches={"version": version}, **without_key(provider))
    assert refused.wait() == 2
    assert told in refused.stderr
    assert noted_by(app, refused) == []
    assert stored(app) == before
    assert len(provider.requests) == 1


def test_a_model_that_cannot_be_used_leaves_no_run(app: App, provider: Provider) -> None:
    before = stored(app)
    assert app.run("Acme", **without_key(provider)).wait() == 2
    assert stored(app) == before


def test_a_wait_launches_no_executor_builds_no_model_and_writes_nothing(
    app: App, provider: Provider
) -> None:
    live = app.start("Acme", WAIT_AT="after effect 3", **provider.environment)
    app.until("waiting after effect 3")
    before = stored(app)
    waiting = app.start("Acme", **without_key(provider)).until_prints("executes nothing")
    assert stored(app) == before
    app.open_gate()
    assert live.wait() == 0
    after = stored(app)
    assert waiting.wait() == 0, waiting.stderr
    assert "anvils" in waiting.stdout
    assert noted_by(app, waiting) == []
    assert stored(app) == after
    assert len(provider.requests) == 2
