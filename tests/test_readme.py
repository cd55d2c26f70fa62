"""What the README says is run here, and compared."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import PROJECT, App, wait_for
from provider import Provider

README = (PROJECT / "README.md").read_text()
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "COLUMNS": "80",
    "DEMO_LATENCY": "0.1",
    "DEMO_FAILURE_RATE": "0",  # at its default, one run in 35 uses up its attempts
}
MODULES = ("agent.py", "tools.py", "config.py")


def blocks(language: str) -> list[str]:
    """Return the code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def apply_diff(name: str, folder: Path) -> None:
    """Change this file in a copy of the app as the README shows."""
    [diff] = [block for block in blocks("diff") if block.startswith(f"--- a/{name}\n")]
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(PROJECT / "pyproject.toml")]
    subprocess.run([*ruff, folder / name], check=True)


def copy_app(folder: Path) -> Path:
    """Copy the modules, so that their database and .env are in the copy too."""
    for name in MODULES:
        shutil.copy(PROJECT / name, folder)
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a copy of the app."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def masked(text: str) -> str:
    """Leave out what differs from run to run: attempts that failed, progress, names, seconds."""
    lines = [
        re.sub(r"(ran|restored|SUCCESS) +(\d+ +)?\d+\.\d( +\d$)?|seconds \d+\.\d$", r"\1 #", line)
        for line in text.splitlines()
        if not re.search(r"failed with|\(attempt|^\d+ done, ", line)
    ]
    # Joined, because a name of another length folds a paragraph at another place.
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"times, last \w+: [\w ]+", "times, last ERROR", text)
    return re.sub(r"[^\s:]+:\d+:[0-9a-f]{8}", "EXECUTOR", text)


def test_each_command_prints_what_the_readme_shows(tmp_path: Path, provider: Provider) -> None:
    provider.script = ["401"]
    folder = copy_app(tmp_path)
    app = App(folder, f"sqlite:///{folder / 'research.sqlite'}", environment={"COLUMNS": "80"})
    compared = 0
    for block in blocks("console"):
        command, _, shown = block.removeprefix("$ ").partition("\n")
        if not shown:
            continue
        if command.startswith("python -c "):
            code = command.removeprefix('python -c "').removesuffix('"')
            printed = run(folder, "-c", code).stdout
        else:
            arguments = shlex.split(command.partition("uv run agent.py")[2], comments=True)
            environment = {**provider.environment, "MODEL": ""} if "KEY=wrong" in command else {}
            if "DEMO_FAILURE_RATE=1" in command:
                environment["DEMO_FAILURE_RATE"] = "1"
            if "^C" in shown:
                environment["WAIT_AT"] = "inside 2"
            if "after the kill" in command:
                app.run(*arguments, KILL_AT="inside 2")
            first = None
            if "in the second terminal" in command:
                first = app.start(*arguments, WAIT_AT="inside 2").until_prints("step 2")
            process = app.start(*arguments, **environment)
            if "^C" in shown:
                process.until_prints(shown.split("\n^C")[0].splitlines()[-1])
                process.signal(signal.SIGINT)
            if first is not None:
                process.until_prints("executes nothing")
                app.open_gate()
                assert first.wait() == 0
                assert "4  model request              ran" in first.stdout
            process.wait()
            stdout = process.stdout.partition("\ncompany_name")[0] if first else process.stdout
            printed = stdout + ("^C" if "^C" in shown else "") + process.stderr
        pattern = ".*".join(re.escape(part.strip()) for part in masked(shown).split("…"))
        assert re.fullmatch(pattern, masked(printed)), f"{command}\n{printed}"
        compared += 1
    assert compared == 14


def test_each_command_within_the_text_runs(sqlite_app: App) -> None:
    names = sqlite_app.folder / "companies.txt"
    names.write_text("# customers\nAcme\nGlobex\n")
    commands = re.findall(r"`(?:[A-Z_]+=\S+ )?uv run agent\.py ([^`]*)`", README)
    assert len(commands) == 4
    for command in commands:
        arguments, _, file = command.partition(" < ")
        patches = {"stdin": str(names)} if file else {}
        done = sqlite_app.run(*shlex.split(arguments), patches=patches)
        assert done.wait() == 0, done.stderr


def test_the_command_that_kills_kills(tmp_path: Path) -> None:
    [command] = re.findall(r"`(pkill [^`]+)`", README)
    name = f"Three{os.getpid()}"  # nobody else's
    command = command.replace("Three", name)
    process = subprocess.Popen(
        [sys.executable, "-u", "agent.py", name],
        cwd=copy_app(tmp_path),
        env={**ENVIRONMENT, "DEMO_LATENCY": "5"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert any("step 2" in line for line in process.stdout)
        subprocess.run(shlex.split(command), check=True)
    assert process.returncode == -signal.SIGKILL
    again = run(tmp_path, "agent.py", name)
    assert "resumes after 1 finished step." in again.stdout.replace("\n", " ")


def test_the_web_service_runs_and_finds_its_runs_again_after_it_was_killed(tmp_path: Path) -> None:
    [example] = blocks("python")
    (copy_app(tmp_path) / "service.py").write_text(example)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    reports = []
    for _ in range(2):
        log = (tmp_path / "log").open("w")
        with (
            log,
            subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "service:app", "--port", port],
                cwd=tmp_path,
                env=ENVIRONMENT,
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as server,
        ):
            wait_for(lambda: "running on" in (tmp_path / "log").read_text(), "the server")
            url = f"http://127.0.0.1:{port}/research/Acme"
            with urllib.request.urlopen(urllib.request.Request(url, method="POST")) as response:
                reports.append(json.load(response))
            server.kill()
        assert "Traceback" not in (tmp_path / "log").read_text()
    assert reports[0] == reports[1]
    assert reports[0]["company_name"] == "Acme"
    app = App(tmp_path, f"sqlite:///{tmp_path / 'research.sqlite'}")
    assert app.rows("SELECT count(*) FROM operation_outputs") == [(4,)]


def test_the_files_have_as_many_lines_as_the_readme_says() -> None:
    for name in MODULES:
        lines = len((PROJECT / name).read_text().splitlines())
        assert f"| [`{name}`]({name}) | {lines} |" in README


def test_every_message_in_the_table_of_troubles_is_in_the_code() -> None:
    code = " ".join("".join((PROJECT / name).read_text() for name in MODULES).split())
    code = re.sub(r'" f?"', "", code)
    table = README[README.index("## Troubleshooting") : README.index("`--verbose` shows")]
    messages = [m for row in table.splitlines()[4:-1] for m in re.findall(r"`([^`]+)`", row[:60])]
    assert len(messages) >= 12
    for message in messages:
        assert message in code, message


def test_every_name_in_the_table_of_traps_is_in_the_code() -> None:
    code = "".join((PROJECT / name).read_text() for name in MODULES)
    traps = README[README.index("## The traps") : README.index("## Make it yours")]
    rows = [row.split(" | ")[:3] for row in traps.splitlines()[4:-1]]
    names = [name for row in rows for cell in row for name in re.findall(r"`([^`]+)`", cell)]
    for name in names:
        if name.endswith("()") or name.isidentifier():
            assert name.removesuffix("()") in code + "deps local", name


def test_runs_killed_under_dbos_agent_finish_under_dbos_durability(
    app: App, tmp_path: Path
) -> None:
    folder = copy_app(tmp_path)
    environment = {"DBOS_SYSTEM_DATABASE_URL": app.database_url}
    assert run(folder, "agent.py", "Acme", "--crash", **environment).returncode == -9
    apply_diff("agent.py", folder)
    again = run(folder, "-W", "error", "agent.py", "Acme", **environment)
    assert again.returncode == 0, again.stdout
    assert "interrupted" in again.stdout
    assert "fetch_company_overview calls" not in again.stdout
    assert app.status() == "SUCCESS"


def test_new_runs_crash_and_recover_under_dbos_durability(tmp_path: Path) -> None:
    folder = copy_app(tmp_path)
    apply_diff("agent.py", folder)
    assert run(folder, "agent.py", "Acme", "--crash").returncode == -9
    again = run(folder, "-W", "error", "agent.py", "Acme")
    assert again.returncode == 0, again.stdout
    assert "fetch_company_overview calls" not in again.stdout


def test_a_tool_of_ones_own_is_retried_and_checkpointed(tmp_path: Path) -> None:
    """Against a server that drops a connection, is overloaded, answers garbage, and answers."""
    answers: list[tuple[int, bytes] | None]
    metrics = {"revenue_usd_millions": 1.5, "revenue_growth_percent": 2, "net_margin_percent": 3}
    metrics_of_acme = json.dumps({"company_name": "Acme", **metrics}).encode()
    answers = [None, (503, b""), (200, b"garbage"), (200, metrics_of_acme)]
    keys = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Idempotency-Key"])
            if answer := answers.pop(0):
                self.send_response(answer[0])
                self.end_headers()
                self.wfile.write(answer[1])

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    folder = copy_app(tmp_path)
    apply_diff("tools.py", folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tool = (folder / "tools.py").read_text()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        (folder / "tools.py").write_text(tool.replace("https://metrics.example.com", url))
        first = run(folder, "agent.py", "Acme")
        assert "fetch_financial_metrics    ran               4" in first.stdout, first.stdout
        assert "revenue_usd_millions    1.5" in first.stdout
        again = run(folder, "agent.py", "Acme")
        assert "fetch_financial_metrics    restored" in again.stdout
        server.shutdown()
    assert len(keys) == 4
    assert len(set(keys)) == 1


def test_every_figure_in_the_table_of_costs_is_one_that_the_benchmark_prints() -> None:
    """It says itself where its own ratio is another than the one in the README."""
    costs = README[README.index("## What it costs") : README.index("## The traps")]
    figures = re.findall(r"^\| ([^|]+) \| [\d,.]+ ", costs, re.MULTILINE)
    assert len(figures) >= 13
    code = re.sub(r"\{processes\}", "1", (PROJECT / "tests/benchmark.py").read_text())
    for figure in figures:
        assert f'"{re.sub("[124]$", "1", figure)}"' in code, figure


def test_every_link_to_a_file_or_a_heading_resolves() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.strip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings
        elif link.partition("#")[0] and not link.startswith(("https://", "../../actions/")):
            assert (PROJECT / link).exists(), link
