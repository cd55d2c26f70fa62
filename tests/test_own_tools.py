"""Tools of one's own: long jobs, bugs, failures in the middle, results that cannot be used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NO_CACHE, PROJECT, wait_for

PAGE = (PROJECT / "docs" / "your-agent.md").read_text()
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
WEATHER = '''
class Weather(BaseModel):
    """What it is like outside."""

    place: str
    degrees: float = Field(ge=-100, le=100, description="Celsius")


class Advice(BaseModel):
    """The agent's answer."""

    coat: bool


@DBOS.step(timeout_seconds=30, preemptible=True)
async def fetch_weather(place: str) -> Weather:
    """Look up the weather.

    Args:
        place: The place's name.
    """
    print_in_step(f"fetch_weather looks out of the window{attempt()}")
    log = Path(__file__).with_name("window.log")
    with log.open("a") as lines:
        lines.write(idempotency_key("fetch_weather", place=place) + "\\n")
    while not log.with_name("open").exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return parse(Weather, {"place": place, "degrees": 3})


async def stand_in(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Answer in place of a model."""
    if len(messages) == 1:
        return ai.ModelResponse(parts=[ai.ToolCallPart("fetch_weather", {"place": "Oslo"})])
    return ai.ModelResponse(parts=[ai.ToolCallPart(info.output_tools[0].name, {"coat": True})])


DEFINITION = AgentDefinition(
    name="mine",
    instructions="Look up the weather, and give advice.",
    tools=[fetch_weather],
    output_type=Advice,
    offline_script=stand_in,
    program="mine.py",
)

'''


def build(folder: Path) -> Path:
    """Copy what an agent of one's own needs, and this test's `mine.py` stands beside it."""
    for name in ("agent.py", "config.py", "tools.py"):
        shutil.copy(PROJECT / name, folder)
    for name in ("durable", "demo"):
        shutil.copytree(PROJECT / name, folder / name, ignore=NO_CACHE)
    return folder


def start(mine: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {"PATH": os.environ["PATH"], "DEMO_LATENCY": "0", "DEMO_FAILURE_RATE": "0"}
    return subprocess.Popen(
        [sys.executable, "mine.py", *arguments],
        cwd=mine,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "result",
    [
        'Weather(place="half an emoji: \\ud83d", degrees=3)',
        '"half an emoji: \\ud83d"',
        "object()",
    ],
)
def test_a_result_that_cannot_be_sent_to_the_model_is_dropped_with_the_answer_that_asked_for_it(
    tmp_path: Path, result: str
) -> None:
    """A tool without `parse()` has returned it; the bug is mended before the rerun."""
    mine = build(tmp_path)
    good = WEATHER.replace("(place: str) -> Weather:", "(place: str) -> object:")
    bad = good.replace('parse(Weather, {"place": place, "degrees": 3})', result)
    assert bad != good != WEATHER
    (mine / "open").touch()
    (mine / "mine.py").write_text(HEAD + bad + FOOT)
    with start(mine, "Oslo") as failed:
        told = failed.communicate()[1]
    assert failed.returncode == 1
    assert re.search("PydanticSerializationError|a tool's result cannot be written as JSON", told)
    (mine / "mine.py").write_text(HEAD + good + FOOT)
    with start(mine, "Oslo") as mended:
        stdout, stderr = mended.communicate()
    assert mended.returncode == 0, stderr
    assert "resumes at step 1" in " ".join(stdout.split())


def test_a_question_of_another_kind_needs_its_script_and_a_text_is_an_answer_too(
    tmp_path: Path,
) -> None:
    mine = build(tmp_path)
    kind = """
async def stand_in(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    \"\"\"Answer in place of a model.\"\"\"
    return ai.ModelResponse(parts=[ai.TextPart("No coat.")])


DEFINITION = AgentDefinition(
    instructions="Give advice.",
    tools=agent.DEFINITION.tools,
    output_type=str,
    name="mine",
    offline_script=stand_in,
)
"""
    (mine / "mine.py").write_text(HEAD + kind.replace("    offline_script=stand_in,\n", "") + FOOT)
    with start(mine, "Oslo") as without:
        told = without.communicate()[1]
    assert told == "error: there is no model: give an API key, or write an offline script.\n"
    assert without.returncode == 2
    assert not (mine / "service.log").exists(), "no tool was called"
    (mine / "mine.py").write_text(HEAD + kind + FOOT)
    for _ in range(2):
        with start(mine, "Oslo") as done:
            stdout, stderr = done.communicate()
        assert done.returncode == 0, stderr
        assert "answer                  No coat.\n" in stdout


def test_a_tool_that_takes_long_is_killed_while_it_waits_and_starts_its_job_once(
    tmp_path: Path,
) -> None:
    mine = build(tmp_path)
    [tool] = re.findall(r"^```python\n(@DBOS\.step.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert "sleep_async(30)" in tool
    jobs = """
from pathlib import Path

LOG = Path(__file__).with_name("jobs.log")


def note(line: str) -> None:
    with LOG.open("a") as lines:
        lines.write(line + "\\n")


async def start(company_name: str, key: str) -> str:
    note(f"start {key}")
    return "job 1"


async def is_done(job: str) -> bool:
    note("ask")
    return LOG.with_name("done").exists()
"""
    brief = """
DEFINITION = AgentDefinition(
    instructions="Call every tool.",
    tools=[*agent.DEFINITION.tools, audit],
    output_type=tools.ResearchReport,
    name="mine",
    offline_script=agent.DEFINITION.offline_script,
)

"""
    (mine / "jobs.py").write_text(jobs)
    # A step is not retried here, so the wait may be short.
    tool = tool.replace("sleep_async(30)", "sleep_async(0.2)")
    (mine / "mine.py").write_text(HEAD + "import jobs\n\n\n" + tool + brief + FOOT)
    with start(mine, "Acme") as killed:
        wait_for(lambda: lines_of(mine / "jobs.log").count("ask") > 1, "two questions")
        killed.kill()
        killed.communicate()
    (mine / "done").touch()
    with start(mine, "Acme") as again:
        stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert "interrupted, resumes" in stdout
    assert len([line for line in lines_of(mine / "jobs.log") if line.startswith("start")]) == 1


def test_after_a_dropped_answer_another_call_at_the_same_number_is_no_repetition(
    tmp_path: Path,
) -> None:
    """Keys made of step numbers would let the service take the mail to c for the one to a."""
    mine = build(tmp_path)
    mails = '''
HERE = Path(__file__).parent


class Sent(BaseModel):
    """What became of a mail."""

    to: str


@DBOS.step(timeout_seconds=30, preemptible=True)
async def send_mail(to: str) -> Sent:
    """Send a mail."""
    key = idempotency_key("send_mail", to=to)
    with (HERE / "outbox.log").open("a+") as outbox:
        outbox.seek(0)
        if key not in outbox.read():  # the mail service honours keys
            outbox.write(f"{to} {key}\\n")
    return Sent(to=to)


async def stand_in(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Call for a and b in the first life, which is refused then, and for c and b in the second."""
    first_life = not (HERE / "second").exists()
    if len(messages) == 1:
        names = ["a", "b"] if first_life else ["c", "b"]
        return ai.ModelResponse(parts=[ai.ToolCallPart("send_mail", {"to": to}) for to in names])
    if first_life:
        rejected = ModelRequestRejectedError
        raise ModelHTTPError.for_category(rejected, status_code=422, model_name="stand-in")
    return ai.ModelResponse(parts=[ai.ToolCallPart(info.output_tools[0].name, {"to": "all"})])


DEFINITION = AgentDefinition(
    instructions="Send mails.",
    tools=[send_mail],
    output_type=Sent,
    name="mine",
    offline_script=stand_in,
)

'''
    errors = "from pydantic_ai.exceptions import ModelHTTPError, ModelRequestRejectedError"
    head = HEAD.replace("import agent\n", f"{errors}\n\nimport agent\n")
    (mine / "mine.py").write_text(head + mails + FOOT)
    with start(mine, "them") as refused:
        assert "status_code: 422" in refused.communicate()[1]
    assert refused.returncode == 1
    (mine / "second").touch()
    with start(mine, "them") as again:
        stdout, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert "resumes at step 1." in " ".join(stdout.split())
    assert [line.split()[0] for line in lines_of(mine / "outbox.log")] == ["a", "b", "c"]


CLEANING_UP = """
    try:
        await book(place)
    finally:
        await cancel(place)
"""
TRYING_AGAIN = """
    for _ in range(2):
        try:
            return await book(place)
        except ClosedError as error:
            last = error
            await DBOS.sleep_async(0.01)
    raise last
"""
SIDE_BY_SIDE = """
    await asyncio.gather(book(place), cancel(place))
"""


@pytest.mark.parametrize("body", [CLEANING_UP, TRYING_AGAIN, SIDE_BY_SIDE])
def test_a_run_goes_on_at_the_step_whose_error_ended_it_though_other_steps_have_followed(
    tmp_path: Path, body: str
) -> None:
    mine = build(tmp_path)
    tool = f'''
HERE = Path(__file__).parent


class ClosedError(Exception):
    """Nothing can be booked."""


@DBOS.step()
async def book(place: str) -> str:
    """Fail, in the first life."""
    with (HERE / "booked.log").open("a") as lines:
        lines.write("book\\n")
    if not (HERE / "mended").exists():
        while {body == SIDE_BY_SIDE} and not (HERE / "cancelled").exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        raise ClosedError("closed today")
    return "booked"


@DBOS.step()
async def cancel(place: str) -> str:
    """Succeed."""
    (HERE / "cancelled").touch()
    return "cancelled"


async def trip(place: str) -> str:
    """Plan a trip."""
{body.rstrip()}
    return "planned"


async def stand_in(messages: list[ai.ModelMessage], info: AgentInfo) -> ai.ModelResponse:
    """Answer in place of a model."""
    if len(messages) == 1:
        return ai.ModelResponse(parts=[ai.ToolCallPart("trip", {{"place": "Oslo"}})])
    return ai.ModelResponse(parts=[ai.TextPart("Done.")])


DEFINITION = AgentDefinition(
    instructions="Plan.", tools=[trip], output_type=str, name="mine", offline_script=stand_in
)
'''
    (mine / "mine.py").write_text(HEAD + tool + FOOT)
    with start(mine, "Oslo") as failed:
        told = failed.communicate()[1]
    assert "the run failed: ClosedError: closed today" in told
    tries = len(lines_of(mine / "booked.log"))
    (mine / "mended").touch()
    with start(mine, "Oslo") as mended:
        stderr = mended.communicate()[1]
    assert mended.returncode == 0, stderr
    assert len(lines_of(mine / "booked.log")) == tries + 1


def test_a_bug_and_an_error_that_is_caught_in_a_tool_of_several_steps_repeat_none_of_them(
    tmp_path: Path,
) -> None:
    mine = build(tmp_path)
    tool = '''
HERE = Path(__file__).parent


class DownError(Exception):
    """The first service is down."""


def note(line: str) -> None:
    """Tell that a step was executed."""
    with (HERE / "steps.log").open("a") as lines:
        lines.write(line + "\\n")


@DBOS.step()
async def ask_first(company_name: str) -> str:
    """Fail."""
    raise DownError("down")


@DBOS.step()
async def ask_second(company_name: str) -> str:
    """Answer in place of the first one."""
    note("second")
    return "95 %"


@DBOS.step()
async def file_it(company_name: str) -> str:
    """Wait to be killed, in the first life."""
    note("file")
    while not (HERE / "open").exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return company_name


async def rate(company_name: str) -> str:
    """Rate a company."""
    try:
        rating = await ask_first(company_name)
    except DownError:
        rating = await ask_second(company_name)
    await file_it(company_name)
    if not (HERE / "mended").exists():
        int(rating)  # the bug
    return rating


DEFINITION = AgentDefinition(
    instructions="Call every tool.",
    tools=[*agent.DEFINITION.tools, rate],
    output_type=tools.ResearchReport,
    name="mine",
    offline_script=agent.DEFINITION.offline_script,
)
'''
    (mine / "mine.py").write_text(HEAD + tool + FOOT)
    with start(mine, "Acme") as killed:
        wait_for(lambda: "file" in lines_of(mine / "steps.log"), "the last step")
        killed.kill()
        killed.communicate()
    (mine / "open").touch()
    with start(mine, "Acme") as failed:
        stdout, stderr = failed.communicate()
    assert "interrupted, resumes after 4 finished steps" in " ".join(stdout.split())
    assert "ValueError: invalid literal" in stderr
    (mine / "mended").touch()
    with start(mine, "Acme") as mended:
        stdout, stderr = mended.communicate()
    assert mended.returncode == 0, stderr
    assert lines_of(mine / "steps.log") == ["second", "file", "file"], "one was killed in flight"
    assert len(lines_of(mine / "service.log")) == 2
