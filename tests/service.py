"""The research agent as a web service: it answers at once, and resumes what it had begun.

    uv run --with fastapi --with uvicorn uvicorn service:app

Each request for a report is a run in the shared queue of the model, so several of these services,
and workers, can share one database.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dbos import DBOS
from fastapi import FastAPI, HTTPException, Response

import tools
from agent import (
    GRACE,
    LOOK,
    Executor,
    decide,
    is_alive,
    is_open,
    read_report,
    succeeded,
    take_over,
)
from config import ResearchError, derive_run_id, load_settings


def start() -> Executor:
    """Become an executor of the shared queue, which takes up what is enqueued there."""
    tools.progress.show = "nothing"
    settings = load_settings()
    executor = Executor(settings, settings.queue)
    executor.launch()
    return executor


async def resume_for_ever(executor: Executor) -> None:
    """Resume what dead processes have begun: an earlier life of this service, or another one."""
    while True:
        await asyncio.to_thread(take_over, executor)
        await asyncio.sleep(LOOK)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start with the service, and give runs in flight some seconds when it is stopped."""
    app.state.executor = await asyncio.to_thread(start)
    task = asyncio.create_task(resume_for_ever(app.state.executor))
    yield
    task.cancel()
    await asyncio.to_thread(DBOS.destroy, workflow_completion_timeout_sec=GRACE)


app = FastAPI(lifespan=lifespan)


# These are plain functions, which FastAPI runs in threads, because `DBOSClient` blocks.
@app.post("/reports/{company:path}", status_code=202)
def post(company: str, response: Response) -> dict[str, str]:
    """Start or resume a run; 422 for a name that is unfit, 409 for a run of another version."""
    executor: Executor = app.state.executor
    try:
        request = executor.settings.request(company)
    except ResearchError as error:
        raise HTTPException(422, str(error)) from error
    run_id = derive_run_id(request)
    try:
        decide(executor, request, run_id)
    except ResearchError as error:
        raise HTTPException(409, "this report was begun by another version") from error
    response.headers["Location"] = f"/reports/{run_id}"
    return {"report": f"/reports/{run_id}"}


@app.get("/reports/{run_id}")
def get(run_id: str, response: Response) -> dict[str, object]:
    """Tell the state, or the report; 404 for an unknown run, 502 for one that failed."""
    executor: Executor = app.state.executor
    run = executor.look([run_id], load_output=True).get(run_id)
    if run is None:
        raise HTTPException(404, "there is no such report")
    if succeeded(run):
        try:
            return {"state": "finished", "report": read_report(run).model_dump()}
        except ResearchError as error:
            raise HTTPException(409, "this report was written by another version") from error
    if not is_open(run):
        raise HTTPException(502, "the research has failed; POST again to resume it")
    response.status_code = 202
    if run.status == "PENDING" and not is_alive(executor, run):
        return {"state": "interrupted: a worker or another POST resumes it"}
    return {"state": "in progress"}
