"""Tools of one's own: long jobs, bugs, failures in the middle, results that cannot be used."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, wait_for

RECIPES = (PROJECT / "recipes" / "README.md").read_text()
HEAD = '''"""Ask for the weather: `python mine.py Oslo`."""

import asyncio
import sys
from pathlib import Path

from dbos import DBOS
from pydantic import BaseModel, Field
from pydantic_ai import messages as ai
from pydantic_ai.models.function import AgentInfo

import agent
import tools
from durable import AgentDefinition, attempt, idempotency_key, parse, print_in_step
from durable.console import run_command

if __name__ == "__main__":
    import mine  # by its name, or no other program could load what is stored of its types

    sys.exit(run_command(mine.main))

'''
FOOT = '''

def main() -> int:
    """Bring the run of one question to its end, and print its report."""
    return agent.answer(agent.make_parser("Ask.").parse_args(), DEFINITION)
'''
