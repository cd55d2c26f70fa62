"""The research agent as a web service: it answers at once, and resumes what it had begun.

    uv run --group service uvicorn recipes.service:app

- `POST /reports/Acme` starts or resumes a run: 202 and where the report will be, 422 for an unfit
  name, 409 if the run cannot go on with this code. Any answer is 503 while the database is away.
- `GET /reports/RUN_ID`: 200 and the report, 202 and the state, 404, 502 if the run has failed, 409
  if older code has stored a report of another type.
- `GET /runs/RUN_ID/events`: server-sent events, one for each finished step and one for the end.

A run is in the shared queue of `recipes.worker`, so several services and workers can share one
database. In a browser, `new EventSource("/runs/RUN_ID/events")` connects again by itself, also to a
service that was killed and started again, and tells with `Last-Event-ID` what it has seen. It
misses nothing and sees nothing twice. Nobody is asked who they are: put this behind what does that.
"""

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import FrameType
from typing import Annotated, Any

from dbos import StepInfo, WorkflowStatus
from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError

import config
import tools
from agent import OPEN, Executor, Waiting, write_error
from recipes import worker
from recipes.worker import Worker
from tools import ResearchError

POLL = 0.5
"""Seconds between two looks for the steps of a run that somebody watches."""
END = "end"
"""The ID of the event for the end of a run."""


def start() -> Worker:
    """Become a worker, which takes up what is in the shared queue."""
    tools.output.show = "nothing"
    return Worker(worker.make_executor(config.load_settings()))


async def take_over_for_ever(serving: Worker) -> None:
    """Resume what dead processes have begun: an earlier life of this service, or another one."""

    def look() -> None:
        with serving.waiting.while_the_database_is_away():
            serving.take_over()

    try:
        while True:
            await asyncio.to_thread(look)
            await asyncio.sleep(worker.LOOK)
    except ResearchError as error:  # it cannot go on: whoever has started it, starts it again
        write_error(f"error: {error}\n")
        signal.raise_signal(signal.SIGTERM)


def end_streams_by_signal(stopping: threading.Event) -> None:
    """Let streams of events end when the service is stopped: uvicorn waits for all answers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        stop = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, stop: Any = stop) -> None:
            stopping.set()
            stop(number, frame)

        with suppress(ValueError):  # only the main thread may do it: a test client is in another
            signal.signal(number, handle)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start with the service, and give runs in flight some seconds when it is stopped."""
    app.state.stopping = threading.Event()
    end_streams_by_signal(app.state.stopping)
    try:
        serving = await asyncio.to_thread(start)
    except ResearchError as error:  # uvicorn would show a traceback
        write_error(f"error: {error}\n")
        os._exit(error.exit_code)
    app.state.executor = serving.executor
    task = asyncio.create_task(take_over_for_ever(serving))
    yield
    task.cancel()
    await asyncio.to_thread(serving.stop)


app = FastAPI(lifespan=lifespan)


@app.exception_handler(SQLAlchemyError)
def tell_that_the_database_fails(_request: Request, _error: SQLAlchemyError) -> Response:
    """Answer what can be asked again."""
    return JSONResponse({"detail": "the database cannot be used now: ask again"}, 503)


# FastAPI runs these plain functions in threads, because `DBOSClient` blocks.
@app.post("/reports/{company:path}", status_code=202)
def post(company: str, response: Response) -> dict[str, str]:
    """Start a run, or resume it, unless somebody has it in hand."""
    executor: Executor = app.state.executor
    try:
        request = executor.request(company)
    except ResearchError as error:
        raise HTTPException(422, str(error)) from error
    try:
        worker.prepare(executor, request.run_id, request)
    except ResearchError as error:
        raise HTTPException(409, str(error)) from error
    report, events = f"/reports/{request.run_id}", f"/runs/{request.run_id}/events"
    response.headers["Location"] = report
    return {"report": report, "events": events}


@app.get("/reports/{run_id}")
def get_report(run_id: str, response: Response) -> dict[str, object]:
    """Tell the report, or the state."""
    executor, run = app.state.executor, find(run_id)
    if run.status == "SUCCESS":
        try:
            report = executor.brief.read_report(run_id, run.output)
        except ResearchError as error:
            raise HTTPException(409, str(error)) from error
        return {"state": "finished", "report": report}
    if run.status not in OPEN:
        raise HTTPException(502, "the research has failed; POST again to resume it")
    response.status_code = 202
    if run.status == "PENDING" and not executor.is_in_hand(run):
        return {"state": "interrupted: a worker or another POST resumes it"}
    return {"state": "in progress"}


def find(run_id: str) -> WorkflowStatus:
    """Return a run; 404 if there is none."""
    executor: Executor = app.state.executor
    if run := executor.look(run_id):
        return run
    raise HTTPException(404, "there is no such run")


@app.get("/runs/{run_id}/events")
def get_events(run_id: str, last_event_id: Annotated[str, Header()] = "") -> Response:
    """Send an event for each step as it finishes; 204 after the end: do not connect again."""
    find(run_id)
    if last_event_id == END:
        return Response(status_code=204)
    return StreamingResponse(stream(run_id, last_event_id), media_type="text/event-stream")


async def stream(run_id: str, seen: str) -> AsyncIterator[str]:
    """Yield the events that follow the one with the ID `seen`."""
    waiting = Waiting(app.state.executor)
    while not app.state.stopping.is_set():
        found = await asyncio.to_thread(read, waiting, run_id)
        for step in unseen(found[1] if found else [], seen):
            seen = event_id(step)
            yield event(seen, "step", number=step["function_id"], name=step["function_name"])
        if found and found[0] not in OPEN:
            yield event(END, "end", state="finished" if found[0] == "SUCCESS" else "failed")
            return
        await asyncio.sleep(POLL)


def read(waiting: Waiting, run_id: str) -> tuple[str, list[StepInfo]] | None:
    """Return the status of a run and its finished steps; None while the database is away."""
    with waiting.while_the_database_is_away():
        # The run first: when it has ended, all its steps are stored.
        run = waiting.executor.look(run_id)
        steps = waiting.executor.client.list_workflow_steps(run_id)
        finished = [step for step in steps if step["error"] is None]
        return (run.status if run else "DELETED"), finished
    return None


def unseen(steps: list[StepInfo], seen: str) -> list[StepInfo]:
    """Return the steps that follow the one with this event ID.

    If that one is not there any more, a rewind has dropped it, and perhaps some before it: those
    that took their places finished later.
    """
    number, _, moment = seen.partition("-")
    if any(event_id(step) == seen for step in steps):
        return [step for step in steps if step["function_id"] > int(number)]
    since = int(moment) if moment.isdecimal() and len(moment) < 20 else 0
    return [step for step in steps if (step["completed_at_epoch_ms"] or 0) > since]


def event_id(step: StepInfo) -> str:
    """Return the step's number, and when it finished: after a rewind, another step has the number.

    Without the time nobody could tell which of the two a browser has seen that comes back later.
    """
    return f"{step['function_id']}-{step['completed_at_epoch_ms']}"


def event(event_id: str, kind: str, **data: object) -> str:
    """Return an event as it is sent."""
    return f"id: {event_id}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"
