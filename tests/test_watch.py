"""recipes/watch.py, in a real Chromium: the button kills a real process, and the page goes on."""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import NO_CACHE, PATIENCE, PROJECT, App, wait_for
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

HOSTILE = "<img src=x onerror=\"document.title='taken over'\">"
HISTORY = """
window.told = [], window.twice = [];
new MutationObserver(() => {
  const text = document.getElementById("status")?.textContent;
  if (text && told.at(-1) !== text) told.push(text);
  const numbers = [...document.querySelectorAll("#steps tr:not(.life) td:first-child")];
  const seen = numbers.map((cell) => cell.textContent);
  if (new Set(seen).size < seen.length) twice.push(seen);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""
"""It notes what the page has said, and each moment at which a step stood there twice."""


@contextmanager
def watch(app: App) -> Iterator[tuple[subprocess.Popen[bytes], Path, int]]:
    """Run the recipe in a copy of the project; yield its process, what it prints, and its port."""
    folder, log = app.folder / "copy", app.folder / "log"
    for name in ("demo", "durable", "recipes"):
        shutil.copytree(PROJECT / name, folder / name, ignore=NO_CACHE)
    for name in ("agent.py", "config.py", "tools.py"):
        shutil.copy(PROJECT / name, folder / name)
    settings = {
        "PATH": os.environ["PATH"],
        "DBOS_SYSTEM_DATABASE_URL": app.database_url,
        "DEMO_LATENCY": "1.5",
        "DEMO_FAILURE_RATE": "0",
        "DEMO_BILL": str(app.folder / "service.log"),
    }
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-m", "recipes.watch", "--port", "0"],
            cwd=folder,
            env=settings,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            opened = wait_for(lambda: re.search(r"127\.0\.0\.1:(\d+)", log.read_text()), "a port")
            yield process, log, int(opened[1])
        finally:
            process.terminate()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium of this machine."""
    path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if path is None:
        reason = "there is no Chromium (Debian: apt-get install chromium)"
        if os.environ.get("BROWSER_TEST") == "required":  # .ci/run says so
            pytest.fail(reason)
        pytest.skip(reason)
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def open_page(browser: Browser, port: int) -> Page:
    page = browser.new_page()
    page.set_default_timeout(3 * PATIENCE * 1000)  # a run, a death and a start in one wait
    page.add_init_script(HISTORY)
    page.goto(f"http://127.0.0.1:{port}/")
    expect(page.get_by_text("Connected to process")).to_be_visible(timeout=PATIENCE * 1000)
    return page


def rows(page: Page) -> list[list[str]]:
    """Return number, name and place of each step on the page, and the lines between them."""
    found = page.locator("#steps tr").all_inner_texts()
    texts = [[word for word in re.split(r"[\t\n]+", text) if word.strip()] for text in found]
    return [[words[0], words[1], words[-1]] if len(words) > 1 else words for words in texts]


def test_the_button_kills_the_server_and_the_run_goes_on_before_ones_eyes(
    app: App, browser: Browser
) -> None:
    with watch(app) as (_, log, port):
        page, streams = open_page(browser, port), []
        page.on("request", lambda sent: streams.append(sent) if "/events" in sent.url else None)
        # By keyboard alone: the field, the button beside it, the button that kills.
        page.keyboard.press("Tab")
        page.keyboard.type(HOSTILE)
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Kill it now").wait_for()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Report").wait_for()

        first, second = re.findall(r"Process (\d+) begins", log.read_text())
        assert rows(page) == [
            ["1", "model request", "restored"],
            ["2", "fetch_company_overview", "restored"],
            [f"Process {second} goes on from here."],
            ["3", "fetch_financial_metrics", "ran"],
            ["4", "model request", "ran"],
        ]
        assert page.evaluate("twice") == []
        seen = [sent.all_headers().get("last-event-id", "") for sent in streams]
        assert [text.partition("-")[0] for text in seen] in (["", "1"], ["", "2"]), seen
        told = page.evaluate("told")
        assert [f"Connected to process {first}." in told, told[-2:]] == [
            True,
            [
                f"Cut off: process {first} is gone. Connecting again…",
                f"Process {first} is gone. Process {second} goes on.",
            ],
        ]
        # The name is text wherever it stands: in the list, in the title, in the report.
        for place, count in {"nav": 1, "h2": 1, "dd": 2}.items():
            assert page.locator(place, has_text=HOSTILE).count() == count, place
        assert (page.locator("img").count(), page.title()) == (0, "Watch it survive")

        # The judge outside: the step that was killed after its effect is the only one that ran
        # twice, and the service knew its key.
        bill = (app.folder / "service.log").read_text()
        assert (bill.count(" billed"), bill.count(" answered from the record")) == (2, 1)
        assert app.rows("SELECT count(*) FROM {dbos}operation_outputs") == [(4,)]

        # A person who comes later sees the same, on a telephone too.
        page.set_viewport_size({"width": 390, "height": 844})
        page.reload()
        page.get_by_role("heading", name="Report").wait_for()
        assert [row[-1] for row in rows(page)][-1] == "ran"
        assert page.evaluate("document.documentElement.scrollWidth") == 390

        # Nothing calls a tool now, so the second press kills at once.
        page.get_by_role("button", name="Kill the server").click()
        page.get_by_role("button", name="Kill it now").click()
        page.get_by_text(f"Process {second} is gone. Process").wait_for()
        assert [row[-1] for row in rows(page)] == ["restored"] * 4

        # A run that a command has left is resumed from the list.
        assert app.run("Globex", "--crash").wait() == -signal.SIGKILL
        page.get_by_role("button", name="Globex interrupted").click()
        page.get_by_role("button", name="Resume").click()
        page.locator("dd", has_text="Globex").first.wait_for()
        assert [row[-1] for row in rows(page)] == ["ran"] * 4, "in the time of this server"
        page.close()


def test_an_answer_from_before_the_death_does_not_end_the_cut_on_the_page(
    sqlite_app: App, browser: Browser
) -> None:
    with watch(sqlite_app) as (_, log, port):
        page = open_page(browser, port)
        page.get_by_label("Research").fill("Acme")
        page.keyboard.press("Enter")
        page.get_by_text("under way").wait_for()
        # The browser itself sends a request again whose connection breaks. So the old process may
        # answer who it is, and the new one which runs there are.
        held: list[Route] = []
        page.route("**/runs", lambda route: held.append(route), times=1)
        with page.expect_request("**/runs"):
            page.get_by_role("button", name="Kill the server").click()
        page.get_by_text("Cut off: ").wait_for()
        held[0].continue_()
        page.get_by_text("goes on.").wait_for()
        first, second = re.findall(r"Process (\d+) begins", log.read_text())
        assert page.evaluate("told")[-2:] == [
            f"Cut off: process {first} is gone. Connecting again…",
            f"Process {first} is gone. Process {second} goes on.",
        ]
        page.close()


def send(port: int, method: str, path: str, **headers: str) -> int:
    """Return the status code of an answer. What a browser would set is set by the caller."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    body = json.dumps({"words": ["Acme"]}) if method == "POST" else None
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    with connection.getresponse() as response:
        response.read()
    connection.close()
    return response.status


def test_what_another_website_sends_is_refused_and_ctrl_c_ends_all(sqlite_app: App) -> None:
    with watch(sqlite_app) as (process, log, port):
        own = f"127.0.0.1:{port}"
        assert send(port, "GET", "/process") == 200
        assert send(port, "GET", "/", Host=f"localhost:{port}") == 200
        everything = [("GET", "/"), ("GET", "/runs"), ("POST", "/reports"), ("POST", "/kill/1")]
        for method, path in [*everything, ("GET", "/process"), ("GET", "/reports/x")]:
            for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{own}"):
                assert send(port, method, path, Origin=origin) == 403, (path, origin)
            # A name that was made to lead to this machine: then the two origins are the same.
            for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:127.0.0.1", ""):
                name = f"{host}:{port}"
                assert send(port, method, path, Host=name, Origin=f"http://{name}") == 403, name
                assert send(port, method, path, Host=name) == 403, name
        assert log.read_text().count("begins") == 1, "nobody has killed it"
        assert send(port, "POST", "/kill/1") == 409, "it is meant for another process"
        assert send(port, "POST", "/reports", Origin=f"http://{own}") == 202
        assert sqlite_app.statuses(), "the page's own request is taken"

        [server] = map(int, re.findall(r"Process (\d+) begins", log.read_text()))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)


def test_the_server_ends_with_the_process_that_starts_it_again(sqlite_app: App) -> None:
    with watch(sqlite_app) as (process, log, port):
        assert send(port, "GET", "/process") == 200
        [server] = map(int, re.findall(r"Process (\d+) begins", log.read_text()))
        process.kill()

        def has_ended() -> bool:
            try:
                os.kill(server, 0)
            except ProcessLookupError:
                return True
            return False

        wait_for(has_ended, "the server to end")
