"""Tests of your own agent, with pytest alone: no network, key, database server or other process.

    uv run --with pytest pytest test_agent.py

The script of the agent's definition answers in place of a model. The runs are stored in a new
SQLite file. DBOS executes them in threads of this process, so `monkeypatch` reaches what they call.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from dbos import DBOS

from agent import DEFINITION, Question, make_executor, parse_question, research
from config import APP_NAME, Settings
from demo.service import service
from durable import Executor, ModelChoice, RunFailed, find_database
from durable.console import output

WORDS = ["Acme"]
"""What is asked."""
CALL = (service, "financials")
"""What the tests let fail: an async function that a tool calls, as an owner and a name."""
CALLS = 1
"""How often that function is called for one question."""
PASSES = ConnectionResetError("down")
"""An error of that function that is retried."""


@pytest.fixture(autouse=True)
def outside_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing outside be asked."""
    for name, value in {"failure_rate": 0.0, "latency": 0.0, "bill": None}.items():
        monkeypatch.setattr(service, name, value)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return settings of which none comes from the environment."""
    database = find_database(APP_NAME, "sqlite:///test.sqlite", tmp_path_factory.mktemp("runs"))
    return Settings(ModelChoice("offline"), database, "tests", "tests")


@pytest.fixture(scope="session")
def executor(settings: Settings) -> Iterator[Executor[Any]]:
    """Make the executor. All tests share it, because a process can have only one."""
    output.show = "nothing"
    with make_executor(settings, DEFINITION) as executor:
        yield executor
    DBOS.destroy()


@pytest.fixture
def question(settings: Settings, request: pytest.FixtureRequest) -> Question:
    """Ask in each test anew, because the name of the test is the bucket."""
    return parse_question(settings, DEFINITION, WORDS, bucket=request.node.name)


def let_fail(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[str]:
    """Let the first calls fail, so many times; return a list that grows with each call."""
    owner, name = CALL
    function, calls = getattr(owner, name), list[str]()

    async def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) <= times:
            raise error
        return await function(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return calls


def test_each_tool_is_a_step_and_is_called_once(
    executor: Executor[Any], question: Question
) -> None:
    finished = research(executor, question)
    names = [step["function_name"] for step in finished.steps]
    assert [name for name in names if "__model." not in name] == [
        tool.__name__ for tool in DEFINITION.functions
    ]
    assert isinstance(finished.report, DEFINITION.output_type)


def test_a_finished_run_is_replayed(executor: Executor[Any], question: Question) -> None:
    first = research(executor, question)
    again = research(executor, question)
    assert again.report == first.report
    assert len(again.restored) == len(again.steps)


def test_a_failure_that_passes_is_retried(
    executor: Executor[Any], question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = let_fail(monkeypatch, PASSES, times=1)
    research(executor, question)
    assert len(calls) == CALLS + 1


def test_a_run_that_a_bug_has_failed_goes_on_at_the_failed_step(
    executor: Executor[Any], question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = let_fail(monkeypatch, ZeroDivisionError("a bug"), times=1)
    with pytest.raises(RunFailed, match="a bug"):
        research(executor, question)
    assert len(calls) == 1, "a bug is not retried"
    stored = executor.client.list_workflow_steps(question.run_id)
    finished = research(executor, question)
    assert [step["function_id"] for step in finished.restored] == [
        step["function_id"] for step in stored if step["error"] is None
    ]
