"""A tool and its types in a module whose annotations are texts."""

from __future__ import annotations

from dataclasses import dataclass

from child import note
from dbos import DBOS
from pydantic import BaseModel, Field


@dataclass
class Part:
    number: int


class Answer(BaseModel):
    name: str = Field(alias="companyName")
    parts: list[Part] = []


@DBOS.step()
async def look_up_later(company_name: str) -> Answer:
    """Look up a company."""
    note(f"effect tool {DBOS.workflow_id}:{DBOS.step_id}")
    return Answer(companyName=company_name, parts=[Part(1)])
