"""A run whose tool or type is unusual is killed one step later, and goes on: see odd_tools.py."""

import signal

import child
import odd_tools
import pytest
from conftest import App


@pytest.fixture(autouse=True)
def odd_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of the app have the agent of odd_tools.py."""
    monkeypatch.setattr(child, "main", odd_tools.main)


@pytest.mark.parametrize("odd", odd_tools.TOOLS)
def test_a_run_that_is_killed_after_an_odd_tool_goes_on_and_acts_once(app: App, odd: str) -> None:
    killed = app.run("Acme", ODD=odd, KILL_AT="after commit 2")
    assert killed.wait() == -signal.SIGKILL, killed.stderr
    again = app.run("Acme", ODD=odd)
    assert again.wait() == 0, again.stderr
    assert "interrupted, resumes after 2 finished steps" in again.stdout
    assert len(app.ledger("effect tool")) == 1
    replayed = app.run("Acme", ODD=odd)
    assert replayed.wait() == 0, replayed.stderr
    assert "finished earlier" in replayed.stdout
    assert app.statuses() == {"SUCCESS": 1}
