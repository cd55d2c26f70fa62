"""A tool of your own: `METRICS_URL=https://… uv run -m recipes.own_tool "Acme"`.

An HTTP client takes the place of the flaky tool. It sends `GET METRICS_URL?name=Acme`; your server
answers with the fields of `FinancialMetrics`. METRICS_URL is read like every other setting, from
the environment or from `.env`. `--crash` and `DEMO_…` act only in the simulated service.

Traps:
- `@DBOS.step` makes a tool a step. A plain function would run again after each crash.
- The errors that are retried are *your client's*. httpx2's are no `ConnectionError`.
- What a step raises is stored. httpx2's errors hold the request with its headers, an API key among
  them, and its `HTTPStatusError` cannot be unpickled. So errors of your own are raised instead.
- No client, key or connection in `deps` or in a tool's arguments: those are stored, too. Read what
  belongs to the process when the step runs, as METRICS_URL is here.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import httpx2
from dbos import DBOS
from dbos import error as dbos_error
from pydantic_ai import ModelRetry
from pydantic_ai.capabilities import AbstractCapability

import agent
import tools
from config import Settings
from tools import Brief, FinancialMetrics, MalformedPayloadError, ResearchError

if __name__ == "__main__":
    # Run with -m, this file is `__main__`, and no other program could load what is stored of its
    # types. So it imports itself by its own name, before anything is defined.
    name = __spec__.name if __spec__ else Path(__file__).stem
    sys.exit(agent.run_command(import_module(name).main))


class UnavailableError(Exception):
    """The service could not be reached, or wants to be asked later."""


class RefusedError(Exception):
    """The service will not answer this request, however often it is asked."""


TRANSIENT = (UnavailableError, MalformedPayloadError, dbos_error.DBOSStepTimeoutError)


@DBOS.step(
    timeout_seconds=30,
    preemptible=True,
    **tools.retry(TRANSIENT, attempts=10, first_wait=0.5, backoff=1.5),
)
async def fetch_metrics_by_http(company_name: str) -> FinancialMetrics:
    """Look up a company's revenue, growth and margin.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    tools.print_in_step(f"fetch_metrics_by_http calls the service{tools.attempt()}")
    key = tools.idempotency_key("fetch_metrics_by_http", company_name=company_name)
    try:
        async with httpx2.AsyncClient(timeout=20) as client:  # less than timeout_seconds
            response = await client.get(
                os.environ["METRICS_URL"],
                params={"name": company_name},
                headers={"Idempotency-Key": key},
            )
    except httpx2.RequestError as error:  # refused, cut, timed out, garbled
        raise UnavailableError(f"{type(error).__name__}: {error}") from None
    if response.status_code == 404:  # it goes back to the model, which can mend it: no retry
        raise ModelRetry(f"no company is known as {company_name!r}: check the name and call again")
    if response.status_code == 429 or response.status_code >= 500:
        raise UnavailableError(f"status {response.status_code}")
    if not response.is_success:
        raise RefusedError(f"status {response.status_code}")
    try:
        payload = response.json()
    except ValueError:  # its text quotes the payload, and the checkpoint would, too
        raise MalformedPayloadError("the answer is not JSON") from None
    return tools.parse(FinancialMetrics, payload)


BRIEF = Brief(
    instructions="""\
You research companies. Call fetch_company_overview first and fetch_metrics_by_http second.
Then write the report from what they returned, and from nothing else.""",
    tools=[tools.fetch_company_overview, fetch_metrics_by_http],
    output_type=tools.ResearchReport,
    recipe="own_tool",
)


def build(
    settings: Settings, brief: Brief, capabilities: Sequence[AbstractCapability[None]] = ()
) -> object:
    """Build the agent, before its run is stored; raise `ResearchError` without an address."""
    try:
        scheme = httpx2.URL(os.environ.get("METRICS_URL", "")).scheme
    except httpx2.InvalidURL:  # its text may quote a part of a password
        scheme = ""
    if scheme not in ("http", "https"):
        raise ResearchError(
            "METRICS_URL is not set to an address: give one with http:// or https://"
        )
    return agent.build_agent(settings, brief, capabilities)


def main() -> int:
    """Bring the run of one company to its end, and print its report."""
    options = agent.make_parser("Research a company, with a tool that calls a server.").parse_args()
    return agent.research_company(options, BRIEF, build)
