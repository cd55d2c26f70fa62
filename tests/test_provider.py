"""The real OpenAI client talks real HTTP to a provider that misbehaves."""

import signal

import pytest
from conftest import App
from provider import Provider


def test_a_run_makes_two_model_requests_and_a_replay_makes_none(
    sqlite_app: App, provider: Provider
) -> None:
    run = sqlite_app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert "anvils" in run.stdout
    assert "a script" not in run.stdout
    assert len(provider.requests) == 2
    assert sqlite_app.run("Acme", **provider.environment).wait() == 0
    assert len(provider.requests) == 2


def test_a_run_killed_after_its_first_model_request_does_not_make_it_again(
    app: App, provider: Provider
) -> None:
    killed = app.run("Acme", KILL_AT="before commit 3", **provider.environment)
    assert killed.wait() == -signal.SIGKILL
    assert len(provider.requests) == 1
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(provider.requests) == 2


def test_a_model_request_that_was_killed_before_its_checkpoint_is_made_once_more(
    app: App, provider: Provider
) -> None:
    killed = app.run("Acme", KILL_AT="before commit 4", **provider.environment)
    assert killed.wait() == -signal.SIGKILL
    assert app.run("Acme", **provider.environment).wait() == 0
    assert len(provider.requests) == 3


def test_tokens_and_the_price_are_told(sqlite_app: App, provider: Provider) -> None:
    run = sqlite_app.run("Acme", **provider.environment)
    [first, *_] = [line for line in run.stdout.splitlines() if "model request" in line]
    tokens, dollars = first.split()[-2:]
    assert tokens == "1500"
    assert float(dollars) > 0


@pytest.mark.parametrize(
    ("script", "requests"),
    [
        (["429", "429"], 4),
        (["500"], 3),
        (["503", "502", "500"], 5),
        (["drop"], 3),
        (["cut"], 3),
        (["empty"], 3),
        (["garbage", "html"], 4),
        (["null"], 3),
        (["no choices", "choices of another shape", "empty"], 5),
        (["answer", "garbage"], 3),
        (["answer", "429"], 3),
        (["malformed arguments", "both tools"], 3),
        (["answer", "unfit report", "unfit report"], 4),
    ],
)
def test_a_passing_fault_costs_one_request_more(
    sqlite_app: App, provider: Provider, script: list[str], requests: int
) -> None:
    provider.script = list(script)
    run = sqlite_app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert len(provider.requests) == requests
    assert len(sqlite_app.ledger("effect overview")) == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("429", "ModelRateLimitError"),
        ("500", "ModelServerError"),
        ("drop", "ModelConnectionError"),
        ("hang", "DBOSStepTimeoutError"),
        ("garbage", "ModelAPIError"),
        ("null", "UnexpectedModelBehavior"),
    ],
)
def test_a_lasting_fault_ends_after_four_requests_and_a_rerun_goes_on(
    sqlite_app: App, provider: Provider, fault: str, told: str
) -> None:
    provider.script = ["answer", *[fault] * 4]
    failed = sqlite_app.run("Acme", patches={"timeout_seconds": 0.5}, **provider.environment)
    assert failed.wait() == 1
    assert told in failed.stderr
    assert len(failed.stderr.splitlines()) == 2
    assert len(provider.requests) == 5
    again = sqlite_app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(provider.requests) == 6
    assert len(sqlite_app.ledger("effect")) == 2


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "503"])
def test_a_refused_key_fails_at_once_names_the_key_to_set_and_is_told_nowhere(
    sqlite_app: App, provider: Provider, status: str
) -> None:
    """The provider quotes the whole key in every error."""
    provider.script = [status] * (4 if status == "503" else 1)
    failed = sqlite_app.run("Acme", "--verbose", **provider.environment)
    assert failed.wait() == 1
    if status in ("401", "403"):
        assert "OPENAI_API_KEY" in failed.stderr
    if status != "503":
        assert len(provider.requests) == 1
    requests = len(provider.requests)
    stored = sqlite_app.rows("SELECT * FROM operation_outputs") + sqlite_app.rows(
        "SELECT * FROM workflow_output"
    )
    assert stored
    assert "sk-secret-key" not in failed.stdout + failed.stderr + decoded(stored)
    again = sqlite_app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert "resumes at step 1" in " ".join(again.stdout.split())
    assert len(provider.requests) == requests + 2


def decoded(rows: list[tuple[object, ...]]) -> str:
    """Return the text inside what DBOS stored, which is base64."""
    import base64

    texts = [str(value) for row in rows for value in row if value is not None]
    for text in list(texts):
        try:
            texts.append(base64.b64decode(text, validate=True).decode("latin-1"))
        except ValueError:
            continue
    return "\n".join(texts)


def test_a_bad_request_fails_at_once(sqlite_app: App, provider: Provider) -> None:
    provider.script = ["400"]
    failed = sqlite_app.run("Acme", **provider.environment)
    assert failed.wait() == 1
    assert len(provider.requests) == 1


def test_a_content_filter_is_not_asked_again(sqlite_app: App, provider: Provider) -> None:
    provider.script = ["answer", "filter"]
    failed = sqlite_app.run("Acme", **provider.environment)
    assert failed.wait() == 1
    assert "ContentFilterError" in failed.stderr
    assert len(provider.requests) == 2
    again = sqlite_app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(sqlite_app.ledger("effect")) == 2


def test_an_answer_that_never_fits_ends_in_bounds_and_a_rerun_asks_only_once_more(
    sqlite_app: App, provider: Provider
) -> None:
    provider.script = ["answer", *["unfit report"] * 10]
    failed = sqlite_app.run("Acme", **provider.environment)
    assert failed.wait() == 1
    assert len(provider.requests) == 4
    provider.script = []
    again = sqlite_app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(provider.requests) == 5
    assert len(sqlite_app.ledger("effect")) == 2


def test_another_model_is_another_run(sqlite_app: App, provider: Provider) -> None:
    assert sqlite_app.run("Acme").wait() == 0
    assert ": new." in sqlite_app.run("Acme", **provider.environment).stdout
    assert len(provider.requests) == 2


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("openai-chat:gpt-6-luna", "OPENAI"),
        ("openai:gpt-6-luna", "OPENAI"),
        ("anthropic:claude-haiku-5-5", "ANTHROPIC"),
    ],
)
def test_the_providers_own_client_does_not_retry(
    sqlite_app: App, provider: Provider, model: str, key: str
) -> None:
    """DBOS does, so that a scripted server sees one request for each attempt."""
    provider.script = ["503"] * 4
    url = provider.environment["OPENAI_BASE_URL"].removesuffix("/v1" * (key == "ANTHROPIC"))
    environment = {"MODEL": model, f"{key}_API_KEY": "sk-secret-key", f"{key}_BASE_URL": url}
    failed = sqlite_app.run("Acme", **environment)
    assert failed.wait() == 1
    assert "request failed 4 times" in failed.stderr
    assert len(provider.requests) == 4


def test_a_run_that_costs_too_much_stops_and_goes_on_when_the_limit_is_raised(
    app: App, provider: Provider
) -> None:
    stopped = app.run("Acme", COST_LIMIT_USD="0.00001", **provider.environment)
    assert stopped.wait() == 1
    assert "raise COST_LIMIT_USD" in stopped.stderr
    assert len(provider.requests) == 1
    again = app.run("Acme", **provider.environment)
    assert again.wait() == 0, again.stderr
    assert len(provider.requests) == 2
    assert len(app.ledger("effect")) == 2
    assert len(app.ledger("done commit 2")) == 1
