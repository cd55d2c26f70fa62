"""What the command prints and leaves behind, and how it ends when something is wrong."""

import json
import re
import signal
import socket
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import filelock
import pytest
from conftest import PROJECT, App, start_postgres
from dbos import WorkflowStatus
from provider import REPORT, Provider, tool_calls
from sqlalchemy import make_url
from test_adversity import pg_ctl, start_on_tcp

import agent
import config
import tools

NAMES = [
    "Acme",
    "日本電産" * 10,
    "日本電産株式会社",
    unicodedata.normalize("NFD", "Công ty Cổ phần Sữa Việt Nam"),
    "טבע תעשיות פרמצבטיות",
    "أرامكو السعودية",
    "شرکت می\u200cرود",
]
"""Wide letters, combining marks, letters from right to left, and an invisible joiner."""

ACME = config.ResearchRequest(
    "local",
    "local",
    "Acme",
    "offline",
    told=config.digest_of(tools.BRIEF.told),
    question=tools.BRIEF.question,
)
INTERRUPTED = "\nInterrupted: what finished is stored. Run the same command to resume.\n"


def words(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())


def copy_the_code(folder: Path) -> Path:
    """Copy the modules to a folder without `.env`; return the command's path."""
    for name in ("agent.py", "tools.py", "config.py"):
        (folder / name).write_bytes((PROJECT / name).read_bytes())
    return folder / "agent.py"


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
        (["\ue000"], "contains U+E000, which this Python does not know"),
        (["\u0378"], "contains U+0378, which this Python does not know"),
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


def test_neons_pooled_string_works_as_pasted_and_the_first_lines_say_what_is_used(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = start_postgres(tmp_path_factory)
    server.stop()
    url = make_url(start_on_tcp(server)).set(
        host="ep-cool-1-pooler.eu-1.aws.neon.tech", database="migrated"
    )
    # libpq connects to that address, and takes the host for a name only.
    pasted = url.update_query_dict({"hostaddr": "127.0.0.1"}).render_as_string(hide_password=False)
    try:
        run = App(tmp_path, "").run("Acme", NEON_DATABASE_URL=pasted)
        assert run.wait() == 0, run.stderr
    finally:
        pg_ctl(server, "stop", "-m", "immediate")
    direct = "Postgres migrated on ep-cool-1.eu-1.aws.neon.tech, the direct address of that pooler"
    assert f"Database: {direct}." in words(run.stdout)


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


def test_the_first_line_says_what_runs_where_in_which_process_and_that_the_model_is_none(
    app: App,
) -> None:
    run = app.run("Acme")
    database = "SQLite research.sqlite" if "sqlite" in app.database_url else "Postgres migrated on"
    assert words(run.stdout).startswith(
        f"Run {ACME.run_id}: new. Process {run.pid}. Model: offline, a script. Database: {database}"
    )


def test_the_data_say_that_they_are_invented(sqlite_app: App) -> None:
    run = sqlite_app.run("Acme")
    assert "Invented for this tutorial: not facts about a real company." in words(run.stdout)


def test_the_last_line_says_what_checkpoints_saved(sqlite_app: App) -> None:
    sqlite_app.run("Acme", KILL_AT="before commit 3")
    resumed = sqlite_app.run("Acme")
    rows = resumed.stdout.split("US$\n")[1].splitlines()
    assert rows[:2] == [
        " 1  model request              restored",
        " 2  fetch_company_overview     restored",
    ]
    assert [re.split("  +", row.strip())[2] for row in rows[2:4]] == ["ran", "ran"]
    assert rows[4].startswith("Saved by checkpoints: model requests 1, tokens 69, seconds ")
    new = sqlite_app.run("Globex")
    assert new.stdout.splitlines()[-1] == "Saved by checkpoints: nothing"


@pytest.mark.parametrize("point", ["inside 1", "after effect 3"])
def test_who_waits_for_a_live_process_says_for_whom_and_does_not_claim_its_work(
    app: App, point: str
) -> None:
    first = app.start("Acme", WAIT_AT=point)
    app.until(f"waiting {point}")
    second = app.start("Acme").until_prints("being executed by")
    [(executor,)] = app.rows("SELECT executor_id FROM {dbos}workflow_status")
    app.open_gate()
    assert (first.wait(), second.wait()) == (0, 0)
    told = words(second.stdout)
    assert f":{first.pid}:" in executor
    assert (
        f"being executed by {executor}. Process {second.pid} waits for it and executes nothing;"
        " every 15 seconds it says so."
    ) in told
    assert "  step " not in second.stdout
    assert second.stdout.count("restored\n") == 4


def test_who_waits_prints_a_sign_of_life_every_15_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=1000.0)
    passing = SimpleNamespace(monotonic=lambda: clock.now, sleep=lambda _: None)
    monkeypatch.setattr(agent, "time", passing)
    executor = SimpleNamespace(locks=SimpleNamespace(rest=lambda: None), id="me:1:00000000")
    waiting = agent.Waiting(cast(agent.Executor, executor))
    printed = {}
    for second in range(60):
        clock.now = 1000.0 + second
        whom = "host:2:00000000" if second < 20 else "host:3:00000000"
        run = SimpleNamespace(status="PENDING", workflow_id="mine", executor_id=whom)
        waiting.for_a_moment(cast(WorkflowStatus, run))
        if told := capsys.readouterr().out:
            printed[second] = words(told)[:40]
    life = "still waiting"
    assert printed == {
        0: "Run mine: being executed by host:2:00000",
        16: life,
        20: "Run mine: being executed by host:3:00000",
        36: life,
        52: life,
    }


def test_a_failed_attempt_says_how_long_it_waits(sqlite_app: App) -> None:
    failed = sqlite_app.run("Acme", DEMO_FAILURE_RATE="1")
    waits = re.findall(r"failed with \w+: [^;]+; again in (\d+\.\d) s", words(failed.stdout))
    attempts = failed.stdout.count("fetch_financial_metrics calls the service")
    assert len(waits) == attempts - 1
    [line] = sqlite_app.ledger("waits fetch_financial_metrics")
    rounded = 0.05 * len(waits)
    assert sum(map(float, waits)) == pytest.approx(float(line.split()[-1]), abs=rounded)


def test_the_lines_of_failed_attempts_fit_80_columns(sqlite_app: App) -> None:
    failed = sqlite_app.run("Acme", DEMO_FAILURE_RATE="1")
    assert [line for line in failed.stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_printed_whatever_it_is_written_in(sqlite_app: App, name: str) -> None:
    run = sqlite_app.run(name)
    assert run.wait() == 0, run.stderr
    _, report, _ = run.stdout.split("\n\n")
    for line in report.splitlines():
        assert re.fullmatch("[a-z_]* *", line[:24])
        assert line[24:25] != " "
    assert name.replace(" ", "") in re.sub(r"\s", "", report)


def test_what_a_model_has_written_is_shown_and_not_sent_to_the_terminal(
    app: App, provider: Provider
) -> None:
    report = {**REPORT, "summary": "\x1b]0;renamed\x07 \u202eback"}
    provider.script = ["both tools", "custom"]
    provider.custom = tool_calls(("final_result", json.dumps(report)))
    run = app.run("Acme", **provider.environment)
    assert run.wait() == 0, run.stderr
    assert "\\x1b]0;renamed\\x07 \\u202eback" in run.stdout
    assert "\x1b" not in run.stdout


def test_the_text_of_an_error_is_shown_and_not_sent_to_the_terminal(sqlite_app: App) -> None:
    path = sqlite_app.folder / "re\x1b]0;named\x07.sqlite"
    path.mkdir()
    message = one_error(sqlite_app, "Acme", DBOS_SYSTEM_DATABASE_URL=f"sqlite:///{path}")
    assert "SQLite re\\x1b]0;named\\x07.sqlite" in message
    assert "\x1b" not in message


def test_a_report_that_cannot_be_written_is_an_error_and_the_run_has_finished(
    tmp_path: Path,
) -> None:
    database = f"sqlite:///{tmp_path / 'research.sqlite'}"
    environment = {
        "DBOS_SYSTEM_DATABASE_URL": database,
        "DEMO_BILL": str(tmp_path / "service.log"),
        "DEMO_LATENCY": "0",
    }
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, PROJECT / "agent.py", "Acme"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    problem, cure = run.stderr.splitlines()
    assert problem.startswith("error: standard output cannot be written: ")
    assert cure == "The run has finished. Run the same command to print its report."
    assert App(tmp_path, database).status() == "SUCCESS"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("agent.py Acme >&-", 2, "error: standard output cannot be written: it is closed\n"),
        ("agent.py '' 2>/dev/full", 2, ""),
        ("agent.py '' 2>&-", 2, ""),
    ],
)
def test_a_stream_that_is_closed_or_full_does_not_change_what_has_happened(
    tmp_path: Path, words: str, code: int, told: str
) -> None:
    run = subprocess.run(
        f"exec {sys.executable} {PROJECT}/{words}",
        shell=True,
        env={
            "DBOS_SYSTEM_DATABASE_URL": f"sqlite:///{tmp_path / 'research.sqlite'}",
            "DEMO_BILL": str(tmp_path / "service.log"),
            "DEMO_LATENCY": "0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == code
    assert run.stdout == ""
    assert run.stderr.startswith(told)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("stderr", ["/dev/full", "&-"])
def test_ctrl_c_ends_with_130_even_if_nothing_can_be_said(tmp_path: Path, stderr: str) -> None:
    with subprocess.Popen(
        f"exec {sys.executable} -u {PROJECT}/agent.py Acme 2>{stderr}",
        shell=True,
        env={
            "DBOS_SYSTEM_DATABASE_URL": f"sqlite:///{tmp_path / 'research.sqlite'}",
            "DEMO_BILL": str(tmp_path / "service.log"),
            "DEMO_LATENCY": "10",
        },
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        while "step 1: asks" not in run.stdout.readline():
            pass
        run.send_signal(signal.SIGINT)
        assert run.stdout.read() == ""
    assert run.returncode == 130


def test_verbose_shows_control_characters_instead_of_sending_them(tmp_path: Path) -> None:
    app = App(tmp_path, "sqlite:////nowhere\x1b]0;named\x07/x.sqlite")
    run = app.run("Acme", "--verbose")
    assert run.wait() == 2
    assert "Traceback" in run.stderr
    assert "nowhere\\x1b]0;named\\x07" in run.stderr
    assert "\x1b" not in run.stderr


def test_verbose_does_not_tell_the_password_of_an_address(
    sqlite_app: App, provider: Provider
) -> None:
    address = provider.environment["OPENAI_BASE_URL"].replace("//", "//bob:secret-pw@")
    provider.script = ["400"]
    run = sqlite_app.run(
        "Acme", "--verbose", **{**provider.environment, "OPENAI_BASE_URL": address}
    )
    assert run.wait() == 1
    assert "INFO:dbos:" in run.stderr
    assert "secret-pw" not in run.stdout + run.stderr


@pytest.mark.parametrize("name", [*NAMES, "Zürich Ångström"])
def test_a_name_is_the_same_run_in_every_unicode_form(name: str) -> None:
    """Their compatibility forms are equal to their canonical ones, which not all names' are."""
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    requests = [replace(ACME, company=form) for form in [name, *forms]]
    assert len({request.run_id for request in requests}) == 1


def test_the_same_name_from_another_keyboard_replays_the_run(sqlite_app: App) -> None:
    composed = unicodedata.normalize("NFC", NAMES[3])
    assert composed != NAMES[3]
    assert ": new." in sqlite_app.run(composed).stdout
    assert "finished earlier" in sqlite_app.run(NAMES[3]).stdout
    assert len(sqlite_app.ledger("effect")) == 4


def test_the_real_command_runs_from_any_directory_and_loads_no_providers_client(
    tmp_path: Path,
) -> None:
    copy_the_code(tmp_path)
    code = (
        "import gc, runpy, sys; sys.argv = ['agent.py']\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "try: runpy.run_path(sys.path[0] + '/agent.py', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        # What the imports have made is not looked through when the process ends.
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()\n"
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
    assert "Saved by checkpoints: nothing\n" in run.stdout
    assert run.stdout.splitlines()[-1] == "LOADED set()"
    assert (tmp_path / "research.sqlite").exists()


def test_ctrl_c_as_soon_as_the_command_has_begun_ends_in_one_line(tmp_path: Path) -> None:
    """Before that, while Python imports the libraries, Python ends it in its own way."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "real = signal.signal\n"
        "def watched(number, handler):\n"
        "    real(number, handler)\n"
        "    if number == signal.SIGINT: os.kill(os.getpid(), number)\n"
        "signal.signal = watched\n"
    )
    run = subprocess.run(
        [sys.executable, copy_the_code(tmp_path)],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 130
    assert run.stderr == INTERRUPTED
    assert run.stdout == ""
    assert not (tmp_path / "research.sqlite").exists()


@pytest.mark.parametrize("point", ["before launch", "before enqueue", "before outcome SUCCESS"])
def test_ctrl_c_between_two_steps_ends_in_one_line_too(sqlite_app: App, point: str) -> None:
    process = sqlite_app.start("Acme", WAIT_AT=point)
    sqlite_app.until(f"waiting {point}")
    process.signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr == INTERRUPTED
    assert sqlite_app.run("Acme").wait() == 0
    assert sqlite_app.repeated() == []


def test_a_terminal_that_cannot_show_a_name_does_not_fail_the_run(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, copy_the_code(tmp_path), "Café Ω"],
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


def test_only_its_owner_can_read_the_sqlite_database_and_what_lies_beside_it(
    sqlite_app: App,
) -> None:
    folder = sqlite_app.folder
    environment = {
        "HOME": str(folder),
        "LEDGER": str(folder / "ledger"),
        "DBOS_SYSTEM_DATABASE_URL": sqlite_app.database_url,
        "KILL_AT": "after effect 3",
    }
    code = f"import child; child.main(['Acme'], {environment}, {str(folder / 'output')!r}, {{}})"
    run = subprocess.run([sys.executable, "-c", code], umask=0, check=False)
    assert run.returncode == -signal.SIGKILL
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.glob("research.sqlite*")}
    assert modes == {"research.sqlite": 0o600, "research.sqlite.locks": 0o700}


def test_dead_processes_leave_no_locks_once_another_one_executes(sqlite_app: App) -> None:
    sqlite_app.run("Finished")
    sqlite_app.run("Failed", OUTAGE="1")
    sqlite_app.run("Killed", KILL_AT="before commit 3")
    locks = sqlite_app.folder / "research.sqlite.locks"
    assert list(locks.iterdir()) != []
    for count, name in enumerate(("Live", "Live too"), start=1):
        sqlite_app.start(name, WAIT_AT="after effect 3")
        sqlite_app.until("waiting after effect 3", times=count)
        assert len(list(locks.iterdir())) == 2 * count, "its own, and its run's"
    for path in locks.iterdir():
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(path).acquire(blocking=False)


def test_no_queue_is_left_of_runs_that_have_finished(app: App) -> None:
    app.run("Killed", KILL_AT="before commit 3")
    app.run("Failed", OUTAGE="1")
    first = app.start("Taken over", WAIT_AT="after effect 3")
    app.until("waiting after effect 3")
    second = app.start("Taken over").until_prints("being executed by")
    first.signal(signal.SIGKILL)
    assert [second.wait(), app.run("Killed").wait(), app.run("Failed").wait()] == [0, 0, 0]
    assert app.rows("SELECT name FROM {dbos}queues") == []


@pytest.mark.parametrize("killed_at", ["before commit 3", "after outcome SUCCESS"])
def test_a_queue_that_a_killed_process_left_is_gone_once_another_one_executes(
    app: App, killed_at: str
) -> None:
    app.run("Acme", KILL_AT=killed_at)
    assert len(app.rows("SELECT name FROM {dbos}queues")) == 1
    assert app.run("Initech").wait() == 0
    assert app.rows("SELECT name FROM {dbos}queues") == []
