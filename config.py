"""What the environment decides: the settings, the identity of a run, the model and the database.

Importing this module reads nothing; `load_settings()` does, once, when a program starts.
"""

import hashlib
import inspect
import json
import os
import re
import sqlite3
import textwrap
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient
from dbos import error as dbos_error
from dotenv import load_dotenv
from dotenv.parser import parse_stream
from filelock import FileLock, Timeout
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model, infer_model
from pydantic_ai.models.function import FunctionModel
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

import tools

APP_NAME = "durable-research-agent"
PROJECT = Path(__file__).resolve().parent

# DBOS resumes a run only under the application version that started it. By default that is a hash
# of the workflow's source, here pydantic-ai's own, and of the dbos release, so an upgrade of either
# would strand every unfinished run: it would wait silently for ever. Raise APP_VERSION when runs in
# flight could not continue under the new code: other steps, another order, other stored types.
APP_VERSION = "2"

MODEL_BY_KEY = {
    "OPENROUTER_API_KEY": "openrouter:openai/gpt-5.4-mini",
    "OPENAI_API_KEY": "openai:gpt-6-luna",
    "ANTHROPIC_API_KEY": "anthropic:claude-haiku-5-5",
}
"""The model that each key chooses when `MODEL` is not set. The first key found wins."""


class ResearchError(Exception):
    """A problem that a person can fix. The text says what is wrong and what to do."""

    exit_code = 2


# ---------------------------------------------------------------- requests and run IDs


@dataclass(frozen=True)
class ResearchRequest:
    """One question of one user to one model."""

    tenant_id: str
    user_id: str
    company: str
    model: str
    bucket: str = ""
    """Any text: a date, a quarter, a number. Another bucket is another run of the same request."""

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return f'Write a research report on the company "{self.company}".'


def derive_run_id(request: ResearchRequest) -> str:
    """Derive the DBOS workflow ID: the same request gets the same ID, and so the same run.

    Copy this for your own requests, and put in everything that makes two of them different. Leave
    the date out, or a run that is killed before midnight starts over after it.

    Returns:
        A prefix for people and 16 hexadecimal digits of SHA-256, such as
        `research-acme-0123456789abcdef`: the same on every machine and every Python.
    """
    parts = [request.tenant_id, request.user_id, normalize(request.prompt), request.model]
    digest = digest_of([*parts, request.bucket, *instructions()])
    letters = unicodedata.normalize("NFKD", normalize(request.company)).encode("ascii", "ignore")
    name = re.sub(r"[^a-z0-9]+", "-", letters.decode()).strip("-")[:24].strip("-")
    return f"research-{name}-{digest}" if name else f"research-{digest}"


def instructions() -> list[str]:
    """Return what the model is told with every request: it reads the tools' docstrings as well."""
    told = [f"{tool.__name__}: {inspect.getdoc(tool)}" for tool in tools.TOOLS]
    return [tools.INSTRUCTIONS, *told]


def digest_of(parts: list[str]) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    # JSON keeps the parts apart; joined to one string, "ab" + "c" would equal "a" + "bc".
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def normalize(text: str) -> str:
    """Make texts equal that differ only in case, Unicode form or stray spaces."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def clean_text(what: str, text: str) -> str:
    """Return what somebody typed without stray spaces; raise `ResearchError` if it is unfit."""
    text = text.strip()
    if not 0 < len(text) <= 100:
        raise ResearchError(f"{what} has {len(text)} characters: give it 1 to 100.")
    for character in text:
        # Category C: control, invisible, surrogate and unassigned. Unassigned ones are refused
        # because a later Python may fold them to another ID. Some languages need joiners.
        if unicodedata.category(character)[0] == "C" and character not in "\u200c\u200d":
            code = f"U+{ord(character):04X}"
            raise ResearchError(f"{what} contains the control character {code}: remove it.")
    return " ".join(text.split())


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What the environment decides."""

    model: str
    database_url: URL
    tenant_id: str
    user_id: str
    failure_rate: float
    """Chance, 0 to 1, that one attempt of the flaky tool fails."""
    latency: float
    """Seconds, 0 to 10, that a simulated call takes."""
    cost_limit: float
    """US dollars: a run that has cost more makes no further model request."""

    def request(self, company: str, bucket: str = "") -> ResearchRequest:
        """Ask for a report on a company; raise `ResearchError` for a name that is unfit."""
        company = clean_text("the company's name", company)
        bucket = clean_text("the bucket", bucket) if bucket else ""
        return ResearchRequest(self.tenant_id, self.user_id, company, self.model, bucket)

    @property
    def queue(self) -> str:
        """The DBOS queue for many runs: a process has only one model, and one set of instructions.

        A run that is queued under other instructions is another question: it is not taken.
        """
        return f"research:{self.model}:{digest_of(instructions())[:8]}"

    @property
    def database_label(self) -> str:
        """The database as anybody may see it: without user and password."""
        url = self.database_url
        if url.drivername == "sqlite":
            return f"SQLite {Path(url.database or '').name}"
        return f"Postgres {url.database} on {url.host or 'this machine'}"


def load_settings() -> Settings:
    """Read the environment, and `.env` beside this file for what the environment leaves unset.

    Raises:
        ResearchError: A value cannot be used; the text names its key.
    """
    path = PROJECT / ".env"
    try:
        for line in parse_stream(StringIO(path.read_text("utf-8") if path.exists() else "")):
            if line.error:  # load_dotenv() would pass over it
                raise ResearchError(f".env, line {line.original.line}: write it as KEY=value.")
        load_dotenv(path)
    except (OSError, ValueError) as error:
        raise ResearchError(f".env cannot be read: {error}") from None
    for key in MODEL_BY_KEY:
        if not _read(key):  # an empty line means "not set", to the provider's client as well
            os.environ.pop(key, None)
        elif not (_read(key).isascii() and _read(key).isprintable()):
            raise ResearchError(f"{key} contains a character that no key has: copy the key again.")
        else:  # a client would send a stray line end as well, and its error would quote the key
            os.environ[key] = _read(key)
    by_key = (model for key, model in MODEL_BY_KEY.items() if _read(key))
    return Settings(
        model=clean_text("MODEL", _read("MODEL") or next(by_key, "offline")),
        database_url=_database_url(),
        tenant_id=clean_text("TENANT_ID", _read("TENANT_ID") or "local"),
        user_id=clean_text("USER_ID", _read("USER_ID") or "local"),
        failure_rate=_number("DEMO_FAILURE_RATE", 0.5, highest=1),
        latency=_number("DEMO_LATENCY", 1.0, highest=10),
        cost_limit=_number("COST_LIMIT_USD", 1.0, highest=1_000_000),
    )


def _read(key: str) -> str:
    return os.environ.get(key, "").strip()


def _number(key: str, default: float, *, highest: int) -> float:
    with suppress(ValueError):
        number = float(_read(key) or default)
        if 0 <= number <= highest:  # "nan" is not
            return number
    raise ResearchError(f"{key} is {_read(key)[:40]!r}: give a number from 0 to {highest}.")


def _database_url() -> URL:
    key = "DBOS_SYSTEM_DATABASE_URL" if _read("DBOS_SYSTEM_DATABASE_URL") else "NEON_DATABASE_URL"
    with suppress(ArgumentError, ValueError):
        url = make_url(_read(key) or "sqlite:///research.sqlite")
        kind = url.get_backend_name()
        # In memory, nothing outlives a process. An "@" in the host is the end of a password whose
        # "@" should be "%40". A password among the options would be logged.
        if not url.database or url.database.startswith(":") or "@" in (url.host or ""):
            pass
        elif kind in ("postgresql", "postgres") and not {"password", "sslpassword"} & {*url.query}:
            # A server that does not answer is given up soon. DBOS tries twice, and every address.
            query = {"connect_timeout": "3", **url.query}
            return url.set(drivername="postgresql+psycopg", query=query)
        elif kind == "sqlite" and not url.query:
            # Relative to this file: relative to the current directory, a rerun from elsewhere would
            # find an empty database, and start over. Without links: the lock goes by the path.
            path = (PROJECT / url.database).resolve()
            if not os.path.isdir(path.parent):  # Path.is_dir() raises if it may not look
                raise ResearchError(
                    f"{key}: there is no folder {path.parent}. Create or correct it."
                )
            return URL.create("sqlite", database=str(path), query={"timeout": "30"})
    raise ResearchError(  # without quoting the URL, which may hold a password
        f"{key} is not a usable database URL. Percent-encode special characters in it:\n"
        "postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////absolute/path.sqlite"
    )


def build_model(name: str) -> Model:
    """Return the model of that name; raise `ResearchError` if it cannot be used."""
    if name == "offline":
        return FunctionModel(tools.offline_script, model_name=name)
    try:
        return infer_model(name)
    except (UserError, ValueError, ImportError) as error:
        # The name is unknown, or its key or package is missing: the first line says which.
        reason = str(error).splitlines()[0]
        raise ResearchError(f"the model {name} cannot be used: {reason}") from error


# ---------------------------------------------------------------- the database

DATABASE_ERRORS = (SQLAlchemyError, dbos_error.DBOSInitializationError)
RELOCK = 5  # seconds after a restart of Postgres, in which live processes take their locks again

# Postgres must not end a session for being idle. And it must notice within half a minute, not two
# hours, that a client's machine has lost its power or its network: then its locks are free.
NOTICE_A_LOST_CLIENT = """SET idle_session_timeout = 0; SET tcp_keepalives_idle = 15;
SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"""


def open_database(settings: Settings) -> DBOSClient:
    """Connect to the database, and create what is missing; `ResearchError` if it cannot be used."""
    url = settings.database_url
    address = url.render_as_string(hide_password=False)
    try:
        if url.drivername == "sqlite":
            # Whoever can write to the file can run code in this app: it is its owner's alone.
            Path(f"{url.database}.locks").mkdir(mode=0o700, exist_ok=True)
            if not Path(f"{url.database}").exists():
                Path(f"{url.database}").touch(mode=0o600)
            if sqlite3.sqlite_version_info < (3, 42):
                sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _add_unixepoch)
        else:
            try:
                _refuse_transaction_pooler(url)
            except OperationalError:
                DBOS.migrate(address)  # which creates a database that does not exist
                _refuse_transaction_pooler(url)
        DBOS.migrate(address)
        return DBOSClient(system_database_url=address, application_name=APP_NAME)
    except (*DATABASE_ERRORS, OSError) as error:
        raise database_error(settings, error) from error


def database_error(settings: Settings, error: Exception) -> ResearchError:
    """Describe a database error without the URL, which may hold a password."""
    reason = textwrap.shorten(str(getattr(error, "orig", error)), 200)
    return ResearchError(
        f"the database ({settings.database_label}) cannot be used: {reason}\n"
        "Fix it or its URL, and run the same command again: what finished is stored."
    )


def _add_unixepoch(connection: Any, _record: Any) -> None:
    # From Python 3.12 on, dbos 3.4 uses SQLite's unixepoch('subsec'), which came with SQLite 3.42.
    # Many interpreters are linked to an older one. DBOS stores whole milliseconds.
    if isinstance(connection, sqlite3.Connection):
        connection.create_function("unixepoch", 1, lambda _: round(time.time(), 3))


def _connect(url: URL, **options: Any) -> sqlalchemy.Connection:
    options |= {"isolation_level": "AUTOCOMMIT", "poolclass": sqlalchemy.NullPool}
    return sqlalchemy.create_engine(url, **options).connect()


def _refuse_transaction_pooler(url: URL) -> None:
    # Such a pooler gives each transaction another session of the server, and a lock stays with the
    # session that took it. Then two open connections share a session, or one changes its own. They
    # ask in an irregular order, because a pooler's own turns could match a regular one.
    plain = {"connect_args": {"prepare_threshold": None}}  # prepared statements would be lost
    with _connect(url, **plain) as one, _connect(url, **plain) as other:
        ask = sqlalchemy.text("SELECT pg_backend_pid()")
        turns = [(one, other)[int(turn)] for turn in "01100100011101101001"]
        answers = {(connection, connection.scalar(ask)) for connection in turns}
    if len(answers) > 2 or len({session for _, session in answers}) < 2:
        raise ResearchError(
            "DBOS_SYSTEM_DATABASE_URL or NEON_DATABASE_URL is the address of a pooler in"
            " transaction mode, which cannot hold a lock.\n"
            "Use the server's direct address (Neon: the host without -pooler), or session mode."
        )


@contextmanager
def take_lock(url: URL, name: str) -> Iterator[bool]:
    """Take a lock, tell whether no live process has it, and let go of it at the end.

    On SQLite a lock is a file beside the database, on Postgres it belongs to a session. The system
    or the server frees it when the process that holds it dies, however it dies.
    """
    if url.drivername == "sqlite":
        try:
            with FileLock(_lock_file(url, name), blocking=False):
                yield True
        except Timeout:
            yield False
    else:
        with _connect(url) as connection:
            connection.exec_driver_sql(NOTICE_A_LOST_CLIENT)
            # A restart of the server frees every lock. So the answer is NULL, "not yet", until
            # live processes have connected again.
            uptime = "extract(epoch FROM now() - pg_postmaster_start_time())"
            lock = f"pg_try_advisory_lock({_lock_key(name)})"
            query = sqlalchemy.text(f"SELECT CASE WHEN {uptime} > {RELOCK} THEN {lock} END")
            while (taken := connection.scalar(query)) is None:
                time.sleep(0.1)
            yield bool(taken)


def hold_lock(url: URL, name: str) -> tuple[object, dict[str, Any]]:
    """Take the lock by which others see that this process lives.

    Returns:
        What must be kept for as long as the lock is, and engine options for DBOS. With these, each
        of its connections to Postgres holds the lock before it takes a run. So the lock is held
        again as soon as DBOS has connected again, after a restart of the server or a cut network.
    """
    if url.drivername == "sqlite":
        path = _lock_file(url, name)
        for old in path.parent.iterdir():  # remove the files of processes that have died
            with suppress(Timeout), FileLock(old, blocking=False):
                old.unlink()
        return FileLock(path).acquire().lock, {}

    def share(session: Any, _record: object) -> None:
        session.execute(NOTICE_A_LOST_CLIENT)
        session.execute(f"SELECT pg_advisory_lock_shared({_lock_key(name)})")
        session.commit()

    return None, {"pool_events": [(share, "connect")]}


def _lock_key(name: str) -> int:
    return int(hashlib.sha256(f"{APP_NAME}:{name}".encode()).hexdigest()[:15], 16)


def _lock_file(url: URL, name: str) -> Path:
    return Path(f"{url.database}.locks", f"{_lock_key(name)}")
