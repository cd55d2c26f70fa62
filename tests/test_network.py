"""What stands between the app and its Postgres: a pooler, or a network that falls silent."""

import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import App, Process, start_postgres, wait_for
from relay import AnyQueue, Pooler, Relay
from sqlalchemy import make_url
from test_adversity import pg_ctl, refused, start_on_tcp
from test_crash_matrix import report_of

import config
import tools
from recipes import worker

LOCKS = {"patience": 1, "look": 0.1}
"""Take over from a process of this machine that exists, but whose lock is free, after a second."""


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL on a TCP port."""
    server = start_postgres(tmp_path_factory)
    server.stop()
    yield start_on_tcp(server)
    with contextlib.suppress(subprocess.CalledProcessError):  # it is down already
        pg_ctl(server, "stop", "-m", "immediate")


@pytest.fixture
def app(tcp_server: str, tmp_path: Path) -> Iterator[App]:
    """The app, directly on that server, on a database of its own without tables."""
    url = make_url(tcp_server).set(database=f"network_{abs(hash(tmp_path))}")
    with psycopg.connect(tcp_server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{url.database}" TEMPLATE migrated'.encode())
    app = App(tmp_path, url.render_as_string(hide_password=False))
    yield app
    app.close()


def settings_for(url: str) -> config.Settings:
    return config.Settings(
        model="offline",
        database_url=make_url(url).set(drivername="postgresql+psycopg"),
        database_label="Postgres",
        tenant_id="local",
        user_id="local",
        cost_limit=1,
        service=tools.SimulatedService(),
    )


# ---------------------------------------------------------------- a pooler in transaction mode


def everything(app: App) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of all tables."""
    tables = app.rows("SELECT table_name FROM information_schema.tables WHERE table_schema='dbos'")
    return {name: app.rows(f"SELECT * FROM dbos.{name}") for (name,) in tables}


def assert_refused(app: App, url: str) -> None:
    """Assert that no command works by way of this URL, and that none changes anything."""
    before = everything(app)
    for process in [
        app.start("Acme", DBOS_SYSTEM_DATABASE_URL=url),
        app.start("Acme", "Globex", recipe="many", DBOS_SYSTEM_DATABASE_URL=url),
        app.start(recipe="worker", DBOS_SYSTEM_DATABASE_URL=url),
    ]:
        assert process.wait() == 2, process.stdout
        problem, cure = process.stderr.splitlines()
        assert "transaction mode" in problem
        assert "direct address" in cure
        assert "session mode" in cure
        assert process.stdout == ""
    assert app.ledger() == [], "nothing was even tried"
    assert everything(app) == before


def test_no_command_works_behind_a_pooler_in_transaction_mode(app: App) -> None:
    """A lock that is taken there stays with the pooler when its process dies."""
    app.run("Initech")
    (app.folder / "ledger").unlink()
    with Pooler(app.database_url, 20, queue.LifoQueue).serve() as pooler:
        assert_refused(app, pooler.url)


def test_a_database_without_tables_gets_none_by_way_of_such_a_pooler(app: App) -> None:
    app.rows("DROP SCHEMA dbos CASCADE")
    with Pooler(app.database_url, 20, queue.LifoQueue).serve() as pooler:
        assert_refused(app, pooler.url)
    assert everything(app) == {}


class Shaky(Pooler):
    """A pooler that hangs up on its first client."""

    def handle(self, client: socket.socket) -> None:
        if len(self.clients) > 1:
            super().handle(client)


def test_a_lost_connection_does_not_create_tables_by_way_of_such_a_pooler(app: App) -> None:
    app.rows("DROP SCHEMA dbos CASCADE")
    with Shaky(app.database_url, 20, queue.LifoQueue).serve() as pooler:
        told = refused(app, "Acme", DBOS_SYSTEM_DATABASE_URL=pooler.url)
        assert "cannot be used" in told
        assert_refused(app, pooler.url)
    assert everything(app) == {}


def test_a_missing_database_is_not_used_by_way_of_such_a_pooler_either(app: App) -> None:
    missing = make_url(app.database_url).set(database=f"missing_{os.getpid()}")
    app.database_url = missing.render_as_string(hide_password=False)
    with Pooler(app.database_url, 20, queue.LifoQueue).serve() as pooler:
        run = app.run("Acme", DBOS_SYSTEM_DATABASE_URL=pooler.url)
    assert run.wait() == 2, run.stdout
    assert "transaction mode" in run.stderr
    assert app.ledger() == []


@contextlib.contextmanager
def other_clients(url: str, count: int) -> Iterator[None]:
    """Keep so many clients busy behind the pooler."""
    stop = threading.Event()

    def work() -> None:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
            while not stop.is_set():
                connection.execute("SELECT pg_sleep(random() * 0.002)")

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("busy", [0, 3], ids=["alone", "with other clients"])
@pytest.mark.parametrize("idle", [queue.LifoQueue, queue.Queue, AnyQueue])
@pytest.mark.parametrize("size", [1, 2, 20])
def test_such_a_pooler_is_always_recognized(
    app: App, size: int, idle: type[queue.Queue[Any]], busy: int
) -> None:
    with Pooler(app.database_url, size, idle).serve() as pooler, other_clients(pooler.url, busy):
        for _ in range(20):
            with pytest.raises(tools.ResearchError, match="transaction mode"):
                config.open_database(settings_for(pooler.url))


@contextlib.contextmanager
def pgbouncer(url: str, mode: str) -> Iterator[str]:
    """Start a real PgBouncer in front of the server, and return the URL by way of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="pgbouncer-"))  # not in pytest's, which only root enters
    folder.chmod(0o755)
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={make_url(url).port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {folder}/users\npool_mode = {mode}\n"
    )
    command = ["pgbouncer", str(folder / "pgbouncer.ini")]
    command += ["-u", "nobody"] if os.getuid() == 0 else []  # it refuses to be root
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        own_url = make_url(url).set(port=port).render_as_string(hide_password=False)
        wait_for(lambda: answers(own_url), "an answer of PgBouncer")
        try:
            yield own_url
        finally:
            process.kill()
    shutil.rmtree(folder)


def answers(url: str) -> bool:
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
        return True
    return False


needs_pgbouncer = pytest.mark.skipif(not shutil.which("pgbouncer"), reason="PgBouncer is not here")


@needs_pgbouncer
def test_no_command_works_behind_a_pgbouncer_in_transaction_mode(app: App) -> None:
    with pgbouncer(app.database_url, "transaction") as url:
        assert_refused(app, url)


@needs_pgbouncer
def test_everything_works_behind_a_pgbouncer_in_session_mode(app: App) -> None:
    with pgbouncer(app.database_url, "session") as url:
        app.environment["DBOS_SYSTEM_DATABASE_URL"] = url
        first = app.start("Acme", patches=LOCKS, WAIT_AT="after effect 3")
        app.until("waiting after effect 3")
        second = app.start("Acme", patches=LOCKS).until_prints("executes nothing")
        first.signal(signal.SIGKILL)  # its lock is free when the pooler sees that it is gone
        assert second.wait() == 0, second.stderr
        assert "resumes after 2 finished steps" in " ".join(second.stdout.split())
        assert app.repeated() == []
        assert "finished earlier" in app.run("Acme").stdout
        batch = app.run("Acme", "Globex", "Initech", recipe="many")
        assert batch.wait() == 0, batch.stderr
        assert app.statuses() == {"SUCCESS": 3}


# ---------------------------------------------------------------- a network that falls silent


@pytest.fixture
def relay(app: App) -> Iterator[Relay]:
    with Relay(app.database_url).serve() as relay:
        yield relay


def start_behind(relay: Relay, app: App, *arguments: str, recipe: str = "") -> Process:
    """Start the command behind the relay. It waits when step 3 has had its effect."""
    environment = {"DBOS_SYSTEM_DATABASE_URL": relay.url, "WAIT_AT": "after effect 3"}
    return app.start(*arguments, recipe=recipe, patches=LOCKS, **environment)


def test_a_process_that_the_server_believes_dead_comes_back_and_gets_the_report_of_another(
    app: App, relay: Relay
) -> None:
    first = start_behind(relay, app, "Acme")
    app.until("waiting after effect 3")
    relay.fall_silent()
    second = app.start("Acme", patches=LOCKS).until_prints("executes nothing")
    assert len(app.ledger("effect")) == 3
    relay.cut()
    assert second.wait() == 0, second.stderr
    assert "resumes after 2 finished steps" in " ".join(second.stdout.split())
    before = everything(app)
    app.open_gate()
    app.until("try commit 3", times=2)
    relay.come_back()
    assert first.wait() == 0, first.stdout + first.stderr
    assert first.stderr == ""
    assert report_of(first) == report_of(second)
    assert everything(app)["operation_outputs"] == before["operation_outputs"]
    assert app.repeated() == []
    effects = [line.split(":")[-1] for line in app.ledger("effect")]
    assert effects == ["1", "2", "3", "3", "4"], "only the step in flight ran twice"


def test_nothing_is_lost_when_the_network_is_silent_for_a_moment(app: App, relay: Relay) -> None:
    first = start_behind(relay, app, "Acme")
    app.until("waiting after effect 3")
    relay.fall_silent()
    second = app.start("Acme", patches=LOCKS).until_prints("executes nothing")
    app.open_gate()
    app.until("try commit 3")
    relay.come_back()
    assert [first.wait(), second.wait()] == [0, 0], first.stderr + second.stderr
    assert report_of(first) == report_of(second)
    assert ": asks the model" not in second.stdout, "it waited all the time"
    assert len(app.ledger("effect")) == 4


def enqueue(app: App, *companies: str) -> None:
    """Leave runs in the queue for the worker, by a process that executes none."""
    executor = worker.make_executor(settings_for(app.database_url))
    for company in companies:
        executor.request(company).enqueue(executor.client, executor.queue)
    executor.client.destroy()
    executor.locks.rest()  # which closes the connections


def test_a_worker_goes_on_after_a_silence_and_after_it_was_believed_dead(
    app: App, relay: Relay
) -> None:
    first = start_behind(relay, app, recipe="worker").until_prints("serves the queue")
    enqueue(app, "Acme", "Globex")
    app.until("waiting after effect 3")
    relay.fall_silent()
    app.open_gate()
    app.until("try commit 3")
    relay.come_back()
    wait_for(lambda: app.statuses() == {"SUCCESS": 2}, "the end of the first two")
    assert len(app.ledger("effect")) == 8

    (app.folder / "ledger.gate").unlink()
    enqueue(app, "Initech", "Umbrella")
    app.until_effects(8 + 6)
    relay.fall_silent()
    relay.cut()
    other = app.start(recipe="worker", patches=LOCKS)
    wait_for(lambda: app.statuses() == {"SUCCESS": 4}, "the end of the next two")
    other.signal(signal.SIGKILL)
    other.wait()
    app.open_gate()
    relay.come_back()

    enqueue(app, "Hooli", "Wonka")
    wait_for(lambda: app.statuses() == {"SUCCESS": 6}, "the end of the last two")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.stderr
    assert first.stderr == ""
    assert app.repeated() == []
    assert len(app.ledger("effect")) == 8 + 10 + 8, "only the two steps in flight ran twice"


def test_a_worker_that_is_asked_to_stop_ends_in_time_though_the_network_is_silent(
    app: App, relay: Relay
) -> None:
    patches = {**LOCKS, "grace": 1}
    server = app.start(recipe="worker", patches=patches, DBOS_SYSTEM_DATABASE_URL=relay.url)
    app.until("done look")
    relay.fall_silent()
    wait_for(lambda: len(app.ledger("try look")) > len(app.ledger("done look")), "a look")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0, server.stderr
    assert server.stderr == ""
