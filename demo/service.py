"""A simulated company-data service, which fails, takes its time, and keeps a bill.

The service reads its settings (`DEMO_…`) itself, when a program calls `read_settings()`. They
belong to the process and are read when a step runs. In the agent's `deps` they would be stored with
the run, and `crash` would kill every recovery as well.
"""

import argparse
import asyncio
import hashlib
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dbos import DBOS

from durable.identity import clean_number
from durable.steps import print_in_step

PROJECT = Path(__file__).resolve().parent.parent


class RateLimitError(Exception):
    """The service answered 429, too many requests."""


class UnknownCompanyError(Exception):
    """The service knows no company of this name."""


@dataclass
class SimulatedService:
    """The service as this process sees it."""

    failure_rate: float = 0.0
    """The share of attempts at which the flaky lookup fails."""
    latency: float = 0.0
    """Seconds that an answer takes."""
    crash: bool = False
    """Whether the flaky lookup kills this process after it has acted."""
    idempotent: bool = True
    """Whether it honours idempotency keys. Many services do not."""
    bill: Path | None = None
    """Where it notes each lookup: a line with the key, and what it did. It is the outside world."""

    def read_settings(self) -> None:
        """Read the environment; raise `DurableError` for a value that cannot be used."""
        self.failure_rate = _read_number("DEMO_FAILURE_RATE", "0.5", highest=1)
        self.latency = _read_number("DEMO_LATENCY", "1.0", highest=10)
        self.idempotent = _read_number("DEMO_IDEMPOTENT", "1", highest=1) != 0
        self.bill = PROJECT / _read("DEMO_BILL", "service.log")

    def add_option(self, parser: argparse.ArgumentParser) -> None:
        """Give a command the option `--crash`, which sets `crash`."""
        service = self

        class Crash(argparse.Action):
            def __call__(self, *_: object) -> None:
                service.crash = True

        what = "die by SIGKILL in the flaky tool"
        parser.add_argument("--crash", action=Crash, nargs=0, help=what)

    async def overview(self, company_name: str, key: str) -> dict[str, Any]:
        """Answer what a company is; raise `UnknownCompanyError` for a name without a letter."""
        figures = await self._find(company_name)
        self._act(key)
        return {
            "company_name": company_name,
            "industry": figures.choice(["quantum hardware", "logistics", "biotech", "robotics"]),
            "founded_year": figures.randint(1950, 2020),
            "employees": figures.randint(50, 20_000),
        }

    async def financials(self, company_name: str, key: str) -> dict[str, Any]:
        """Answer a company's figures, or fail as real services do."""
        figures = await self._find(company_name)
        payload = {
            "company_name": company_name,
            "revenue_usd_millions": round(figures.uniform(5, 5_000), 1),
            "revenue_growth_percent": round(figures.uniform(-20, 60), 1),
            "net_margin_percent": round(figures.uniform(-30, 35), 1),
        }
        # An outage comes before the service acts, and follows from the company and the attempt, so
        # that everybody sees the same. At any rate below 1 the last attempt succeeds.
        status = DBOS.step_status
        attempt = (status.current_attempt or 0) + 1 if status else 1
        last = attempt == (status.max_attempts if status else None)
        dice = random.Random(f"{company_name.casefold()} attempt {attempt}")
        if dice.random() < self.failure_rate and (self.failure_rate == 1 or not last):
            outage = dice.choice([ConnectionResetError, RateLimitError, TimeoutError, None])
            if outage is None:
                return {**payload, "revenue_usd_millions": "n/a"}
            raise outage("simulated outage")
        self._act(key)
        self.crash_if_told()
        return payload

    def crash_if_told(self) -> None:
        """Kill this process, after the flaky lookup has acted, if the command line says so."""
        if self.crash:
            print_in_step("the service has acted, and nothing is stored yet: now SIGKILL")
            os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)  # as process 1 of a container, no process can kill itself

    async def _find(self, company_name: str) -> random.Random:
        await asyncio.sleep(self.latency)
        if not any(character.isalnum() for character in company_name):
            raise UnknownCompanyError(f"no company is known as {company_name!r}")
        # A company has the same figures in every process.
        return random.Random(hashlib.sha256(company_name.casefold().encode()).digest())

    def _act(self, key: str) -> None:
        """Note the lookup in the bill, unless one with this key is there already."""
        if self.bill is None:
            return
        with self.bill.open("a+") as bill:
            bill.seek(0)
            known = self.idempotent and any(line.startswith(f"{key} billed") for line in bill)
            bill.write(f"{key} {'answered from the record' if known else 'billed'}\n")
        if known:
            print_in_step("the service knows this key, answers from its record, bills nothing")


service = SimulatedService()
"""The service that the tools call."""


def _read(name: str, default: str) -> str:
    return os.environ.get(name, "").strip() or default


def _read_number(name: str, default: str, highest: int) -> float:
    return clean_number(name, _read(name, default), highest)
