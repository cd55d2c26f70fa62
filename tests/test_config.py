"""Settings, requests and run IDs."""

import os
import re
import subprocess
import sys
import threading
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import wait_for

import config
import tools
from config import ResearchRequest, clean_text, load_settings
from tools import BRIEF, Brief, ResearchError

KEYS = {
    "MODEL",
    "OPENROUTER_API_KEY",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "DBOS_SYSTEM_DATABASE_URL",
    "NEON_DATABASE_URL",
    "TENANT_ID",
    "USER_ID",
    "DEMO_FAILURE_RATE",
    "DEMO_LATENCY",
    "DEMO_IDEMPOTENT",
    "DEMO_BILL",
    "COST_LIMIT_USD",
}
REQUEST = ResearchRequest(
    "local",
    "local",
    "Acme",
    "offline",
    told=config.digest_of(BRIEF.told),
    question=BRIEF.question,
)


def derive_run_id(request: ResearchRequest) -> str:
    return request.run_id


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable is set, and the project is an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key not in KEYS}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("dotenv.main.os.environ", environment)
    monkeypatch.setattr(config, "PROJECT", tmp_path)


def test_without_any_setting_it_runs_offline_on_sqlite_beside_the_code(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.model == "offline"
    assert settings.database_url.database == str(tmp_path / "research.sqlite")
    assert (settings.tenant_id, settings.user_id) == ("local", "local")
    assert (settings.service.failure_rate, settings.service.latency) == (0.5, 1.0)
    assert settings.service.bill == tmp_path / "service.log"
    assert settings.service.idempotent


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        (["ANTHROPIC_API_KEY"], "anthropic:claude-haiku-5-5"),
        (["ANTHROPIC_API_KEY", "OPENAI_API_KEY"], "openai:gpt-6-luna"),
        (["OPENAI_API_KEY", "OPENROUTER_API_KEY"], "openrouter:openai/gpt-5.4-mini"),
    ],
)
def test_the_first_key_found_chooses_the_model(keys: list[str], model: str) -> None:
    os.environ.update(dict.fromkeys(keys, "sk-any"))
    assert load_settings().model == model
    os.environ["MODEL"] = "offline"
    assert load_settings().model == "offline"


def test_an_empty_key_is_not_set_for_the_providers_client_either() -> None:
    os.environ["OPENAI_API_KEY"] = " "
    assert load_settings().model == "offline"
    assert "OPENAI_API_KEY" not in os.environ


def test_a_key_with_a_stray_line_end_is_given_to_the_providers_client_without_it() -> None:
    os.environ["OPENAI_API_KEY"] = " sk-any\n"
    load_settings()
    assert os.environ["OPENAI_API_KEY"] == "sk-any"


def test_the_real_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TENANT_ID=file\nUSER_ID=file\n")
    os.environ["USER_ID"] = "real"
    settings = load_settings()
    assert (settings.tenant_id, settings.user_id) == ("file", "real")


def test_the_example_holds_exactly_the_keys_that_are_read() -> None:
    example = (Path(config.__file__).parent / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) == KEYS
    source = Path(config.__file__).read_text()
    assert (
        set(
            re.findall(
                r'"([A-Z_]+(?:_KEY|_URL|_ID|_RATE|_LATENCY|_USD|_IDEMPOTENT|_BILL)|MODEL)"', source
            )
        )
        == KEYS
    )


def test_the_example_as_it_stands_changes_nothing(tmp_path: Path) -> None:
    before = load_settings()
    (tmp_path / ".env").write_text((Path(config.__file__).parent / ".env.example").read_text())
    assert load_settings() == before


def test_an_env_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResearchError, match=r"\.env cannot be read"):
        load_settings()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("DEMO_FAILURE_RATE", "1.1", "DEMO_FAILURE_RATE is '1.1': give a number from 0 to 1"),
        ("DEMO_FAILURE_RATE", "often", "DEMO_FAILURE_RATE is 'often'"),
        ("DEMO_FAILURE_RATE", "nan", "DEMO_FAILURE_RATE is 'nan'"),
        ("DEMO_LATENCY", "-1", "DEMO_LATENCY is '-1': give a number from 0 to 10"),
        ("DEMO_LATENCY", "inf", "DEMO_LATENCY is 'inf'"),
        ("COST_LIMIT_USD", "-1", "COST_LIMIT_USD is '-1': give a number from 0 to 1000000"),
        ("TENANT_ID", "a\x00b", "TENANT_ID contains the control character U\\+0000"),
        ("USER_ID", "x" * 101, "USER_ID has 101 characters: give it 1 to 100"),
        ("OPENAI_API_KEY", "sk-“quoted”", "OPENAI_API_KEY contains a character that no key has"),
        (
            "DBOS_SYSTEM_DATABASE_URL",
            "nonsense",
            "DBOS_SYSTEM_DATABASE_URL is not",
        ),
        (
            "NEON_DATABASE_URL",
            "postgresql://u:secret@h:port/d",
            "NEON_DATABASE_URL is not",
        ),
        (
            "NEON_DATABASE_URL",
            "postgresql://u:secret@host",
            "NEON_DATABASE_URL is not",
        ),
        (
            "NEON_DATABASE_URL",
            "mysql://u:secret@host/d",
            "NEON_DATABASE_URL is not",
        ),
        ("NEON_DATABASE_URL", "postgresql://u:p@secret@host/d", "NEON_DATABASE_URL is not"),
        ("NEON_DATABASE_URL", "postgresql://h/d?password=secret", "NEON_DATABASE_URL is not"),
        ("DBOS_SYSTEM_DATABASE_URL", "sqlite:///x.sqlite?mode=ro", "is not a usable database"),
        ("DBOS_SYSTEM_DATABASE_URL", "sqlite:///file:x?mode=memory", "is not a usable database"),
        ("DBOS_SYSTEM_DATABASE_URL", "sqlite://", "is not a usable database"),
        ("DBOS_SYSTEM_DATABASE_URL", "sqlite:///:memory:", "is not a usable database"),
        ("DBOS_SYSTEM_DATABASE_URL", "sqlite:////nowhere/x.sqlite", "there is no folder /nowhere"),
    ],
)
def test_an_unfit_value_is_named_and_no_secret_is_told(key: str, value: str, told: str) -> None:
    os.environ[key] = value
    with pytest.raises(ResearchError, match=told) as caught:
        load_settings()
    assert caught.value.exit_code == 2
    assert "secret" not in str(caught.value)
    assert "quoted" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("A=1\nOPENAI_API_KEY sk-any\n", "line 2"),
        ('A="open\n', "line 1"),
    ],
)
def test_a_line_of_the_file_that_cannot_be_parsed_is_an_error(
    tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / ".env").write_text(text)
    with pytest.raises(ResearchError, match=told):
        load_settings()


def test_a_linked_sqlite_file_has_one_path_and_so_one_lock(tmp_path: Path) -> None:
    (tmp_path / "linked.sqlite").symlink_to(tmp_path / "real.sqlite")
    os.environ["DBOS_SYSTEM_DATABASE_URL"] = "sqlite:///linked.sqlite"
    assert load_settings().database_url.database == str(tmp_path / "real.sqlite")


def test_a_relative_sqlite_path_does_not_follow_the_current_directory(tmp_path: Path) -> None:
    os.environ["DBOS_SYSTEM_DATABASE_URL"] = "sqlite:///mine.sqlite"
    assert load_settings().database_url.database == str(tmp_path / "mine.sqlite")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_usual_spelling_of_a_postgres_url_is_taken(scheme: str) -> None:
    os.environ["NEON_DATABASE_URL"] = f"{scheme}://me:secret@host/db?sslmode=require"
    settings = load_settings()
    assert settings.database_url.drivername == "postgresql+psycopg"
    assert settings.database_url.query == {
        "connect_timeout": "3",
        "sslmode": "require",
        "client_encoding": "utf8",
    }
    assert settings.database_label == "Postgres db on host"
    assert "secret" not in repr(settings)


def test_a_run_id_is_readable_and_does_not_change_from_release_to_release() -> None:
    assert derive_run_id(REQUEST) == "research-acme-63097a0b1aa08510"


@pytest.mark.parametrize("same", ["ACME", " acme ", "Acme\u00a0", "\tAcme"])
def test_case_and_stray_spaces_do_not_matter(same: str) -> None:
    assert derive_run_id(replace(REQUEST, company=same.strip())) == derive_run_id(REQUEST)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["Zürich Ångström", "Île Straße", "ｱｸﾐ", "ΆΣ", "Ǆ"])
def test_the_unicode_form_does_not_matter(name: str, form: str) -> None:
    same = unicodedata.normalize(form, name)  # type: ignore[arg-type]
    request = replace(REQUEST, company=same)
    assert derive_run_id(request) == derive_run_id(replace(REQUEST, company=name))
    assert derive_run_id(request) == derive_run_id(replace(REQUEST, company=name.upper()))


def test_every_part_of_the_request_counts_and_none_runs_into_the_next() -> None:
    requests = [
        REQUEST,
        replace(REQUEST, tenant_id="other"),
        replace(REQUEST, user_id="other"),
        replace(REQUEST, company="Acme2"),
        replace(REQUEST, company="Acme²"),
        replace(REQUEST, model="other"),
        replace(REQUEST, bucket="2026-Q4"),
        replace(REQUEST, bucket="2026-q4"),
        replace(REQUEST, tenant_id="loca", user_id="llocal"),
        replace(REQUEST, tenant_id='local", "local'),
        replace(REQUEST, model="off", bucket="line"),
    ]
    assert len({derive_run_id(request) for request in requests}) == len(requests)


def test_whoever_changes_the_instructions_or_a_tool_asks_another_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_id(brief: Brief) -> str:
        return load_settings().request(brief, "Acme").run_id

    async def other_tool(company_name: str) -> None:
        """Look up something else."""

    before = run_id(BRIEF)
    assert run_id(replace(BRIEF, instructions=BRIEF.instructions + " Be brief.")) != before
    assert run_id(replace(BRIEF, tools=[*BRIEF.tools, other_tool])) != before
    assert run_id(replace(BRIEF, question="Is {company} for sale?")) != before
    with monkeypatch.context() as patch:
        patch.setattr(tools.fetch_company_overview, "__doc__", "Look up what a company does.")
        assert run_id(BRIEF) != before
    assert run_id(BRIEF) == before == REQUEST.run_id


def test_neons_pooled_host_is_replaced_by_the_direct_one_and_others_are_not() -> None:
    pooled = "postgresql://me:secret@ep-cool-1-pooler.eu-1.aws.neon.tech/neondb?sslmode=require"
    os.environ["NEON_DATABASE_URL"] = pooled
    settings = load_settings()
    assert settings.database_url.host == "ep-cool-1.eu-1.aws.neon.tech"
    assert "direct" in settings.database_label
    os.environ["NEON_DATABASE_URL"] = pooled.replace("neon.tech", "example.com")
    assert load_settings().database_url.host == "ep-cool-1-pooler.eu-1.aws.neon.tech".replace(
        "neon.tech", "example.com"
    )
    os.environ["NEON_DATABASE_URL"] = pooled.replace("-pooler", "")
    assert "direct" not in load_settings().database_label


def test_the_env_file_is_read_once_so_it_may_be_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".env")
    tenants: list[str] = []

    def write() -> None:
        (tmp_path / ".env").write_text("TENANT_ID=piped\n")

    def read() -> None:
        tenants.append(load_settings().tenant_id)

    for work in (write, read):  # a second reading would wait for ever, so it must not be waited for
        threading.Thread(target=work, daemon=True).start()
    wait_for(lambda: tenants, "the settings")
    assert tenants == ["piped"]


def test_a_name_without_latin_letters_has_an_id_too() -> None:
    assert re.fullmatch(
        r"research-[0-9a-f]{16}", derive_run_id(replace(REQUEST, company="株式会社"))
    )
    assert len(derive_run_id(replace(REQUEST, company="x" * 100))) <= 60


def test_the_run_id_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import config, tools\n"
        "settings = config.load_settings()\n"
        "print(settings.request(tools.BRIEF, 'Acme').run_id)"
    )
    folder = Path(config.__file__).parent
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == derive_run_id(REQUEST)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has 0 characters"),
        ("  ", "has 0 characters"),
        ("x" * 101, "has 101 characters"),
        ("a\nb", "U\\+000A"),
        ("a\x1b[31m", "U\\+001B"),
        ("a\u202eb", "U\\+202E"),
        ("a\udc80", "U\\+DC80"),
        ("a\u0378", "U\\+0378"),
    ],
)
def test_unfit_text_is_refused(text: str, told: str) -> None:
    with pytest.raises(ResearchError, match=told):
        clean_text("the company's name", text)


def test_fit_text_loses_its_stray_spaces_only() -> None:
    assert clean_text("it", "  Nestlé   S.A. ") == "Nestlé S.A."
    assert clean_text("it", "ab\u200cc") == "ab\u200cc"


def test_a_process_holds_its_lock_even_if_another_one_looks_at_the_file_meanwhile(
    tmp_path: Path,
) -> None:
    """Another process that starts removes the files that nobody holds, and holds each for that."""
    tried = threading.Event()

    class Watched(config.FileLocks):
        def take(self, name: str) -> bool:
            taken = super().take(name)
            tried.set()
            return taken

    mine, other = Watched(tmp_path), config.FileLocks(tmp_path)
    assert other.take("host:1:2")
    start = threading.Thread(target=mine.show_that_this_process_lives, args=["host:1:2"])
    start.start()
    assert tried.wait(10)
    other.free("host:1:2")
    start.join()
    assert mine.is_held("host:1:2")
    assert other.is_dead("host:1:2") is False
    mine.free("host:1:2")
