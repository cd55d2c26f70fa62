"""What the command says, and how it ends, when something is wrong."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, App


def one_error(app: App, *arguments: str, **environment: str) -> str:
    """Run the command; return its error, which is one or two lines and exit code 2."""
    process = app.run(*arguments, **environment)
    assert process.wait() == 2, process.stdout + process.stderr
    assert process.stderr.startswith("error: ")
    assert 1 <= len(process.stderr.splitlines()) <= 2, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([""], "the company's name has 0 characters"),
        (["x" * 101], "the company's name has 101 characters"),
        (["bell\a"], "contains the control character U+0007"),
        (["Acme", "--run-id", ""], "the run ID has 0 characters"),
        (["Acme", "--run-id", "x" * 101], "the run ID has 101 characters"),
        (["Acme", "--bucket", "x" * 101], "the bucket has 101 characters"),
    ],
)
def test_an_unfit_argument_is_an_error(sqlite_app: App, arguments: list[str], told: str) -> None:
    assert told in one_error(sqlite_app, *arguments)
    assert not (sqlite_app.folder / "research.sqlite").exists()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("openai-chat:gpt-6-luna", "OPENAI_API_KEY"),
        ("openrouter:openai/gpt-5.4-mini", "OPENROUTER_API_KEY"),
        ("anthropic:claude-haiku-5-5", "ANTHROPIC_API_KEY"),
        ("groq:llama-4", "groq"),
        ("nobody:any", "nobody"),
        ("gpt", "gpt"),
    ],
)
def test_a_model_that_cannot_be_used_is_an_error(sqlite_app: App, model: str, told: str) -> None:
    message = one_error(sqlite_app, "Acme", MODEL=model)
    assert message.startswith(f"error: the model {model} cannot be used: ")
    assert told in message


def test_a_refused_connection_is_an_error_without_the_password(sqlite_app: App) -> None:
    url = "postgresql://me:secret@127.0.0.1:1/research"
    message = one_error(sqlite_app, "Acme", DBOS_SYSTEM_DATABASE_URL=url)
    assert "the database (Postgres research on 127.0.0.1) cannot be used" in message
    assert "refused" in message
    assert "secret" not in message


def test_a_database_that_never_answers_is_an_error_in_time(sqlite_app: App) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me:secret@127.0.0.1:{silent.getsockname()[1]}/research"
        url += "?connect_timeout=2"
        message = one_error(sqlite_app, "Acme", DBOS_SYSTEM_DATABASE_URL=url)
    assert "timeout" in message


def test_a_refused_password_is_an_error_that_does_not_tell_it(
    sqlite_app: App, postgres: str
) -> None:
    url = postgres.replace("postgres:", "nobody:secret", 1)
    message = one_error(sqlite_app, "Acme", DBOS_SYSTEM_DATABASE_URL=url)
    assert "secret" not in message


def test_a_file_that_is_no_database_is_an_error_and_is_left_alone(sqlite_app: App) -> None:
    path = sqlite_app.folder / "research.sqlite"
    path.write_text("my only novel, " * 1000)
    before = path.read_bytes()
    assert "not a database" in one_error(sqlite_app, "Acme")
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_is_an_error(sqlite_app: App) -> None:
    (sqlite_app.folder / "research.sqlite").mkdir()
    assert "unable to open database file" in one_error(sqlite_app, "Acme")


def test_neons_pooled_host_is_warned_of_in_one_line(sqlite_app: App) -> None:
    url = "postgresql://me:secret@ep-x-pooler.eu.neon.tech:1/db?hostaddr=127.0.0.1"
    process = sqlite_app.run("Acme", DBOS_SYSTEM_DATABASE_URL=url)
    assert process.wait() == 2
    assert process.stderr.splitlines()[0] == (
        "warning: DBOS needs Neon's direct host, ep-x.eu.neon.tech"
    )
    assert "secret" not in process.stderr


def test_verbose_shows_the_log_and_tracebacks_and_otherwise_there_is_neither(
    sqlite_app: App,
) -> None:
    quiet = sqlite_app.run("Acme", DEMO_FAILURE_RATE="1")
    assert len(quiet.stderr.splitlines()) == 2
    loud = sqlite_app.run("Acme", "--verbose", DEMO_FAILURE_RATE="1")
    assert loud.wait() == 1
    assert "DBOS launched!" in loud.stderr
    assert "Traceback" in loud.stderr


def test_a_quiet_success_writes_nothing_to_stderr_and_fits_80_columns(app: App) -> None:
    run = app.run("A company with quite a long name, which is here to fill the line, Incorporated")
    assert run.stderr == ""
    assert max(len(line) for line in run.stdout.splitlines()) <= 80
    assert "\x1b" not in run.stdout


def test_the_data_say_that_they_are_invented_and_the_model_that_it_is_none(sqlite_app: App) -> None:
    run = sqlite_app.run("Acme")
    text = re.sub(r"\s+", " ", run.stdout)
    assert "Invented for this tutorial: not facts about a real company." in text
    assert "A script stands in for the model. To use a real one, see .env.example." in text


def test_the_real_command_runs_from_any_directory_and_loads_no_providers_client(
    tmp_path: Path,
) -> None:
    for name in ("agent.py", "tools.py", "config.py"):
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    code = (
        "import gc, runpy, sys; sys.argv = ['agent.py']\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "try: runpy.run_path(sys.path[0] + '/agent.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert gc.isenabled()  # it is off only while importing\n"
        "print('LOADED', {'openai', 'anthropic'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd="/",
        env={"DEMO_LATENCY": "0", "DEMO_FAILURE_RATE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Quantum Compute Corp" in run.stdout
    assert "Saved by checkpoints: nothing, every step ran\n" in run.stdout
    assert run.stdout.splitlines()[-1] == "LOADED set()"
    assert (tmp_path / "research.sqlite").exists()


@pytest.mark.parametrize("moment", ["import", "imported"])
def test_ctrl_c_in_the_first_seconds_ends_in_one_line(tmp_path: Path, moment: str) -> None:
    """At the first import of agent.py, and at the last."""
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, os, signal\n"
        "real = builtins.__import__\n"
        "def watched(name, *rest):\n"
        f"    if name == {'argparse' if moment == 'import' else 'tools'!r}:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = watched\n"
    )
    run = subprocess.run(
        [sys.executable, PROJECT / "agent.py"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 130
    assert run.stderr == "\nInterrupted: what finished is stored. Run the same command to resume.\n"
    assert run.stdout == ""


def test_a_terminal_that_cannot_show_a_name_does_not_fail_the_run(tmp_path: Path) -> None:
    for name in ("agent.py", "tools.py", "config.py"):
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    run = subprocess.run(
        [sys.executable, tmp_path / "agent.py", "Café Ω"],
        env={"PYTHONIOENCODING": "ascii", "DEMO_LATENCY": "0", "DEMO_FAILURE_RATE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Caf\\xe9" in run.stdout


def test_importing_the_modules_does_nothing(tmp_path: Path) -> None:
    code = (
        "import agent, tools, config; from dbos._dbos import _dbos_global_instance as d; print(d)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "DEMO_LATENCY": "nonsense", "MODEL": "nonsense"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "None\n"
    assert run.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_does_not_fail_the_run(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'research.sqlite'}"
    process = subprocess.Popen(
        [sys.executable, PROJECT / "agent.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"DBOS_SYSTEM_DATABASE_URL": database, "DEMO_LATENCY": "0.1", "DEMO_FAILURE_RATE": "0"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 0
    assert App(tmp_path, database).status() == "SUCCESS"
