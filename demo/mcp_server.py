"""A company-data server that somebody else runs, simulated: an MCP server on stdin and stdout.

It knows nothing of DBOS, of runs and of this project. A client that wants its call to be billed
once sends an idempotency key beside the arguments.
"""

import asyncio
import hashlib
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.shared.exceptions import MCPError

server = MCPServer("company-data", version="1", log_level="ERROR")
_attempts: Counter[str] = Counter()


@server.tool()
async def fetch_company_overview(company_name: str, context: Context[Any]) -> dict[str, Any]:
    """Look up what a company does, its age and its size.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    figures = await find(company_name)
    bill(context)
    return {
        "company_name": company_name,
        "industry": figures.choice(["quantum hardware", "logistics", "biotech", "robotics"]),
        "founded_year": figures.randint(1950, 2020),
        "employees": figures.randint(50, 20_000),
    }


@server.tool()
async def fetch_financial_metrics(company_name: str, context: Context[Any]) -> dict[str, Any]:
    """Look up a company's revenue, growth and margin.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    figures = await find(company_name)
    _attempts[key_of(context)] += 1
    # An outage follows from the company and the attempt, so that everybody sees the same.
    dice = random.Random(f"{company_name.casefold()} {_attempts[key_of(context)]}")
    if dice.random() < float(setting("DEMO_FAILURE_RATE", "0.5")):
        raise MCPError(-32000, "simulated outage")  # of the protocol: the client may try again
    bill(context)
    return {
        "company_name": company_name,
        "revenue_usd_millions": round(figures.uniform(5, 5_000), 1),
        "revenue_growth_percent": round(figures.uniform(-20, 60), 1),
        "net_margin_percent": round(figures.uniform(-30, 35), 1),
    }


async def find(company_name: str) -> random.Random:
    """Return a company's figures; raise `ToolError`, which the model reads, for an unfit name."""
    await asyncio.sleep(float(setting("DEMO_LATENCY", "1.0")))
    if not any(character.isalnum() for character in company_name):
        raise ToolError(f"no company is known as {company_name!r}: check the name and call again")
    return random.Random(hashlib.sha256(company_name.casefold().encode()).digest())


def bill(context: Context[Any]) -> None:
    """Note a call in the bill, unless one with its key is there already."""
    key = key_of(context)
    folder = Path(__file__).resolve().parent.parent
    with (folder / setting("DEMO_BILL", "service.log")).open("a+") as lines:
        lines.seek(0)
        known = any(line.startswith(f"{key} billed") for line in lines)
        known = known and setting("DEMO_IDEMPOTENT", "1") != "0"
        lines.write(f"{key} {'answered from the record' if known else 'billed'}\n")


def key_of(context: Context[Any]) -> str:
    """Return the idempotency key that the client has sent; without one, each call is another."""
    meta: dict[str, Any] = {**(context.request_context.meta or {})}
    return str(meta.get("idempotency_key", f"request-{os.getpid()}-{context.request_id}"))


def setting(name: str, default: str) -> str:
    """Return a setting, which the client has checked."""
    return os.environ.get(name, "").strip() or default


if __name__ == "__main__":
    server.run("stdio")
