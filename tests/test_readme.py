"""What the README says is run here, and compared."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT, App

README = (PROJECT / "README.md").read_text()
MODULES = ("agent.py", "tools.py", "config.py")


def blocks(language: str) -> list[str]:
    """Return the code blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


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
        env={
            "PATH": os.environ["PATH"],
            "COLUMNS": "80",
            "DEMO_LATENCY": "0.1",
            "DEMO_FAILURE_RATE": "0",  # at its default, one run in 35 uses up its attempts
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def masked(text: str) -> list[str]:
    """Leave out what differs from run to run: attempts that failed, and seconds."""
    return [
        re.sub(r"(ran|restored) +(\d+)? +\d+\.\d|seconds \d+\.\d$", r"\1 #", line.rstrip())
        for line in text.splitlines()
        if "failed with" not in line and "(attempt" not in line
    ]


def test_each_command_prints_what_the_readme_shows(tmp_path: Path) -> None:
    folder = copy_app(tmp_path)
    compared = 0
    for block in blocks("console"):
        command, _, shown = block.removeprefix("$ ").partition("\n")
        if not shown:
            continue
        if command.startswith("python -c "):
            arguments = ["-c", command.removeprefix('python -c "').removesuffix('"')]
        else:
            assert command.startswith("uv run agent.py")
            arguments = [word.strip('"') for word in command.split()[2:]]
        printed = run(folder, *arguments).stdout
        assert masked(printed) == masked(shown), command
        compared += 1
    assert compared == 4


def test_the_python_example_runs(tmp_path: Path) -> None:
    [example] = blocks("python")
    (copy_app(tmp_path) / "service.py").write_text(example)
    result = run(tmp_path, "service.py")
    assert result.returncode == 0, result.stdout
    assert "Acme works in" in result.stdout.splitlines()[-1]


def test_every_name_in_the_table_of_traps_is_in_the_code() -> None:
    code = "".join((PROJECT / name).read_text() for name in MODULES)
    traps = README[README.index("## The traps") : README.index("## Make it yours")]
    names = [name for row in traps.splitlines()[4:-1] for name in re.findall(r"`([^`]+)`", row)]
    for name in names:
        if name.endswith("()") or name.isidentifier():
            assert name.removesuffix("()") in code + "deps local", name


def test_runs_killed_under_dbos_agent_finish_under_dbos_durability(
    app: App, tmp_path: Path
) -> None:
    folder = copy_app(tmp_path)
    environment = {"DBOS_SYSTEM_DATABASE_URL": app.database_url}
    assert run(folder, "agent.py", "Acme", "--crash", **environment).returncode == -9
    [diff] = blocks("diff")
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    again = run(folder, "-W", "error", "agent.py", "Acme", **environment)
    assert again.returncode == 0, again.stdout
    assert "interrupted" in again.stdout
    assert "fetch_company_overview calls" not in again.stdout
    assert app.status() == "SUCCESS"


def test_new_runs_crash_and_recover_under_dbos_durability(tmp_path: Path) -> None:
    folder = copy_app(tmp_path)
    [diff] = blocks("diff")
    subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, text=True, check=True)
    assert run(folder, "agent.py", "Acme", "--crash").returncode == -9
    again = run(folder, "-W", "error", "agent.py", "Acme")
    assert again.returncode == 0, again.stdout
    assert "fetch_company_overview calls" not in again.stdout


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
        elif not link.startswith("https://"):
            assert (PROJECT / link).exists(), link
