"""Settings and requests: the one place that reads the environment, and how a run gets its ID.

Importing this module reads nothing; `load_settings()` does, once, when a program starts.
"""

import hashlib
import json
import os
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

from dotenv import load_dotenv
from dotenv.parser import parse_stream
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

PROJECT = Path(__file__).resolve().parent

# DBOS resumes a run only under the application version that started it. By default that is a hash
# of the workflow's source, here pydantic-ai's own, and of the dbos release, so an upgrade of either
# would strand every unfinished run: it would wait silently for ever. Raise APP_VERSION when runs in
# flight could not continue under the new code: other steps, another order, other stored types.
APP_VERSION = "1"

MODEL_BY_KEY = {
    "OPENROUTER_API_KEY": "openrouter:openai/gpt-5.4-mini",
    "OPENAI_API_KEY": "openai:gpt-6-luna",
    "ANTHROPIC_API_KEY": "anthropic:claude-haiku-5-5",
}
"""The model that each key chooses when `MODEL` is not set. The first key found wins."""


class ResearchError(Exception):
    """A problem that a person can fix. The text says what is wrong and what to do."""

    exit_code = 2


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

    @property
    def attributes(self) -> dict[str, str]:
        """What is stored beside the run, to tell later what was asked."""
        return {**asdict(self), "request_id": derive_run_id(self)}


def derive_run_id(request: ResearchRequest) -> str:
    """Derive the DBOS workflow ID: the same request gets the same ID, and so the same run.

    Copy this for your own requests, and put in everything that makes two of them different. Leave
    the date out, or a run that is killed before midnight starts over after it.

    Returns:
        A prefix for people and 16 hexadecimal digits of SHA-256, such as
        `research-acme-0123456789abcdef`: the same on every machine and every Python.
    """
    # JSON keeps the parts apart; joined to one string, "ab" + "c" would equal "a" + "bc".
    parts = [request.tenant_id, request.user_id, "research", normalize(request.prompt)]
    parts += [request.model, request.bucket]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    letters = unicodedata.normalize("NFKD", normalize(request.company)).encode("ascii", "ignore")
    name = re.sub(r"[^a-z0-9]+", "-", letters.decode()).strip("-")[:24].strip("-")
    return f"research-{name}-{digest}" if name else f"research-{digest}"


def normalize(text: str) -> str:
    """Make texts equal that differ only in case, Unicode form or stray spaces."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def clean_text(what: str, text: str, *, limit: int = 100) -> str:
    """Return `text` without stray spaces; raise `ResearchError` if it is empty or unfit.

    Args:
        what: Names the text in the error.
        text: What somebody typed.
        limit: The most characters it may have.
    """
    text = text.strip()
    if not 0 < len(text) <= limit:
        raise ResearchError(f"{what} has {len(text)} characters: give it 1 to {limit}.")
    for character in text:
        # Category C: control, invisible, surrogate and unassigned. Unassigned ones are refused
        # because a later Python may fold them to another ID. Some languages need joiners.
        if unicodedata.category(character)[0] == "C" and character not in "\u200c\u200d":
            code = f"U+{ord(character):04X}"
            raise ResearchError(f"{what} contains the control character {code}: remove it.")
    return " ".join(text.split())


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
    tracing: bool = False
    """Whether traces go to Logfire, whose client reads the token by itself."""

    def request(self, company: str, bucket: str = "") -> ResearchRequest:
        """Ask for a report on a company; raise `ResearchError` for a name that is unfit."""
        company = clean_text("the company's name", company)
        bucket = clean_text("the bucket", bucket) if bucket else ""
        return ResearchRequest(self.tenant_id, self.user_id, company, self.model, bucket)

    def requests(self, names: list[str], bucket: str = "") -> dict[str, ResearchRequest]:
        """Ask for many reports; doubled names are one.

        Args:
            names: Companies. `["-"]` reads them from standard input: one a line, in UTF-8; blank
                lines and those that start with `#` are skipped.
            bucket: As in `ResearchRequest`.

        Returns:
            Run ID to request, in the order of the names.

        Raises:
            ResearchError: A name is unfit; the text says which.
        """
        if "-" in names and len(names) > 1:
            raise ResearchError(
                '"-" reads the names from standard input: give no others beside it.'
            )
        numbered = list(enumerate(names, start=1))
        if names == ["-"]:
            data = sys.stdin.buffer.read() if sys.stdin else b""
            try:
                lines = enumerate(data.decode("utf-8-sig").split("\n"), start=1)
            except UnicodeDecodeError as error:
                number = data.count(b"\n", 0, error.start) + 1
                raise ResearchError(f"line {number} is not UTF-8 text: convert it.") from None
            numbered = [(n, line) for n, line in lines if line.strip() and line.strip()[0] != "#"]
        requests: dict[str, ResearchRequest] = {}
        for number, name in numbered:
            try:
                request = self.request(name, bucket)
            except ResearchError as error:
                if names == [name]:
                    raise
                unit = "line" if names == ["-"] else "name"
                raise ResearchError(f"{unit} {number}: {error}") from None
            requests.setdefault(derive_run_id(request), request)
        if not requests:
            raise ResearchError("there is no company on standard input: give one a line.")
        return requests

    @property
    def queue(self) -> str:
        """The DBOS queue for many runs: one a model, because a process has only one model."""
        return f"research:{self.model}"

    @property
    def database_label(self) -> str:
        """The database as anybody may see it: without user and password."""
        url = self.database_url
        if url.drivername == "sqlite":
            return f"SQLite {Path(url.database or '').name}"
        return f"Postgres {url.database} on {url.host or 'this machine'}"

    @property
    def pooled_host(self) -> str | None:
        """The host, if it is Neon's pooled one, which gives no session to hold a lock in."""
        host = self.database_url.host or ""
        return host if "-pooler." in host and host.endswith(".neon.tech") else None


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
    by_key = (model for key, model in MODEL_BY_KEY.items() if _read(key))
    return Settings(
        model=clean_text("MODEL", _read("MODEL") or next(by_key, "offline")),
        database_url=_database_url(),
        tenant_id=clean_text("TENANT_ID", _read("TENANT_ID") or "local"),
        user_id=clean_text("USER_ID", _read("USER_ID") or "local"),
        failure_rate=_number("DEMO_FAILURE_RATE", "0.7", highest=1),
        latency=_number("DEMO_LATENCY", "1.0", highest=10),
        tracing=bool(_read("LOGFIRE_TOKEN")),
    )


def _read(key: str) -> str:
    return os.environ.get(key, "").strip()


def _number(key: str, default: str, *, highest: int) -> float:
    text = _read(key) or default
    try:
        if 0 <= float(text) <= highest:  # "nan" is not
            return float(text)
    except ValueError:
        pass
    raise ResearchError(f"{key} is {text[:40]!r}: give a number from 0 to {highest}.")


def _database_url() -> URL:
    key = "DBOS_SYSTEM_DATABASE_URL" if _read("DBOS_SYSTEM_DATABASE_URL") else "NEON_DATABASE_URL"
    text = _read(key)
    if not text:
        return URL.create("sqlite", database=str(PROJECT / "research.sqlite"))
    # No message quotes the URL: it may hold a password.
    unfit = ResearchError(
        f"{key} is not a usable database URL. Percent-encode special characters in it:\n"
        "postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////absolute/path.sqlite"
    )
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise unfit from None
    kind = url.drivername.partition("+")[0]
    if not url.database or url.database.startswith(":"):  # in memory, nothing outlives a process
        raise unfit
    if kind in ("postgresql", "postgres"):
        # An "@" in the host is the end of a password whose "@" should be "%40". A password among
        # the options would be logged.
        if "@" in (url.host or "") or {"password", "sslpassword"} & url.query.keys():
            raise unfit
        # A server that does not answer is given up soon. DBOS tries twice, and every address.
        options = {"connect_timeout": "3"} | dict(url.query)
        return url.set(drivername="postgresql+psycopg", query=options)
    if kind != "sqlite" or url.query:
        raise unfit
    # Relative to this file: relative to the current directory, a rerun from elsewhere would find
    # an empty database, and start over. Without links, because the lock goes by the path.
    path = (PROJECT / url.database).resolve()
    if not path.parent.is_dir():
        raise ResearchError(f"{key}: there is no folder {path.parent}. Create it or correct it.")
    return url.set(drivername="sqlite", database=str(path))
