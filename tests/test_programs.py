"""Programs around the executor: event loops, other uses of DBOS, and processes that fork."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from conftest import App, settings_for
from test_research import run

from agent import DEFINITION, make_executor
from durable import DurableError
from durable.forks import keep_from_children

REFUSED = """
from durable import DurableError
def refused(function, *arguments):
    try:
        function(*arguments)
    except DurableError as error:
        print("REFUSED", error.exit_code, error, flush=True)
"""


def refusal(app: App, program: str) -> str:
    """Run a program that must be refused once; return the refusal, which is two lines."""
    printed = run(app, REFUSED + program).splitlines()
    [number] = [number for number, line in enumerate(printed) if line.startswith("REFUSED")]
    assert printed[number].startswith("REFUSED 2 ")
    return " ".join(printed[number : number + 2])


# ---------------------------------------------------------------- one executor


def test_a_second_executor_is_refused_when_it_is_made_also_after_the_first_was_closed(
    sqlite_app: App,
) -> None:
    program = """
with make_executor() as executor:
    research(executor, ask("Acme"))
refused(make_executor)
print(research(executor, ask("Globex")).report.company_name)
"""
    assert "Share the first one" in refusal(sqlite_app, program)
    assert sqlite_app.statuses() == {"SUCCESS": 2}, "the first one serves on"


def test_of_many_threads_that_make_an_executor_one_gets_it(sqlite_app: App) -> None:
    program = """
from durable import DurableError
barrier, made = threading.Barrier(8), []
def make():
    barrier.wait()
    try:
        made.append(make_executor())
    except DurableError:
        pass
threads = [threading.Thread(target=make) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(made))
"""
    assert run(sqlite_app, program) == "1\n"


def test_a_program_may_try_again_after_its_database_could_not_be_opened(sqlite_app: App) -> None:
    (sqlite_app.folder / "research.sqlite").write_text("no database at all, but long enough for it")
    settings = settings_for(sqlite_app.database_url)
    with pytest.raises(DurableError, match="cannot be used"):
        make_executor(settings, DEFINITION)
    (sqlite_app.folder / "research.sqlite").unlink()
    make_executor(settings, DEFINITION).client.destroy()


# ---------------------------------------------------------------- an event loop, another DBOS


@pytest.mark.parametrize("earlier", ["", "research(executor, ask('Globex'))"])
def test_in_an_event_loop_a_call_is_refused_before_the_run_is_stored_and_the_cure_works(
    sqlite_app: App, earlier: str
) -> None:
    program = f"""
import asyncio
executor = make_executor()
{earlier}
async def main():
    refused(research, executor, ask("Acme"))
    assert executor.find_run(ask("Acme").run_id) is None
    await asyncio.to_thread(research, executor, ask("Acme"))
asyncio.run(main())
"""
    cure = "await asyncio.to_thread(research, executor, question)"
    assert cure in refusal(sqlite_app, program)
    assert set(sqlite_app.statuses()) == {"SUCCESS"}


def test_a_worker_is_not_launched_in_an_event_loop(sqlite_app: App) -> None:
    program = """
import asyncio
from recipes import worker
executor = worker.make_shared_executor(settings)
async def main():
    refused(worker.Worker, executor)
    serving = await asyncio.to_thread(worker.Worker, executor)
    serving.stop()
asyncio.run(main())
"""
    assert "an event loop runs in this thread" in refusal(sqlite_app, program)


@pytest.mark.parametrize("launch", ["", "DBOS.launch()"], ids=["made", "launched"])
@pytest.mark.parametrize("first", [True, False], ids=["before the executor", "after the executor"])
def test_a_program_with_a_dbos_of_its_own_is_refused_before_a_run_is_stored(
    sqlite_app: App, launch: str, first: bool
) -> None:
    own = f"""
from dbos import DBOS
DBOS(config={{"name": "host", "system_database_url": "sqlite:///{sqlite_app.folder}/host.sqlite"}})
{launch}
"""
    make = "executor = make_executor()\n"
    program = """
refused(research, executor, ask("Acme"))
assert executor.find_run(ask("Acme").run_id) is None
assert executor.client.list_queues() == []
DBOS.destroy()
research(executor, ask("Acme"))
"""
    order = own + make if first else make + own
    assert "a process can have only one" in refusal(sqlite_app, order + program)
    assert sqlite_app.statuses() == {"SUCCESS": 1}


# ---------------------------------------------------------------- forks

FORK = """
def in_child(function, *arguments):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child
def wait_for(child):
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("launched", [False, True], ids=["before the launch", "after the launch"])
def test_an_executor_that_was_made_before_a_fork_is_refused_in_the_child_and_serves_the_parent(
    app: App, launched: bool
) -> None:
    program = f"""
executor = make_executor()
if {launched}:
    research(executor, ask("Globex"))
wait_for(in_child(refused, research, executor, ask("Acme")))
print(executor.find_run(ask("Acme").run_id))
print(research(executor, ask("Acme")).report.company_name)
"""
    assert "Make the executor after the fork" in refusal(app, FORK + program)
    assert app.statuses() == {"SUCCESS": 1 + launched}
    assert app.repeated() == []


@pytest.mark.parametrize("what", ["executor.launch", "executor.find_run, 'ID'"])
def test_whatever_a_forked_child_asks_its_parents_executor_is_refused(app: App, what: str) -> None:
    program = f"executor = make_executor()\nwait_for(in_child(refused, {what}))\n"
    assert "made before a fork" in refusal(app, FORK + program)


def test_children_that_make_their_own_executors_share_the_work(app: App) -> None:
    program = """
def report(name):
    print(research(make_executor(), ask(name)).report.company_name)
parents = make_executor()
children = [in_child(report, name) for name in ["Acme", "Globex", "Acme"]]
[wait_for(child) for child in children]
print(research(parents, ask("Acme")).report.company_name)
"""
    run(app, FORK + program)
    assert app.statuses() == {"SUCCESS": 2}
    assert len(app.ledger("effect")) == 8


def test_a_child_that_leaves_the_with_block_leaves_the_queue_to_its_parent(app: App) -> None:
    program = """
with make_executor() as executor:
    research(executor, ask("Acme"))
    child = os.fork()
    if child:
        wait_for(child)
        print([queue.name == executor.id for queue in executor.client.list_queues()])
if not child:
    sys.stdout.flush()
    os._exit(0)
"""
    assert run(app, FORK + program).splitlines()[-1] == "[True]"


@contextmanager
def killed_later(app: App) -> Iterator[int]:
    """Wait for the child that a tool has forked, yield its number, and kill it at the end."""
    app.until("lives on")
    lines = (app.folder / "ledger").read_text().splitlines()
    [child] = [int(line.split()[0]) for line in lines if line.endswith("lives on")]
    try:
        yield child
        os.kill(child, 0)  # it has lived all the time
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kind", ["a process", "a pool"])
def test_a_run_is_resumed_though_a_child_that_its_tool_has_forked_outlives_the_kill(
    app: App, kind: str
) -> None:
    first = app.start("Acme", FORK=kind, WAIT_AT="after effect 3")
    with killed_later(app):
        app.until("waiting after effect 3")
        first.signal(signal.SIGKILL)
        first.wait()
        again = app.run("Acme")
        assert again.wait() == 0, again.stderr
        assert "executes nothing" not in again.stdout
        assert "resumes after 2 finished steps" in " ".join(again.stdout.split())
    assert app.repeated() == []


@pytest.mark.parametrize("kind", ["a process", "a pool"])
def test_a_run_whose_tool_forks_a_child_keeps_its_locks_and_finishes(app: App, kind: str) -> None:
    first = app.start("Acme", FORK=kind, WAIT_AT="after effect 3")
    with killed_later(app) as child:
        app.until("waiting after effect 3")
        second = app.start("Acme").until_prints("executes nothing")
        app.open_gate()
        assert second.wait() == 0, second.stderr
        assert len(app.ledger("effect")) == 4
        os.kill(child, 0)
        with suppress(ProcessLookupError):  # it waits for its child for some seconds
            first.signal(signal.SIGKILL)


def test_a_forked_child_keeps_the_numbers_of_the_descriptors_that_it_has_closed(
    postgres: str,
) -> None:
    """Libpq takes the number for its socket, so the child must open no other file under it."""
    with psycopg.connect(postgres, autocommit=True) as session:
        keep_from_children(session)
        lost = psycopg.connect(postgres)
        keep_from_children(lost)
        number = lost.fileno()
        lost.close()
        with socket.create_server(("127.0.0.1", 0)) as other:  # gets the number that is free again
            assert other.fileno() == number
            child = os.fork()
            if child == 0:
                is_closed = os.path.samestat(os.fstat(session.fileno()), os.stat(os.devnull))
                os._exit(0 if is_closed and other.getsockname()[1] else 1)
            assert os.waitpid(child, 0)[1] == 0
        assert session.execute("SELECT 1").fetchone() == (1,), "the server was told nothing"


def test_no_lock_file_is_open_in_a_forked_child(sqlite_app: App) -> None:
    """Filelock closes them, on which `durable/forks.py` relies."""
    client, locks = settings_for(sqlite_app.database_url).database.open()
    assert locks.take("name")
    [file] = Path(f"{sqlite_app.folder}/research.sqlite.locks").iterdir()
    inode = file.stat().st_ino
    child = os.fork()
    if child == 0:
        opened = [int(name) for name in os.listdir("/dev/fd")]
        numbers = []
        for descriptor in opened:
            try:
                numbers.append(os.fstat(descriptor).st_ino)
            except OSError:
                continue
        os._exit(inode in numbers)
    assert os.waitpid(child, 0)[1] == 0
    locks.free("name")
    client.destroy()
