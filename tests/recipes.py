"""Copies of the app, changed as the README's recipes say, in folders of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT

README = (PROJECT / "README.md").read_text()
MODULES = ("agent.py", "tools.py", "config.py")
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "COLUMNS": "80",
    "DEMO_LATENCY": "0.1",
    "DEMO_FAILURE_RATE": "0",  # at its default, one run in a thousand uses up its attempts
}


def blocks(language: str, start: str = "") -> list[str]:
    """Return the README's code blocks in that language that contain a text."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block for block in found if start in block]


def copy_app(folder: Path) -> Path:
    """Copy the modules, so that their database and .env are in the copy too."""
    for name in MODULES:
        shutil.copy(PROJECT / name, folder)
    return folder


def apply_diff(name: str, folder: Path) -> None:
    """Change a copy of the app as a file under `tests/` says; the linter must agree."""
    subprocess.run(["git", "apply", str(PROJECT / "tests" / name)], cwd=folder, check=True)
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(PROJECT / "pyproject.toml")]
    subprocess.run([*ruff, *folder.glob("*.py")], check=True)


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
