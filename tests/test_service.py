"""The web service: real uvicorn processes, which are killed, asked by a client like a browser."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import PROJECT, App, wait_for
from provider import Provider

import config

Server = subprocess.Popen[bytes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def serve(app: App, port: int = 0, **environment: str) -> Iterator[tuple[Server, str]]:
    """Start the service in a copy of the project; yield its process and its address."""
    folder, port = app.folder / "copy", port or free_port()
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    for name in ("agent.py", "config.py", "tools.py", "recipes/worker.py", "recipes/service.py"):
        shutil.copy(PROJECT / name, folder / name)
    settings = {
        "PATH": os.environ["PATH"],
        "DBOS_SYSTEM_DATABASE_URL": app.database_url,
        "DEMO_LATENCY": "0",
        "DEMO_FAILURE_RATE": "0",
        "DEMO_BILL": str(app.folder / "service.log"),
    }
    log = app.folder / f"log-{time.monotonic_ns()}"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "recipes.service:app", "--port", str(port)],
            cwd=folder,
            env={**settings, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            wait_for(lambda: "running on" in log.read_text(), "the service")
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.kill()
    assert "Exception in ASGI" not in log.read_text(), log.read_text()


def ask(method: str, url: str, **headers: str) -> tuple[int, Any]:
    """Return the status code of an answer, and its JSON."""
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read() or "null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


class Browser:
    """An `EventSource`: it connects again, with the last event's ID, until it is told not to."""

    def __init__(self, url: str, last_id: str = "") -> None:
        self.url, self.last_id = url, last_id
        self.events: list[tuple[str, str, Any]] = []
        """ID, kind and data."""
        self.connections = 0
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def live(self) -> None:
        while self.connect():
            time.sleep(0.05)

    def connect(self) -> bool:
        """Read events until the connection ends; tell whether to connect again."""
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            with urllib.request.urlopen(request) as response:
                self.connections += 1
                fields: dict[str, str] = {}
                for line in response:
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    if name:
                        fields[name] = value
                    else:
                        self.last_id = fields["id"]
                        data = json.loads(fields["data"])
                        self.events.append((fields["id"], fields["event"], data))
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return True

    def until(self, count: int) -> None:
        """Wait until it has seen so many events."""
        wait_for(lambda: len(self.events) >= count, f"{count} events")

    def until_told_to_stop(self) -> list[str]:
        """Wait for 204; return the IDs of all events."""
        wait_for(lambda: not self.thread.is_alive(), "204")
        return [event_id for event_id, _, _ in self.events]


def stored_ids(app: App) -> list[str]:
    """Return the IDs that the events of the stored steps have."""
    rows = app.rows(
        "SELECT function_id, completed_at_epoch_ms FROM {dbos}operation_outputs ORDER BY 1"
    )
    return [f"{number}-{moment}" for number, moment in rows]


def test_a_browser_misses_nothing_and_sees_nothing_twice_when_the_service_is_killed(
    app: App,
) -> None:
    port = free_port()
    with serve(app, port, DEMO_LATENCY="1") as (server, url):
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert code == 202
        browser = Browser(url + answer["events"])
        browser.until(2)
        server.kill()
        server.wait()
    assert app.statuses() == {"PENDING": 1}
    with serve(app, port) as (server, url):
        assert browser.until_told_to_stop() == [*stored_ids(app), "end"]
        assert browser.connections >= 3, "before the kill, after it, and after the end"
        kinds = [(kind, data) for _, kind, data in browser.events]
        assert kinds == [
            ("step", {"number": 1, "name": config.MODEL_REQUEST}),
            ("step", {"number": 2, "name": "fetch_company_overview"}),
            ("step", {"number": 3, "name": "fetch_financial_metrics"}),
            ("step", {"number": 4, "name": config.MODEL_REQUEST}),
            ("end", {"state": "finished"}),
        ]
        events = url + answer["events"]
        assert Browser(events).until_told_to_stop() == [*stored_ids(app), "end"], "a new page"
        assert Browser(events, "garbage").until_told_to_stop() == [*stored_ids(app), "end"]
        assert ask("GET", events, **{"Last-Event-ID": "end"}) == (204, None)
    bill = (app.folder / "service.log").read_text()
    assert bill.count(" billed") == 2


def test_steps_that_a_rewind_dropped_are_sent_again(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(app) as (_, url):
        _, answer = ask("POST", f"{url}/reports/Acme")
        first = Browser(url + answer["events"]).until_told_to_stop()
        # A rewind drops finished steps where the model's answers could not be used.
        monkeypatch.setattr(config, "PROJECT", app.folder)
        monkeypatch.setenv("DBOS_SYSTEM_DATABASE_URL", app.database_url)
        client, locks = config.open_database(config.load_settings())
        [run] = client.list_workflows()
        client.rewind_workflow(run.workflow_id, start_step=3, queue_name=run.queue_name)
        client.destroy()
        locks.rest()  # which closes its connections
        events = url + answer["events"]
        second = Browser(events).until_told_to_stop()
        assert second == [*stored_ids(app), "end"]
        assert second[:2] == first[:2]
        assert second[2] != first[2]
        for seen, following in [
            (first[3], second[2:]),
            (first[2], second[2:]),
            (first[1], second[2:]),
            (second[2], second[3:]),
        ]:
            assert Browser(events, seen).until_told_to_stop() == following, seen


def test_the_service_killed_with_requests_in_flight_resumes_them_without_being_asked(
    app: App,
) -> None:
    companies = ("Acme", "Globex", "Initech")
    with serve(app, DEMO_LATENCY="1") as (server, url):
        asked = [ask("POST", f"{url}/reports/{company}") for company in companies]
        assert [code for code, _ in asked] == [202, 202, 202]
        reports = [answer["report"] for _, answer in asked]
        assert ask("POST", f"{url}/reports/Acme") == asked[0], "the same request, the same run"
        assert ask("GET", url + reports[0]) == (202, {"state": "in progress"})
        stored = "SELECT count(*) FROM {dbos}operation_outputs"
        wait_for(lambda: app.rows(stored) >= [(4,)], "steps of several runs")
        server.kill()
        server.wait()
    assert app.statuses() == {"PENDING": 3}
    before = stored_ids(app)
    with serve(app) as (_, url):
        wait_for(lambda: app.statuses() == {"SUCCESS": 3}, "all runs to end")
        for company, report in zip(companies, reports, strict=True):
            code, answer = ask("GET", url + report)
            assert (code, answer["report"]["company_name"]) == (200, company)
        assert ask("POST", f"{url}/reports/Acme") == asked[0]
        assert app.rows(stored) == [(12,)], "each step is stored once"
        assert set(before) <= set(stored_ids(app))


def test_the_service_says_so_when_a_run_lies_idle_whose_command_was_killed(app: App) -> None:
    with serve(app) as (_, url):
        command = app.start("Acme", WAIT_AT="after effect 3")
        app.until("waiting after effect 3")
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert (code, ask("GET", url + answer["report"])) == (202, (202, {"state": "in progress"}))
        browser = Browser(url + answer["events"])
        browser.until(2)
        command.signal(signal.SIGKILL)
        command.wait()
        told = (202, {"state": "interrupted: a worker or another POST resumes it"})
        wait_for(lambda: ask("GET", url + answer["report"]) == told, "the state")
        assert ask("POST", f"{url}/reports/Acme")[0] == 202
        assert browser.until_told_to_stop() == [*stored_ids(app), "end"]
        assert ask("POST", f"{url}/reports/A/S")[0] == 202, "a name may hold a slash"


def test_the_service_shuts_down_after_the_runs_in_flight_have_ended(app: App) -> None:
    with serve(app, DEMO_LATENCY="0.5") as (server, url):
        assert ask("POST", f"{url}/reports/Acme")[0] == 202
        wait_for(lambda: app.statuses() == {"PENDING": 1}, "the run to begin")
        server.terminate()
        wait_for(lambda: server.poll() is not None, "the service to end")
    assert app.statuses() == {"SUCCESS": 1}


def test_the_service_shuts_down_while_somebody_watches_a_run_of_another_process(app: App) -> None:
    port = free_port()
    with serve(app, port) as (server, url):
        command = app.start("Acme", WAIT_AT="after effect 3")
        app.until("waiting after effect 3")
        [(run_id,)] = app.rows("SELECT workflow_uuid FROM {dbos}workflow_status")
        browser = Browser(f"{url}/runs/{run_id}/events")
        browser.until(2)
        server.terminate()
        wait_for(lambda: server.poll() is not None, "the service to end")
    app.open_gate()
    assert command.wait() == 0
    with serve(app, port):
        assert browser.until_told_to_stop() == [*stored_ids(app), "end"]


def test_the_service_tells_what_is_wrong_by_its_status_codes(app: App, provider: Provider) -> None:
    provider.script = ["402"]
    with serve(app, 0, **provider.environment) as (_, url):
        assert ask("GET", f"{url}/reports/nothing")[0] == 404
        assert ask("GET", f"{url}/runs/nothing/events")[0] == 404
        code, answer = ask("POST", f"{url}/reports/%20")
        assert code == 422
        assert answer["detail"] == "the company's name has 0 characters: give it 1 to 100."
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert code == 202
        wait_for(lambda: app.statuses() == {"ERROR": 1}, "the model to refuse")
        failed = ask("GET", url + answer["report"])
        assert failed == (502, {"detail": "the research has failed; POST again to resume it"})
        browser = Browser(url + answer["events"])
        assert browser.until_told_to_stop() == ["end"]
        assert browser.events[0][2] == {"state": "failed"}
        assert ask("POST", f"{url}/reports/Acme")[0] == 202
        wait_for(lambda: app.statuses() == {"SUCCESS": 1}, "the model to answer")
        assert ask("GET", url + answer["report"])[0] == 200
        app.rows("UPDATE {dbos}workflow_output SET output = 'of an older type'")
        assert ask("GET", url + answer["report"])[0] == 409
        app.rows("UPDATE {dbos}workflow_status SET application_version = '0', status = 'ERROR'")
        code, answer = ask("POST", f"{url}/reports/Acme")
        assert (code, "belongs to version 0" in answer["detail"]) == (409, True)


def test_the_service_asks_for_patience_while_the_database_fails(app: App) -> None:
    with serve(app) as (_, url):
        app.rows("ALTER TABLE {dbos}workflow_status RENAME TO away")
        try:
            code, answer = ask("POST", f"{url}/reports/Acme")
        finally:
            app.rows("ALTER TABLE {dbos}away RENAME TO workflow_status")
        assert (code, answer) == (503, {"detail": "the database cannot be used now: ask again"})


def test_a_service_that_cannot_start_says_why_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "recipes.service:app", "--port", "0"],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "DBOS_SYSTEM_DATABASE_URL": "postgresql://127.0.0.1:1/x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: the database (Postgres x on 127.0.0.1) cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
