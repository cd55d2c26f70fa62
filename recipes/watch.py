"""Watch a run survive, in a browser: `uv run --group service -m recipes.watch`.

It serves recipes/service.py and one page, watch.html: start a run, kill the server in the middle,
and see the same run go on. This process only listens, and starts the server again when a signal has
killed it. What the browser asks meanwhile waits at the socket, which this process keeps open.

Traps:
- The page has a button that kills. So only this computer reaches it, and only its own page: see
  `OwnPageOnly`. A service for others is recipes/service.py, which has neither page nor button.
- What a model or a service wrote is text on the page. It must never become HTML.
- A browser that is refused at once may not try again (Firefox). That is why the socket stays open.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, PlainTextResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from agent import DEFINITION
from config import load_settings
from demo.service import service as company_data
from durable import DurableError
from durable.console import print_line, run_command
from recipes import listing, service

ADDRESS = "127.0.0.1"
# The browser helps: nothing is loaded from elsewhere, no text can become HTML (trusted types), and
# no other website can lay the page under its own and let a person click on it.
POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;"
    " require-trusted-types-for 'script'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

# ---------------------------------------------------------------- the server


class OwnPageOnly:
    """Refuse what another website sends through the browser of the person who watches.

    A page of another website can send requests to this address: then `Origin` names that website.
    Or its own name is made to lead to this address (DNS rebinding): then `Host` is that name.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before an application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what the page itself sends, and what is no request."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        host = headers.get("host", "")
        own = host.rpartition(":")[0] in (ADDRESS, "localhost")
        own = own and headers.get("origin") in (None, f"http://{host}")
        if own or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            refusal = f"only the page of http://{ADDRESS} is answered\n"
            await PlainTextResponse(refusal, 403)(scope, receive, send)


def end_with_the_parent() -> None:
    """End when the process that watches over this one has ended: its end of the pipe closes."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start with the server, and run the service beside the page."""
    app.state.began_ms = time.time() * 1000  # since 1970, as DBOS stores it
    app.state.armed = False
    logging.getLogger("dbos").addHandler(logging.NullHandler())  # or DBOS prints its log
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    async with service.lifespan(service.app):
        yield


app = FastAPI(lifespan=lifespan, openapi_url=None)
app.add_middleware(OwnPageOnly)
app.exception_handler(SQLAlchemyError)(service.tell_that_the_database_fails)


@app.get("/")
def get_page() -> HTMLResponse:
    """Send the page."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
    page = Path(__file__).with_suffix(".html").read_text("utf-8")
    return HTMLResponse(page, headers=headers)


@app.get("/process")
def get_process() -> dict[str, object]:
    """Tell who answers. To this process, a step that finished before `began_ms` is restored."""
    return {"pid": os.getpid(), "began_ms": app.state.began_ms, "armed": app.state.armed}


@app.get("/runs")
def get_runs() -> list[dict[str, object]]:
    """List the newest runs of the person who watches."""
    executor, settings = service.app.state.executor, service.app.state.settings
    newest = executor.client.list_workflows(
        name=DEFINITION.workflow_name, sort_desc=True, limit=20, load_input=False
    )
    own = [run for run in newest if listing.asker_of(run) == settings.asker]
    return [
        {**listed.as_data(), "words": listing.attributes_of(listed.run)["words"]}
        for listed in listing.list_runs(executor, settings, own)
    ]


@app.post("/kill/{pid}")
def kill(pid: int) -> dict[str, bool]:
    """Kill this process by SIGKILL in its next flaky lookup; if that is awaited already, now.

    A browser that is cut off may send the same request again, which must not hit the next process.
    """
    if pid != os.getpid():
        raise HTTPException(409, "that process has ended")
    if not app.state.armed:  # this `if` goes with demo/: the real service cannot be told to kill
        app.state.armed = company_data.crash = True
        return {"armed": True}
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(137)  # as process 1 of a container, no process can kill itself


app.mount("/", service.app)  # last, because it answers every path that is left

# ---------------------------------------------------------------- the process above it


def watch_over(listener: socket.socket) -> int:
    """Start the server again whenever a signal has killed it; return the last exit code."""
    number = listener.fileno()
    command = [sys.executable, "-m", "uvicorn", "recipes.watch:app", "--log-level", "warning"]
    # A run ends after six seconds by default, which is short for a person who looks for a button.
    environment = {"DEMO_LATENCY": "2", **os.environ}
    asked: list[int] = []
    server: subprocess.Popen[bytes] | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if server:
            server.terminate()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    while not asked:
        server = subprocess.Popen(  # noqa: S603 - the command is the one above
            [*command, "--fd", str(number)],
            env=environment,
            stdin=subprocess.PIPE,
            pass_fds=[number],
            process_group=0,  # Ctrl-C in the terminal is for this process, which asks that one
        )
        with server:
            print_line(f"Process {server.pid} begins.")
            if asked:  # while that process was being made
                server.terminate()
            code = server.wait()
        if code >= 0 and not asked:
            return code  # the server has said why
        if not asked:
            print_line(f"Process {server.pid} was killed by {signal.Signals(-code).name}.")
    return 130 if signal.SIGINT in asked else 0


def main() -> int:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Watch runs, kill their server, see them go on.")
    parser.add_argument("--port", type=int, default=8000, help="of 127.0.0.1 (8000)")
    options = parser.parse_args()
    load_settings()  # an unfit one is told before anything starts
    try:
        listener = socket.create_server((ADDRESS, options.port))
    except (OSError, OverflowError) as error:
        raise DurableError(f"port {options.port} cannot be used, try --port: {error}") from None
    print_line(f"Open http://{ADDRESS}:{listener.getsockname()[1]} in a browser. Ctrl-C ends this.")
    return watch_over(listener)


if __name__ == "__main__":  # it defines no step and no stored type, so it may run as `__main__`
    sys.exit(run_command(main))
