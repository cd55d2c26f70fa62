"""The real command under the other Python interpreters of this machine.

DBOS asks SQLite for more under Python 3.12 than under 3.11, and an interpreter that pyenv has built
is linked to the system's SQLite, which may be older than what DBOS asks for.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from filelock import FileLock
from test_promise import report_of

UV = os.environ.get("UV") or shutil.which("uv")
VERSIONS = "import sqlite3, sys; print(sys.version.split()[0], sqlite3.sqlite_version)"


def interpreters() -> Iterator[Any]:
    """Find those of the supported versions at hand, without the one that runs the tests."""
    for version in ["3.11", "3.12", "3.13", "3.14"]:
        if sys.version.startswith(version):
            continue
        places = [Path.home() / ".pyenv/versions", Path.home() / ".local/share/uv/python"]
        paths = [str(path) for place in places for path in place.glob(f"*/bin/python{version}")]
        for path in [*sorted(paths, reverse=True), shutil.which(f"python{version}")]:
            if path and (told := output_of(path, "-c", VERSIONS)):
                yield pytest.param(path, id="{}, SQLite {}".format(*told.split()))
                break


def output_of(*command: str) -> str:
    """Return what the command prints, or nothing if it fails, as pyenv's stand-ins do."""
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.fixture
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter with the app's dependencies, in an environment that the next run finds again.

    What uv has stored of them on this machine is enough; only what is missing comes from the index.
    """
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("interpreters") / Path(request.param).name
    command = [UV or "uv", "sync", "--frozen", "--no-default-groups", "--python", request.param]
    settings = {"UV_PROJECT_ENVIRONMENT": str(folder), "UV_HTTP_RETRIES": "0"}
    with FileLock(f"{folder}.lock"):
        for where in (["--offline"], []):
            done = subprocess.run(
                [*command, *where],
                cwd=PROJECT,
                env={**os.environ, **settings},
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                return str(folder / "bin/python")
    pytest.skip(f"the dependencies are not at hand: {done.stderr}")


@pytest.mark.skipif(not UV, reason="uv is not on this machine")
@pytest.mark.parametrize("python", list(interpreters()), indirect=True)
def test_the_command_is_killed_and_goes_on_under_another_interpreter(
    python: str, tmp_path: Path
) -> None:
    database = tmp_path / "research.sqlite"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        settings = {"DEMO_FAILURE_RATE": "0", "DEMO_LATENCY": "0", "MODEL": "offline"}
        return subprocess.run(
            [python, str(PROJECT / "agent.py"), *arguments],
            env={**settings, "DBOS_SYSTEM_DATABASE_URL": f"sqlite:///{database}"},
            capture_output=True,
            text=True,
        )

    killed = run("Acme", "--crash")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run("Acme")
    assert resumed.returncode == 0, resumed.stderr
    assert "interrupted, resumes after 2 finished steps" in " ".join(resumed.stdout.split())
    assert "step 2:" not in resumed.stdout
    replayed = run("Acme")
    assert "finished earlier" in replayed.stdout
    assert "  step " not in replayed.stdout
    assert report_of(replayed.stdout) == report_of(resumed.stdout)
    batch = run("Acme", "Globex")
    assert batch.returncode == 0, batch.stdout
    assert "2 done, 0 running, 0 waiting, 0 failed" in batch.stdout
    listed = run("--list")
    assert listed.stdout.count(": finished, 4 finished steps") == 2
    assert [killed.stderr, resumed.stderr, replayed.stderr, batch.stderr, listed.stderr] == [""] * 5
    # DBOS stores whole milliseconds, and other programs that read its tables rely on that.
    with sqlite3.connect(database) as connection:
        kinds = connection.execute("SELECT DISTINCT typeof(created_at) FROM workflow_status")
        assert kinds.fetchall() == [("integer",)]
    connection.close()
