"""`research()` as a program calls it: repeatedly, from several threads, and after failures."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import PROJECT, App, wait_for

HEAD = """
import sys, threading, os
import child, config, tools
from agent import Executor, RunFailed, research
vars(config)["SimulatedService"] = child.LedgerService
child.listen_to_model()
child.listen_to_database()
"""


def start(app: App, program: str, **environment: str) -> subprocess.Popen[str]:
    """Start a program that imports the app."""
    settings = {
        "HOME": str(app.folder),
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
        "LEDGER": str(app.folder / "ledger"),
        "DBOS_SYSTEM_DATABASE_URL": app.database_url,
        "DEMO_BILL": str(app.folder / "service.log"),
        "DEMO_FAILURE_RATE": "0",
        "DEMO_LATENCY": "0",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(program)],
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(app: App, program: str, **environment: str) -> str:
    """Run a program to its end; return what it printed."""
    with start(app, program, **environment) as process:
        stdout, stderr = process.communicate()
    assert process.returncode == 0, stdout + stderr
    return stdout


def test_five_lines_bring_a_run_to_its_end_and_get_its_report(app: App) -> None:
    program = """
    executor = Executor(config.load_settings())
    finished = research(executor, executor.request("Acme"))
    print(finished.report.company_name, len(finished.restored), finished.run.status)
    """
    assert run(app, program).splitlines()[-1] == "Acme 0 SUCCESS"
    assert run(app, program).splitlines()[-1] == "Acme 4 SUCCESS"
    assert len(app.ledger("effect")) == 4


def test_a_program_tells_nothing_if_it_says_so(app: App) -> None:
    program = """
    tools.output.show = "nothing"
    executor = Executor(config.load_settings())
    research(executor, executor.request("Acme"))
    """
    assert run(app, program) == ""


def test_many_threads_that_ask_for_two_runs_at_once_execute_each_step_once(app: App) -> None:
    """Two first calls at once build the agent once, launch once, and wait for each other."""
    program = """
    executor = Executor(config.load_settings())
    reports = []
    def ask(name):
        reports.append(research(executor, executor.request(name)).report.company_name)
    threads = [threading.Thread(target=ask, args=(n,)) for n in ["Acme", "Globex"] * 4]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(sorted(reports))
    """
    assert run(app, program).splitlines()[-1] == str(["Acme"] * 4 + ["Globex"] * 4)
    assert len(app.ledger("effect")) == 8
    assert len(app.ledger("effect overview")) == 2


def test_a_program_that_lives_on_after_a_failure_leaves_the_run_to_the_command(app: App) -> None:
    program = """
    executor = Executor(config.load_settings())
    try:
        research(executor, executor.request("Acme"))
    except RunFailed as error:
        print("FAILED", str(error).splitlines()[0], flush=True)
    sys.stdin.read()
    """
    with start(app, program, OUTAGE="1") as process:
        assert process.stdout is not None
        next(
            line for line in process.stdout if line.startswith("FAILED the run failed: Permission")
        )
        done = app.run("Acme")
        assert done.wait() == 0, done.stderr
        assert process.poll() is None
        process.communicate("")
    assert process.returncode == 0
    assert len(app.ledger("effect overview")) == 1
    assert app.repeated() == []


def test_the_same_program_resumes_a_run_that_has_failed_in_it(app: App) -> None:
    program = """
    executor = Executor(config.load_settings())
    try:
        research(executor, executor.request("Acme"))
    except RunFailed:
        del os.environ["OUTAGE"]
    finished = research(executor, executor.request("Acme"))
    print([step["function_id"] for step in finished.restored])
    """
    assert run(app, program, OUTAGE="1").splitlines()[-1] == "[1, 2]"
    assert app.repeated() == []


def test_a_launch_that_failed_is_tried_again_and_the_run_is_prepared_once(app: App) -> None:
    program = """
    from dbos import DBOS
    from sqlalchemy.exc import OperationalError
    launch, tries = DBOS._launch, []
    def fail_twice(self):
        tries.append(1)
        if len(tries) < 3:
            self._launched = True  # as the real one leaves it
            raise OperationalError("SELECT 1", {}, Exception("the server is starting up"))
        return launch(self)
    DBOS._launch = fail_twice
    tools.output.show = "one run"
    executor = Executor(config.load_settings())
    print(research(executor, executor.request("Acme")).report.company_name, len(tries))
    """
    printed = run(app, program)
    assert printed.splitlines()[-1] == "Acme 3"
    assert printed.count("Process ") == 1, "what was found is told once"
    assert printed.count("the database does not answer, so this waits") == 1
    assert len(app.ledger("effect")) == 4


def test_a_queue_that_somebody_has_deleted_is_registered_again(app: App) -> None:
    program = """
    executor = Executor(config.load_settings())
    research(executor, executor.request("Acme"))
    executor.client.delete_queue(executor.queue)
    print(research(executor, executor.request("Globex")).report.company_name)
    """
    assert run(app, program).splitlines()[-1] == "Globex"


@pytest.mark.parametrize("count", [40])
def test_a_program_with_many_threads_needs_only_one_session_for_its_locks(
    app: App, count: int
) -> None:
    if app.database_url.startswith("sqlite"):
        count = 10
    program = f"""
    executor = Executor(config.load_settings())
    gate = threading.Barrier({count})
    done = []
    def ask(number):
        gate.wait()
        done.append(research(executor, executor.request(f"Company {{number}}")))
    threads = [threading.Thread(target=ask, args=(n,)) for n in range({count})]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(len(done))
    """
    assert run(app, program).splitlines()[-1] == str(count)
    assert len(app.ledger("effect")) == 4 * count
    assert app.repeated() == []


def test_importing_the_app_does_nothing(tmp_path: Path) -> None:
    program = (
        "import agent, config, tools, recipes.many, recipes.worker, os; print(os.listdir('.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "DBOS_SYSTEM_DATABASE_URL": "nonsense"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_waiting_command_goes_on_as_soon_as_a_program_has_failed(app: App) -> None:
    program = """
    executor = Executor(config.load_settings())
    try:
        research(executor, executor.request("Acme"))
    except RunFailed:
        print("FAILED", flush=True)
    sys.stdin.read()
    """
    with start(app, program, WAIT_AT="inside 3", OUTAGE="1") as process:
        app.until("waiting inside 3")
        waiting = app.start("Acme").until_prints("executes nothing")
        app.open_gate()
        assert waiting.wait() == 0, waiting.stderr
        assert "resumes at step 3" in " ".join(waiting.stdout.split())
        wait_for(lambda: process.poll() is None, "the program to live on")
        process.communicate("")
    assert app.repeated() == []
