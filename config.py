"""What the environment decides: the settings, the identity of a run, the model and the database.

Importing this module reads nothing; `load_settings()` does, once, when a program starts.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import socket
import sqlite3
import textwrap
import threading
import time
import unicodedata
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import sqlalchemy
from dbos import DBOS, DBOSClient, EnqueueOptions
from dbos import error as dbos_error
from dotenv import load_dotenv
from dotenv.parser import parse_stream
from filelock import FileLock, Timeout
from pydantic_ai import exceptions as ai_error
from pydantic_ai import messages as ai
from pydantic_ai.models import Model, infer_model
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.wrapper import WrapperModel
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

import tools
from tools import Brief, ResearchError, SimulatedService, print_in_step

APP_NAME = "durable-research-agent"
AGENT_NAME = "research_agent"
# DBOSAgent registers its workflow, and the step that asks the model, under these names.
WORKFLOW_NAME = f"{AGENT_NAME}.run"
MODEL_REQUEST = f"{AGENT_NAME}__model.request"
PROJECT = Path(__file__).resolve().parent

# DBOS resumes a run only under the application version that started it. By default that is a hash
# of the workflow's source, here pydantic-ai's own, and of the dbos release, so an upgrade of either
# would strand every unfinished run: it would wait silently for ever. Raise APP_VERSION when runs in
# flight could not continue under the new code: other steps, another order, other stored types.
APP_VERSION = "3"

MODEL_BY_KEY = {
    "OPENROUTER_API_KEY": "openrouter:openai/gpt-5.4-mini",
    "OPENAI_API_KEY": "openai:gpt-6-luna",
    "ANTHROPIC_API_KEY": "anthropic:claude-haiku-5-5",
}
"""The model that each key chooses when `MODEL` is not set. The first key found wins."""


# ---------------------------------------------------------------- requests and run IDs


@dataclass(frozen=True)
class ResearchRequest:
    """One question of one user to one model: the same question is the same run."""

    tenant_id: str
    user_id: str
    company: str
    model: str
    bucket: str = ""
    """Any text: a date, a quarter, a number. Another bucket is another run of the same request."""
    told: str = ""
    """A digest of the brief. Changed instructions, tools or docstrings are another question."""
    recipe: str = "agent"
    """The program whose run this is. It is not part of the run ID."""
    question: str = "{company}"

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        return self.question.format(company=self.company)

    @property
    def run_id(self) -> str:
        """The DBOS workflow ID: the same request gets the same ID, and so the same run.

        Copy this for your own requests, and put in everything that makes two of them different.
        Leave the date out, or a run that is killed before midnight starts over after it. The
        promise holds for the same ID: after a change of the brief, an unfinished run stays behind.

        It is a prefix for people and 16 hexadecimal digits of SHA-256, such as
        `research-acme-0123456789abcdef`: the same on every machine and every Python.
        """
        parts = [self.tenant_id, self.user_id, normalize(self.prompt), self.model, self.bucket]
        digest = digest_of([*parts, self.told])
        letters = unicodedata.normalize("NFKD", normalize(self.company)).encode("ascii", "ignore")
        name = re.sub(r"[^a-z0-9]+", "-", letters.decode()).strip("-")[:24].strip("-")
        return f"research-{name}-{digest}" if name else f"research-{digest}"

    def enqueue(self, client: DBOSClient, queue: str) -> None:
        """Store this run, which is new, in a queue.

        Nobody calls `agent.run()` here: DBOS will, in a process that serves the queue.
        """
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW_NAME,
            "workflow_id": self.run_id,
            "queue_name": queue,
            "app_version": APP_VERSION,
            "attributes": asdict(self),  # to tell later what was asked
        }
        # `deps` are stored as well. So there are none: a resumed run would get old ones back.
        client.enqueue(options, self.prompt, deps=None)


def digest_of(parts: list[str]) -> str:
    """Return 16 hexadecimal digits of SHA-256."""
    # JSON keeps the parts apart; joined to one string, "ab" + "c" would equal "a" + "bc".
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def normalize(text: str) -> str:
    """Make texts equal that differ only in case, Unicode form or stray spaces."""
    folded = unicodedata.normalize("NFD", text).casefold()
    return " ".join(unicodedata.normalize("NFC", folded).split())


def clean_text(what: str, text: str, longest: int = 100) -> str:
    """Return what somebody typed without stray spaces; raise `ResearchError` if it is unfit."""
    text = text.strip()
    if not 0 < len(text) <= longest:
        raise ResearchError(f"{what} has {len(text)} characters: give it 1 to {longest}.")
    for character in text:
        category, code = unicodedata.category(character), f"U+{ord(character):04X}"
        # Some languages need the joiners.
        if category in ("Cc", "Cf") and character not in "\u200c\u200d":
            raise ResearchError(f"{what} contains the control character {code}: remove it.")
        if category in ("Cn", "Co", "Cs"):  # a later Python may fold it, and so derive another ID
            raise ResearchError(
                f"{what} contains {code}, which this Python does not know: remove it."
            )
    return " ".join(text.split())


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What the environment decides."""

    model: str
    database_url: URL
    database_label: str
    """The database as anybody may see it: without user and password."""
    tenant_id: str
    user_id: str
    cost_limit: float
    """US dollars: a run that has cost more makes no further model request."""
    service: SimulatedService
    """What the tools call."""

    def request(self, brief: Brief, company: str, bucket: str = "") -> ResearchRequest:
        """Ask for a report on a company; raise `ResearchError` for a name that is unfit."""
        return ResearchRequest(
            tenant_id=self.tenant_id,
            user_id=self.user_id,
            company=clean_text("the company's name", company),
            model=self.model,
            bucket=clean_text("the bucket", bucket) if bucket else "",
            told=digest_of(brief.told),
            recipe=brief.recipe,
            question=brief.question,
        )


def load_settings() -> Settings:
    """Read the environment, and `.env` beside this file for what the environment leaves unset.

    Raises:
        ResearchError: A value cannot be used; the text names its key.
    """
    path = PROJECT / ".env"
    try:
        text = path.read_text("utf-8") if path.exists() else ""  # once: it may be a pipe
        for line in parse_stream(StringIO(text)):
            if line.error:  # load_dotenv() would pass over it
                raise ResearchError(f".env, line {line.original.line}: write it as KEY=value.")
        load_dotenv(stream=StringIO(text))
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
    database_url, database_label = _database()
    return Settings(
        model=clean_text("MODEL", _read("MODEL") or next(by_key, "offline")),
        database_url=database_url,
        database_label=database_label,
        tenant_id=clean_text("TENANT_ID", _read("TENANT_ID") or "local"),
        user_id=clean_text("USER_ID", _read("USER_ID") or "local"),
        cost_limit=_number("COST_LIMIT_USD", 1.0, highest=1_000_000),
        service=SimulatedService(
            failure_rate=_number("DEMO_FAILURE_RATE", 0.5, highest=1),
            latency=_number("DEMO_LATENCY", 1.0, highest=10),
            idempotent=_number("DEMO_IDEMPOTENT", 1, highest=1) != 0,
            bill=PROJECT / (_read("DEMO_BILL") or "service.log"),
        ),
    )


def _read(key: str) -> str:
    return os.environ.get(key, "").strip()


def _number(key: str, default: float, *, highest: int) -> float:
    with suppress(ValueError):
        number = float(_read(key) or default)
        if 0 <= number <= highest:  # "nan" is not
            return number
    raise ResearchError(f"{key} is {_read(key)[:40]!r}: give a number from 0 to {highest}.")


def _database() -> tuple[URL, str]:
    """Return the database's URL and its label."""
    key = "DBOS_SYSTEM_DATABASE_URL" if _read("DBOS_SYSTEM_DATABASE_URL") else "NEON_DATABASE_URL"
    with suppress(ArgumentError, ValueError):
        url = make_url(_read(key) or "sqlite:///research.sqlite")
        kind = url.get_backend_name()
        # In memory, nothing outlives a process. An "@" in the host is the end of a password whose
        # "@" should be "%40". A password among the options would be logged.
        if not url.database or url.database.startswith(":") or "@" in (url.host or ""):
            pass
        elif kind in ("postgresql", "postgres") and not {"password", "sslpassword"} & {*url.query}:
            # Neon's dialog offers the address of its pooler, which cannot hold a lock (see below).
            # The server's own address is the same, without "-pooler".
            host = re.sub(r"-pooler(\..+\.neon\.(tech|build))$", r"\1", url.host or "")
            direct = "" if host == (url.host or "") else ", the direct address of that pooler"
            label = f"Postgres {url.database} on {host or 'this machine'}{direct}"
            # A server that does not answer is given up soon. DBOS tries twice, and every address.
            query = {"connect_timeout": "3", **url.query, "client_encoding": "utf8"}
            return url.set(drivername="postgresql+psycopg", host=host or None, query=query), label
        elif kind == "sqlite" and not url.query:
            # Relative to this file: relative to the current directory, a rerun from elsewhere would
            # find an empty database, and start over. Without links: the lock goes by the path.
            path = (PROJECT / f"{url.database}").resolve()
            if not os.path.isdir(path.parent):  # Path.is_dir() raises if it may not look
                raise ResearchError(
                    f"there is no folder {path.parent} for the database. Create or correct it."
                )
            url = URL.create("sqlite", database=str(path), query={"timeout": "30"})
            return url, f"SQLite {path.name}"
    raise ResearchError(  # without quoting the URL, which may hold a password
        f"{key} is not a usable database URL. Percent-encode special characters in it:\n"
        "postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////absolute/path.sqlite"
    )


# ---------------------------------------------------------------- the model


class GarbledAnswerError(Exception):
    """The provider's answer cannot be read, or could not be sent back to it."""


SHAPE_ERRORS = (
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What providers' clients raise for answers of another shape."""
MODEL_RETRIES = tools.retry(
    transient=(
        ai_error.ModelAPIError,  # a rate limit, an overload, a cut connection, garbage
        ai_error.UnexpectedModelBehavior,  # an answer that holds nothing usable
        dbos_error.DBOSStepTimeoutError,
        GarbledAnswerError,
    ),
    permanent=(
        ai_error.ModelRequestRejectedError,  # a bad request, a refused key, an unknown model
        ai_error.ModelQuotaExceededError,
        ai_error.ContentFilterError,
        ai_error.OutputTokenLimitExceeded,
    ),
    attempts=4,
    first_wait=1,
    backoff=2,
)


def build_model(settings: Settings, stand_in: tools.StandIn | None = None) -> Model:
    """Return the model of the settings; raise `ResearchError` if it cannot be used.

    Args:
        settings: They name the model.
        stand_in: What answers in place of a model if that is "offline".
    """
    name = settings.model
    if name == "offline":
        script = FunctionModel(stand_in or tools.offline_script, model_name=name)
        return ModelInStep(script, settings)
    try:
        return ModelInStep(infer_model(name), settings)
    except (ai_error.UserError, ImportError) as error:
        # The name is unknown, or its key or package is missing: the first line says which.
        reason = str(error).splitlines()[0]
        raise ResearchError(f"the model {name} cannot be used: {reason}") from error
    except Exception as error:
        # A certificate, a proxy or an address that the client cannot use. Its text may quote a
        # part of a password.
        known = re.compile(r"SSL_CERT_(FILE|DIR)|(HTTPS?|ALL)_PROXY|\w+_BASE_URL", re.IGNORECASE)
        found = " ".join(key for key in os.environ if known.fullmatch(key)) or "your environment"
        reason = f"{type(error).__name__}: check {found}"
        raise ResearchError(f"the model {name} cannot be used: {reason}") from error


class ModelInStep(WrapperModel):
    """What happens inside each model step, and does not happen again when a step is restored."""

    def __init__(self, wrapped: Model, settings: Settings) -> None:
        """Wrap the model.

        The limit is this process's own. `UsageLimits` that are passed to a run are stored with it,
        so a run that had reached them could not go on after they were raised.
        """
        super().__init__(wrapped)
        self.cost_limit = settings.cost_limit

    async def request(
        self, messages: list[ai.ModelMessage], *settings_and_tools: Any
    ) -> ai.ModelResponse:
        """Ask the wrapped model, unless the run has cost too much already."""
        answers = [message for message in messages if isinstance(message, ai.ModelResponse)]
        spent = sum(answer.usage.cost or 0 for answer in answers)
        if spent > self.cost_limit:
            reached = f"it has cost {spent:.4f} US$: raise COST_LIMIT_USD ({self.cost_limit})"
            raise ai_error.UsageLimitExceeded(reached)
        try:
            ai.ModelMessagesTypeAdapter.dump_json(messages, warnings="none")
        except ValueError:  # as a provider would refuse it, so a rerun drops what led to it
            told = (
                "a tool's result cannot be written as JSON: return what tools.parse() has checked"
            )
            raise ai_error.ModelRequestRejectedError(self.model_name, told) from None
        print_in_step(f"asks the model {self.model_name}{tools.attempt()}")
        try:
            response = await super().request(messages, *settings_and_tools)
            # An answer that cannot be written as JSON, or that holds another type than it should,
            # would make every later request fail. So would an empty text, with some providers.
            ai.ModelMessagesTypeAdapter.dump_json([response], warnings="error")
            if response.text and not response.text.strip() and not response.tool_calls:
                raise ValueError
        except SHAPE_ERRORS as error:
            raise GarbledAnswerError(f"{type(error).__name__} in what the provider sent") from None
        except ai_error.AgentRunError as error:
            raise self._to_store(error) from None
        with suppress(AssertionError, LookupError, ValueError):  # its price is not known
            response.usage.cost = response.usage.cost or response.cost().total_price
        for call in response.tool_calls:
            print_in_step(f"the model calls {call.tool_name}")
        return response

    def _to_store(self, error: ai_error.AgentRunError) -> ai_error.AgentRunError:
        """Return the error as DBOS may store it: with the address, and without the API key."""
        if isinstance(error, ai_error.ModelAuthenticationError):
            names = [key for key, name in MODEL_BY_KEY.items() if name.startswith(self.system)]
            told = f"the provider refused the API key: check {' '.join(names) or 'it'} in .env"
            return ai_error.ModelAuthenticationError(self.model_name, told)
        if isinstance(error, ai_error.ModelHTTPError) and error.status_code == 413:
            return ai_error.ModelContextWindowExceededError(self.model_name, "413: too much text")
        if isinstance(error, ai_error.ModelHTTPError) and error.status_code == 451:
            error = ai_error.ModelHTTPError.for_category(  # for its content: no retry helps
                ai_error.ModelRequestRejectedError,
                status_code=451,
                model_name=self.model_name,
                body=error.body,
            )
        if isinstance(error, ai_error.ModelConnectionError):
            address = urlsplit(self.base_url or "").netloc.rpartition("@")[2]
            return type(error)(self.model_name, f"{error.message} ({address})")
        key = getattr(getattr(self.provider, "client", None), "api_key", None)
        if not key or f"{key}".encode() not in pickle.dumps(error):
            return error
        if isinstance(error, ai_error.UnexpectedModelBehavior):
            return type(error)("its text quoted the API key")
        if not isinstance(error, ai_error.ModelHTTPError):
            return ai_error.ModelAPIError(self.model_name, "its text quoted the API key")
        return ai_error.ModelHTTPError.for_category(
            getattr(error, "category", None),
            status_code=error.status_code,
            model_name=self.model_name,
            body="removed, because it quoted the API key",
            retry_after=error.retry_after,
        )


# ---------------------------------------------------------------- the database

DATABASE_ERRORS = (SQLAlchemyError, dbos_error.DBOSInitializationError)


def open_database(settings: Settings) -> "tuple[DBOSClient, Locks]":
    """Connect to the database, and create what is missing; `ResearchError` if it cannot be used."""
    url = settings.database_url
    address = url.render_as_string(hide_password=False)
    # The caller decides which errors to wait out; by default, the client would wait for ever.
    options: dict[str, Any] = {"application_name": APP_NAME, "retry_connection_errors": False}
    try:
        if url.drivername == "sqlite":
            # Whoever can write to the file can run code in this app: it is its owner's alone.
            Path(f"{url.database}.locks").mkdir(mode=0o700, exist_ok=True)
            if not Path(f"{url.database}").exists():
                Path(f"{url.database}").touch(mode=0o600)
            if sqlite3.sqlite_version_info < (3, 42):
                sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _add_unixepoch)
            DBOS.migrate(address)
            locks = FileLocks(Path(f"{url.database}.locks"))
            return DBOSClient(system_database_url=address, **options), locks
        try:
            _refuse_unfit_server(url)
        except OperationalError as error:
            if not _is_missing(error):
                raise  # or tables would be created where this must not run
            DBOS.migrate(address)  # which creates a database that does not exist
            _refuse_unfit_server(url)
        DBOS.migrate(address)
        engine = sqlalchemy.create_engine(url, pool_pre_ping=True)
        return DBOSClient(system_database_engine=engine, **options), SessionLocks(engine)
    except (*DATABASE_ERRORS, OSError) as error:
        raise database_error(settings, error) from error


def database_error(settings: Settings, error: BaseException) -> ResearchError:
    """Describe a database error without the URL, which may hold a password."""
    return ResearchError(
        f"the database ({settings.database_label}) cannot be used: {reason_of(error)}\n"
        "Fix it or its URL, and run the same command again: what finished is stored."
    )


def reason_of(error: BaseException) -> str:
    """Return the database's own words in one line."""
    return textwrap.shorten(str(getattr(error, "orig", error)), 200)


def passes(error: BaseException) -> bool:
    """Tell whether a database error is one that goes away by waiting.

    Lost and refused connections do, a server that starts or stops, too many clients, and locks. A
    changed password, a missing table, a full disk and the like do not.
    """
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    if state:  # https://www.postgresql.org/docs/current/errcodes-appendix.html
        passing = ("08", "40", "53", "55P03", "57P", "25P03")
        return state != "53100" and str(state).startswith(passing)
    if isinstance(error, sqlalchemy.exc.TimeoutError):  # no connection of the pool was free
        return True
    if not isinstance(error, OperationalError):
        return False
    text = str(error.orig)
    if isinstance(error.orig, sqlite3.Error):
        return "locked" in text
    if "FATAL" in text:  # the server has answered, and refused the connection
        return bool(re.search(r"starting up|shutting down|too many|recovery|terminating", text))
    return not re.search(r"no password supplied|Too many open files|certificate", text)


def _add_unixepoch(connection: Any, _record: Any) -> None:
    # From Python 3.12 on, dbos 3.4 uses SQLite's unixepoch('subsec'), which came with SQLite 3.42.
    # Many interpreters are linked to an older one. DBOS stores whole milliseconds.
    if isinstance(connection, sqlite3.Connection):
        connection.create_function("unixepoch", 1, lambda _: round(time.time(), 3))


def _is_missing(error: OperationalError) -> bool:
    """Tell whether the server has answered that there is no such database."""
    return bool(re.search(r'FATAL: +database ".*" does not exist', str(error.orig)))


def _refuse_unfit_server(url: URL) -> None:
    # A pooler in transaction mode gives each transaction another session of the server, and a lock
    # stays with the session that took it. Then two open connections share a session, or one changes
    # its own. They ask in an irregular order: a pooler's own turns could match a regular one.
    engine = sqlalchemy.create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        poolclass=sqlalchemy.NullPool,
        connect_args={"prepare_threshold": None},  # a pooler would lose prepared statements
    )
    with engine.connect() as one, engine.connect() as other:
        ask = sqlalchemy.text("SELECT pg_backend_pid()")
        turns = [(one, other)[int(turn)] for turn in "01100100011101101001"]
        answers = {(connection, connection.scalar(ask)) for connection in turns}
        encoding = one.scalar(sqlalchemy.text("SHOW server_encoding"))
    if len(answers) > 2 or len({session for _, session in answers}) < 2:
        raise ResearchError(
            "DBOS_SYSTEM_DATABASE_URL or NEON_DATABASE_URL is the address of a pooler in"
            " transaction mode, which cannot hold a lock.\n"
            "Use the server's direct address (Neon: the host without -pooler), or session mode."
        )
    if encoding != "UTF8":
        raise ResearchError(
            f"the database {url.database} has the encoding {encoding}, which cannot hold every"
            " text.\nUse a database with the encoding UTF8: CREATE DATABASE … ENCODING 'UTF8'"
            " TEMPLATE template0."
        )


# ---------------------------------------------------------------- the locks


class Locks(Protocol):
    """Locks beside the data. A lock is free as soon as the process that holds it is dead."""

    def take(self, name: str) -> bool:
        """Take a lock; return False if another process or thread has it."""

    def free(self, name: str) -> None:
        """Let go of a lock that was taken."""

    def is_held(self, name: str) -> bool:
        """Tell whether a lock that was taken has not been lost since then."""

    def rest(self) -> None:
        """Keep no connection open while this process waits."""

    def show_that_this_process_lives(self, executor_id: str) -> dict[str, Any]:
        """Hold the lock of this name for as long as the process lives.

        Returns:
            Engine options for DBOS, which its connections need for that.
        """

    def is_dead(self, executor_id: str) -> bool:
        """Tell whether the process that executes under this ID is dead."""


def make_executor_id() -> str:
    """Return an ID for this process that no other one has, nor had: host, process number, chance.

    At launch, DBOS resumes every PENDING run with the same executor ID. The default, "local", would
    match the runs of other processes that are alive.
    """
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


def is_executor_id(name: str) -> bool:
    """Tell whether `make_executor_id()` makes such names. A process's own queue has its name."""
    return bool(re.fullmatch(r".+:\d+:[0-9a-f]{8}", name))


class FileLocks:
    """Locks for SQLite: a file each, which the system unlocks when its process dies."""

    def __init__(self, folder: Path) -> None:
        """Keep the files in that folder."""
        self.folder = folder
        self.held: dict[str, tuple[FileLock, int]] = {}
        """Name to lock and number of its file, by which a file that was deleted is known."""

    def take(self, name: str) -> bool:  # noqa: D102
        lock = self._lock(name)
        try:
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:  # for example, the file belongs to another user
            raise ResearchError(f"the lock {lock.lock_file} cannot be used: {error}") from error
        self.held[name] = lock, Path(lock.lock_file).stat().st_ino
        return True

    def free(self, name: str) -> None:  # noqa: D102
        if name in self.held:
            self.held.pop(name)[0].release()

    def is_held(self, name: str) -> bool:  # noqa: D102
        with suppress(KeyError, FileNotFoundError):
            lock, number = self.held[name]
            return Path(lock.lock_file).stat().st_ino == number
        return False

    def rest(self) -> None:  # noqa: D102
        pass

    def show_that_this_process_lives(self, executor_id: str) -> dict[str, Any]:  # noqa: D102
        if executor_id in self.held:
            return {}
        for old in self.folder.iterdir():  # remove the files of processes that have died
            with suppress(Timeout, OSError), FileLock(old, blocking=False):
                old.unlink()
        while not self.take(executor_id):  # another process that starts may be looking at the file
            time.sleep(0.01)
        return {}

    def is_dead(self, executor_id: str) -> bool:  # noqa: D102
        if not Path(self._lock(executor_id).lock_file).exists():
            return True
        if executor_id in self.held or not self.take(executor_id):
            return False
        self.free(executor_id)
        return True

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / f"{_lock_key(name)}", blocking=False, thread_local=False)


class SessionLocks:
    """Locks for Postgres: each belongs to a session, and the server frees it when that ends."""

    # The server must not end a session for being idle. And it must notice within half a minute, not
    # two hours, that a client's machine has lost its power or its network.
    SESSION = """SET idle_session_timeout = 0; SET tcp_keepalives_idle = 15;
    SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"""
    PATIENCE = 5
    """Seconds for which the lock of a process on another machine must be free: a cut of all its
    connections frees it for a moment, until DBOS has connected again."""

    def __init__(self, engine: sqlalchemy.Engine) -> None:
        """Use one session of this engine for all locks that this process takes."""
        self.engine = engine
        self.session: sqlalchemy.Connection | None = None
        self.held: set[str] = set()  # a session could take the same lock twice
        self.lost: set[str] = set()  # held, by a session that is no more
        self.guard = threading.RLock()  # one session serves all threads
        self.found_free: dict[str, float] = {}

    def take(self, name: str) -> bool:  # noqa: D102
        with self.guard:
            if name in self.held:
                return False
            if self._ask(f"SELECT pg_try_advisory_lock({_lock_key(name)})"):
                self.held.add(name)
                self.lost.discard(name)
                return True
            return False

    def free(self, name: str) -> None:  # noqa: D102
        with self.guard:
            self.held.discard(name)
            with suppress(SQLAlchemyError):  # a session that is lost has freed its locks
                self._ask(f"SELECT pg_advisory_unlock({_lock_key(name)})")

    def is_held(self, name: str) -> bool:  # noqa: D102
        with self.guard:
            self._ask("SELECT 1")
            return name in self.held and name not in self.lost

    def rest(self) -> None:  # noqa: D102
        with self.guard:
            if not self.held:
                self._drop_session()
                self.engine.dispose()

    def show_that_this_process_lives(self, executor_id: str) -> dict[str, Any]:  # noqa: D102
        def share(session: Any, _record: object) -> None:
            session.execute(self.SESSION)
            session.execute(f"SELECT pg_advisory_lock_shared({_lock_key(executor_id)})")
            session.commit()

        # Each of DBOS's connections shares the lock before it takes a run. So the lock is held
        # again as soon as DBOS has connected again, after a restart of the server or a cut network.
        return {"pool_events": [(share, "connect")]}

    def is_dead(self, executor_id: str) -> bool:  # noqa: D102
        with self.guard:  # a lock of a transaction is free again at its end
            free = self._ask(f"SELECT pg_try_advisory_xact_lock({_lock_key(executor_id)})")
        if not free:
            self.found_free.pop(executor_id, None)
            return False
        since = self.found_free.setdefault(executor_id, time.monotonic())
        return _has_ended(executor_id) or time.monotonic() - since >= self.PATIENCE

    def _ask(self, query: str) -> Any:
        try:
            if self.session is None:
                session = self.engine.connect()
                self.session = session.execution_options(isolation_level="AUTOCOMMIT")
                self.session.exec_driver_sql(self.SESSION)
            return self.session.exec_driver_sql(query).scalar()
        except SQLAlchemyError:
            self._drop_session()
            raise

    def _drop_session(self) -> None:
        self.lost |= self.held
        if self.session is not None:
            with suppress(SQLAlchemyError):
                self.session.invalidate()  # closed, not given back to the pool with its locks
                self.session.close()
            self.session = None


def _has_ended(executor_id: str) -> bool:
    """Tell whether a process of this machine does not exist any more."""
    host, _, rest = executor_id.partition(":")
    process = rest.partition(":")[0]
    if host != socket.gethostname() or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _lock_key(name: str) -> int:
    return int(hashlib.sha256(f"{APP_NAME}:{name}".encode()).hexdigest()[:15], 16)
