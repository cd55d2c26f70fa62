"""A conversation, each turn of which is a run: killed, replayed, and changed."""

import random
import signal

import pytest
from conftest import CRASH_SEED, App, Process
from provider import Provider, completion, tool_calls

TURNS = ["What is Acme?", "And its revenue?", "Sum up."]
ANSWER = (
    "Turn 3, I know: industry quantum hardware, founded_year 1967, employees 14586,"
    " revenue_usd_millions 4541.8, revenue_growth_percent -9.2, net_margin_percent -1.2."
)


def talk(app: App, *turns: str, **environment: str) -> Process:
    """Run the command of a conversation to its end."""
    return app.run("chat", *turns, recipe="conversation", **environment)


def finish(app: App, *turns: str) -> str:
    """Run the command, which must exit with 0; return what it prints, without line breaks."""
    last = talk(app, *turns)
    assert last.wait() == 0, last.stderr
    return " ".join(last.stdout.split())


def lookups(app: App) -> list[str]:
    """Return what the outside world has seen."""
    return [line.split()[1] for line in app.ledger("effect")]


def test_each_turn_is_a_run_that_goes_on_from_the_one_before(app: App) -> None:
    told = finish(app, *TURNS)
    assert told.endswith(f"You: Sum up. Agent: {ANSWER}")
    assert "You: What is Acme? Agent: Turn 1, I know: industry quantum hardware," in told
    assert lookups(app) == ["overview", "financials"]
    assert app.statuses() == {"SUCCESS": 3}
    assert app.rows("SELECT name FROM {dbos}queues") == []


def test_finished_turns_are_replayed_and_another_turn_is_one_run_more(app: App) -> None:
    finish(app, *TURNS[:2])
    ledger = app.ledger()
    replayed = finish(app, *TURNS[:2])
    assert replayed.count("finished earlier, so its stored report is replayed") == 2
    assert app.ledger() == ledger, "nothing was launched"
    told = finish(app, *TURNS)
    assert told.count("finished earlier") == 2
    assert told.endswith(ANSWER)
    assert lookups(app) == ["overview", "financials"]
    assert app.statuses() == {"SUCCESS": 3}


@pytest.mark.parametrize(
    "point",
    [
        "before register",
        "before dequeue",
        "before commit 1",
        "after commit 1",
        "before outcome SUCCESS",
    ],
)
def test_killed_in_the_third_turn_the_same_command_goes_on_there(app: App, point: str) -> None:
    finish(app, *TURNS[:2])
    before = app.rows("SELECT * FROM {dbos}operation_outputs ORDER BY 1, 2")
    assert talk(app, *TURNS, KILL_AT=point).wait() == -signal.SIGKILL
    told = finish(app, *TURNS)
    assert told.count("finished earlier") == 2
    assert told.endswith(ANSWER)
    assert app.repeated() == []
    after = app.rows("SELECT * FROM {dbos}operation_outputs ORDER BY 1, 2")
    assert set(before) < set(after)


def test_a_conversation_that_is_killed_again_and_again_reaches_its_end(app: App) -> None:
    print(f"CRASH_SEED={CRASH_SEED}")
    dice = random.Random(f"{CRASH_SEED} {app.database_url.partition(':')[0]}")
    for _ in range(6):
        talk(app, *TURNS, KILL_AT_STATEMENT=str(dice.randint(30, 120)))
    assert finish(app, *TURNS).endswith(ANSWER)
    assert app.repeated() == []
    bill = [line.split(" ")[1] for line in (app.folder / "service.log").read_text().splitlines()]
    assert bill.count("billed") == 2
    assert app.statuses() == {"SUCCESS": 3}


def test_a_turn_that_failed_goes_on_by_the_same_command(app: App) -> None:
    failed = talk(app, *TURNS, OUTAGE="1")
    assert failed.wait() == 1
    assert "You: And its revenue?" not in failed.stdout
    told = finish(app, *TURNS)
    assert "failed (PermissionError: the service is closed today), resumes at step 2" in told
    assert told.endswith(ANSWER)
    assert app.repeated() == []


def test_two_equal_conversations_at_the_same_time_ask_each_turn_once(app: App) -> None:
    first = app.start("chat", *TURNS, recipe="conversation", WAIT_AT="before commit 2")
    app.until("waiting before commit 2")
    second = app.start("chat", *TURNS, recipe="conversation").until_prints("executes nothing")
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert lookups(app) == ["overview", "financials"]
    assert app.statuses() == {"SUCCESS": 3}


def test_other_words_or_another_name_are_another_conversation_from_there_on(
    sqlite_app: App,
) -> None:
    finish(sqlite_app, *TURNS)
    changed = finish(sqlite_app, TURNS[0], "And its profit?", TURNS[2])
    assert changed.count("finished earlier") == 1
    assert sqlite_app.statuses() == {"SUCCESS": 5}
    assert finish(sqlite_app, "  what is ACME?  ").count("finished earlier") == 1
    other = sqlite_app.run("other", TURNS[0], recipe="conversation")
    assert other.wait() == 0
    assert ": new." in other.stdout
    assert sqlite_app.statuses() == {"SUCCESS": 6}


def test_a_model_is_sent_what_was_said_before_and_is_not_asked_again(
    app: App, provider: Provider
) -> None:
    provider.script = ["custom"] * 9
    for number, text in enumerate(TURNS, 1):
        provider.custom = completion({"role": "assistant", "content": f"answer {number}"})
        assert talk(app, *TURNS[:number], **provider.environment).wait() == 0, text
    sent = [
        [(message["role"], message["content"]) for message in request["messages"]]
        for request in provider.requests
    ]
    assert len(sent) == 3
    assert sent[2][1:] == [
        ("user", "What is Acme?"),
        ("assistant", "answer 1"),
        ("user", "And its revenue?"),
        ("assistant", "answer 2"),
        ("user", "Sum up."),
    ]
    assert sent[2][0][0] == "system"


def test_calls_and_results_of_earlier_turns_are_in_the_history(
    sqlite_app: App, provider: Provider
) -> None:
    provider.script = ["custom"]
    provider.custom = tool_calls(("fetch_company_overview", '{"company_name": "Acme"}'))
    # Then the provider calls for a tool that there is not, because the answer is a text here.
    failed = talk(sqlite_app, TURNS[0], **provider.environment)
    assert failed.wait() == 1
    provider.custom = completion({"role": "assistant", "content": "hardware"})
    provider.script = ["custom"] * 9
    for number in (1, 2):
        assert talk(sqlite_app, *TURNS[:number], **provider.environment).wait() == 0
    roles = [message["role"] for message in provider.requests[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]


def test_a_stored_turn_that_cannot_be_read_is_refused_and_nothing_is_asked(app: App) -> None:
    finish(app, *TURNS[:1])
    app.rows("UPDATE {dbos}workflow_output SET output = 'x'")
    app.rows("UPDATE {dbos}workflow_status SET output = 'x' WHERE output IS NOT NULL")
    refused = talk(app, *TURNS)
    assert refused.wait() == 2
    assert "the history that run conversation-" in refused.stderr
    assert "no longer fits" in refused.stderr
    assert "Agent: " not in refused.stdout
    assert app.statuses() == {"SUCCESS": 1}


def test_a_deleted_turn_is_asked_again(sqlite_app: App) -> None:
    finish(sqlite_app, *TURNS)
    sqlite_app.rows("DELETE FROM workflow_status WHERE workflow_uuid LIKE '%-turn-1'")
    told = finish(sqlite_app, *TURNS)
    assert told.count("finished earlier") == 2
    assert sqlite_app.statuses() == {"SUCCESS": 3}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "usage: "),
        (["chat"], "usage: "),
        (["chat", " "], "error: turn 1 has 0 characters: give it 1 to 5000."),
        (["chat", "Hi", "a" * 5001], "error: turn 2 has 5001 characters"),
        (["chat", "a\x1bb"], "error: turn 1 contains the control character U+001B"),
        ([" ", "Hi"], "error: the company's name has 0 characters"),
    ],
)
def test_wrong_usage_is_told_and_does_nothing(
    sqlite_app: App, arguments: list[str], told: str
) -> None:
    wrong = sqlite_app.run(*arguments, recipe="conversation")
    assert wrong.wait() == 2
    assert wrong.stderr.startswith(told)
    assert not (sqlite_app.folder / "research.sqlite").exists()
