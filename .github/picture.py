"""Make .github/argus.png: how the viewer that the README recommends shows a resumed run.

    uv run --with playwright .github/picture.py

It kills a run and resumes it in a temporary folder, starts the viewer on that database, and takes a
picture of the run's timeline. Look at it, and copy the version and the date to the README.

It needs Chromium on the PATH, or Playwright's own (`uvx playwright install chromium`), and a font
with mathematical symbols (Debian: `fonts-noto-core`). The picture shows this machine's host name.
"""
# ruff: noqa: S603 - it starts no program that others choose

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from playwright.sync_api import sync_playwright  # type: ignore[import-not-found,unused-ignore]

PROJECT = Path(__file__).resolve().parent.parent
VIEWER = "dbos-argus@0.0.41"
UVX = ["uvx", "--python", "3.12", VIEWER, "--log-level", "warning"]


def make_run(folder: str) -> None:
    """Kill a run in its third step, and resume it, with none of this machine's settings."""
    for module in PROJECT.glob("*.py"):
        shutil.copy(module, folder)
    settings = {"PATH": os.environ["PATH"], "DEMO_LATENCY": "0.3", "DEMO_FAILURE_RATE": "0"}
    command = [sys.executable, "agent.py", "Acme"]
    killed = subprocess.run([*command, "--crash"], cwd=folder, env=settings, check=False)
    if killed.returncode != -signal.SIGKILL:
        sys.exit("The first process should have been killed.")
    time.sleep(5)  # the viewer hatches a pause that is longer than the steps by far
    subprocess.run(command, cwd=folder, env=settings, check=True)


def take_picture(address: str) -> None:
    """Take a picture of the only run, as soon as its page is complete."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1200, "height": 560})
        [run] = page.request.get(f"{address}/api/workflows").json()
        page.goto(f"{address}/#/workflows/{run['workflow_id']}?view=timeline")
        for text in ("Connected", "fetch_financial_metrics", "Decoded"):
            page.get_by_text(text).first.wait_for()
        page.screenshot(path=PROJECT / ".github" / "argus.png", animations="disabled")


with tempfile.TemporaryDirectory() as folder:
    make_run(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--db-url", f"sqlite:///{folder}/research.sqlite", "--port", str(port)]
    viewer = subprocess.Popen([*UVX, *options], cwd=folder)
    try:
        while viewer.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.1)
        take_picture(f"http://127.0.0.1:{port}")
    finally:
        viewer.terminate()
        viewer.wait()
print(f".github/argus.png: {VIEWER}, {date.today().isoformat()}")
