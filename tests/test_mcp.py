"""Tools of an MCP server, killed in the middle of calls; the server's own bill is the judge."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import App, Process, settings_for, wait_for
from provider import BOTH_TOOLS, Provider, tool_calls

from agent import Question
from recipes.mcp_tools import MCP_RESEARCHER, SERVER, server_tools

STEPS = """SELECT function_name FROM {dbos}operation_outputs ORDER BY function_id"""
PREFIX = "research_agent__mcp_server__company-data"


def run(app: App, **environment: str) -> Process:
    """Bring the run to its end, or to where it is killed."""
    return app.run("Acme", recipe="mcp_tools", DEMO_BILL=str(app.folder / "bill"), **environment)


def start(app: App, **environment: str) -> Process:
    """Begin the run."""
    return app.start("Acme", recipe="mcp_tools", DEMO_BILL=str(app.folder / "bill"), **environment)


def bill(app: App) -> Counter[str]:
    """Return what the server has noted of each tool's calls, and how often."""
    lines = (app.folder / "bill").read_text().splitlines()
    entries = [line.split(" ", 1) for line in lines]
    return Counter(f"{key.split(':')[1]} {what}" for key, what in entries)


def server_of(process: Process) -> int:
    """Wait until a process has started its server; return the server's number."""
    tasks = Path(f"/proc/{process.pid}/task")
    return int(
        wait_for(lambda: "".join(path.read_text() for path in tasks.glob("*/children")), "a server")
    )


def test_a_call_is_made_once_more_only_if_it_was_killed_before_its_checkpoint(app: App) -> None:
    for point in ("before commit 1", "after commit 3", "before commit 4"):
        assert run(app, KILL_AT=point).wait() == -signal.SIGKILL
    finished = run(app)
    assert finished.wait() == 0, finished.stderr
    assert "step 3:" not in finished.stdout
    assert bill(app) == {
        "fetch_company_overview billed": 1,
        "fetch_financial_metrics billed": 1,
        "fetch_financial_metrics answered from the record": 1,
    }
    assert [name for (name,) in app.rows(STEPS)] == [
        f"{PREFIX}.get_tools",
        "research_agent__model.request",
        f"{PREFIX}.call_tool",
        f"{PREFIX}.call_tool",
        "research_agent__model.request",
    ]
    replayed = run(app)
    assert replayed.wait() == 0
    assert "replayed" in replayed.stdout
    assert bill(app).total() == 3


def test_a_run_killed_while_the_server_works_is_billed_once(app: App, provider: Provider) -> None:
    killed = start(app, DEMO_LATENCY="2", **provider.environment)
    killed.until_prints("step 4: fetch_financial_metrics calls").signal(signal.SIGKILL)
    killed.wait()
    finished = run(app, **provider.environment)
    assert finished.wait() == 0, finished.stderr
    assert "step 3:" not in finished.stdout
    assert "step 4: fetch_financial_metrics calls" in finished.stdout
    counts = bill(app)
    assert counts["fetch_company_overview billed"] == 1
    assert counts["fetch_financial_metrics billed"] == 1


def test_an_outage_of_the_server_is_retried_and_a_run_that_has_failed_goes_on(app: App) -> None:
    failed = run(app, DEMO_FAILURE_RATE="1")
    assert failed.wait() == 1
    assert "failed 10 times, last UnavailableError: simulated" in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
    finished = run(app, DEMO_FAILURE_RATE="0.5")
    assert finished.wait() == 0, finished.stderr
    assert "fetch_financial_metrics calls the MCP server (attempt 4 of 10)" in finished.stdout
    assert bill(app) == {"fetch_company_overview billed": 1, "fetch_financial_metrics billed": 1}


def test_a_server_that_dies_fails_the_run_and_the_next_process_goes_on(
    sqlite_app: App, provider: Provider
) -> None:
    failed = start(sqlite_app, DEMO_LATENCY="2", **provider.environment)
    failed.until_prints("step 4: fetch_financial_metrics calls")
    os.kill(server_of(failed), signal.SIGKILL)
    assert failed.wait() == 1
    assert "UnavailableError" in failed.stderr
    finished = run(sqlite_app, **provider.environment)
    assert finished.wait() == 0, finished.stderr
    assert bill(sqlite_app) == {
        "fetch_company_overview billed": 1,
        "fetch_financial_metrics billed": 1,
    }


def test_what_the_model_can_mend_goes_to_the_model(sqlite_app: App, provider: Provider) -> None:
    wrong = json.dumps({"company_name": "?"})
    provider.custom = tool_calls(("fetch_company_overview", wrong), BOTH_TOOLS[1])
    provider.script = ["custom", "both tools"]
    finished = run(sqlite_app, **provider.environment)
    assert finished.wait() == 0, finished.stderr
    assert "no company is known as '?'" in json.dumps(provider.requests[1]["messages"])
    assert "(attempt 2" not in finished.stdout


def test_a_server_gets_the_settings_of_the_demo_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    monkeypatch.setenv("DEMO_LATENCY", "0")
    transport = server_tools().client.transport
    environment = vars(transport)["env"]
    assert environment["DEMO_LATENCY"] == "0"
    assert "sk-secret-key" not in environment.values()


def test_another_version_of_the_server_makes_the_same_question_a_new_run() -> None:
    instructions = MCP_RESEARCHER.instructions.replace(SERVER, "company-data, version 2")
    raised = replace(MCP_RESEARCHER, instructions=instructions)
    settings = settings_for("sqlite:///research.sqlite")
    ids = {Question(settings, definition, "Acme").run_id for definition in (MCP_RESEARCHER, raised)}
    assert len(ids) == 2
