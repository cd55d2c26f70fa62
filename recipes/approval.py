"""A person says yes or no: `uv run -m recipes.approval "Acme"`.

A third tool sends an e-mail (here: a line in outbox.txt, beside agent.py) after a person has said
yes. The run waits, for days if need be, in a process or in none: end the command if you like. It
prints what to answer, and any process that reaches the database can:

    uv run -m recipes.approval --answer RUN CALL yes
    uv run -m recipes.approval --answer RUN CALL no "not this year"

Then the first command goes on; or run it again. It prints the question again, because `ask()` is
code of the workflow, which runs from the top after each crash. What it has received is stored.

Traps:
- Events and messages are steps too: add a question, and the numbers of later steps change.
- `DBOS.recv` waits for a minute by default, and must not be called in a step.
- Rewinding a failed run deletes answers that it has not received. So a failed run takes none.
- A waiting run holds one of the ten places of its process.
- Pydantic AI's `RequestInput` does not work under DBOS.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import sqlalchemy
from dbos import DBOS
from pydantic_ai import DeferredToolRequests, DeferredToolResults, RunContext, Tool, ToolDenied
from pydantic_ai import messages as ai
from pydantic_ai.capabilities import HandleDeferredToolCalls

import agent
import config
import tools
from config import Settings
from tools import Brief, ResearchError, print_line

if __name__ == "__main__":
    # Run with -m, this file is `__main__`, and no other program could load what is stored of its
    # types. So it imports itself by its own name, before anything is defined.
    name = __spec__.name if __spec__ else Path(__file__).stem
    sys.exit(agent.run_command(import_module(name).main))

PATIENCE = 30 * 24 * 3600
"""Seconds for which a run waits for an answer. Then none means no."""


@DBOS.step(timeout_seconds=30, preemptible=True)
async def notify_sales(company_name: str) -> str:
    """Tell the sales team by e-mail that this company is worth a call.

    Args:
        company_name: The company's full name, as the user gave it.
    """
    tools.print_in_step("notify_sales sends the e-mail")
    key = tools.idempotency_key("notify_sales", company_name=company_name)
    # A stand-in for a mail service, which honours the key: it sends once, however often it is told.
    with (config.PROJECT / "outbox.txt").open("a+") as outbox:
        outbox.seek(0)
        if key not in outbox.read():
            outbox.write(f"{key} sales@example.com: {company_name}\n")
    return "sent"


def name_of(call: ai.ToolCallPart, history: Sequence[object]) -> str:
    """Name a call by its place in the history, too: a provider may use its own IDs once more.

    What a provider sends as an ID could also be a command of the shell that the answer is typed in.
    """
    number = sum(isinstance(message, ai.ModelResponse) for message in history)
    arguments = call.args_as_json_str()
    return config.digest_of([f"{number}", call.tool_call_id, call.tool_name, arguments])


async def ask(context: RunContext[None], requests: DeferredToolRequests) -> DeferredToolResults:
    """Wait until a person has answered each call that needs approval: code of the workflow."""
    names = {call.tool_call_id: name_of(call, context.messages) for call in requests.approvals}
    for call in requests.approvals:
        question = f"may the model call {call.tool_name}({call.args_as_json_str()})?"
        name = names[call.tool_call_id]
        await DBOS.set_event_async(name, question)  # so that other programs find it
        print_line(f"  {question}")
        print_line(f"  answer: uv run -m recipes.approval --answer {DBOS.workflow_id} {name} yes")
        print_line("  or, in place of yes: no, and a reason")
    answers: dict[str, bool | ToolDenied] = {}
    for call in requests.approvals:
        said = await DBOS.recv_async(names[call.tool_call_id], timeout_seconds=PATIENCE)
        denied = ToolDenied(f"A person says no: {said or 'nobody has answered'}")
        answers[call.tool_call_id] = True if said is True else denied
        print_line("  the answer is yes" if said is True else f"  {denied.message}")
    return requests.build_results(approvals=answers)


BRIEF = Brief(
    instructions="""\
You research companies. Call fetch_company_overview first and fetch_financial_metrics second.
Then call notify_sales: a person decides whether the e-mail is sent, and an answer of no is final.
Then write the report from what the first two returned, and from nothing else.""",
    tools=[*tools.BRIEF.tools, Tool(notify_sales, requires_approval=True)],
    output_type=tools.ResearchReport,
    recipe="approval",
)
CAPABILITIES = [HandleDeferredToolCalls[None](ask)]


def answer(run_id: str, call_id: str, word: str, reason: str) -> None:
    """Send a person's answer to the run, whether a process executes it or not.

    Raises:
        ResearchError: Nothing waits for it; the text says why.
    """
    settings = config.load_settings()
    client, locks = config.open_database(settings)
    try:
        runs = client.list_workflows(workflow_ids=[run_id], load_input=False, load_output=False)
        if not runs:
            raise ResearchError(f"no run {run_id} is stored in this database.")
        if client.get_event(run_id, call_id, timeout_seconds=0) is None:
            raise ResearchError(f"run {run_id} has not asked about a call {call_id}.")
        # By its idempotency key, DBOS would drop a second answer, and not say so.
        if not locks.take(call_id) or is_answered(settings, run_id, call_id):
            raise ResearchError(f"call {call_id} has received its answer: the first one counts.")
        if runs[0].status in ("SUCCESS", "ERROR"):
            raise ResearchError(f"run {run_id} does not wait. If it failed, run its command first.")
        said = word == "yes" or reason or "no reason was given"
        client.send(run_id, said, topic=call_id, idempotency_key=call_id)
    except config.DATABASE_ERRORS as error:
        raise config.database_error(settings, error) from error
    print_line(f"sent to run {run_id}: {word}")


def is_answered(settings: Settings, run_id: str, call_id: str) -> bool:
    """Tell whether an answer is stored, received or not: DBOS has no function for that."""
    schema = "" if settings.database_url.drivername == "sqlite" else "dbos."
    where = "WHERE destination_uuid = :run AND topic = :call"
    query = sqlalchemy.text(f"SELECT 1 FROM {schema}notifications {where}")  # noqa: S608
    with sqlalchemy.create_engine(settings.database_url).connect() as connection:
        return bool(connection.scalar(query, {"run": run_id, "call": call_id}))


def main(build: Callable[..., object] = agent.build_agent) -> int:
    """Bring the run of one company to its end, or send it the answer that it waits for."""
    parser = agent.make_parser("Research a company, with an e-mail that a person approves.")
    parser.add_argument("--answer", nargs="+", metavar="WORD", help="RUN CALL yes|no [REASON]")
    options = parser.parse_args()
    if options.answer is None:
        return agent.research_company(options, BRIEF, partial(build, capabilities=CAPABILITIES))
    if len(options.answer) < 3 or options.answer[2] not in ("yes", "no"):
        parser.error("--answer takes RUN CALL yes|no [REASON]: no other word is an answer")
    run_id, call_id, word, *reason = options.answer
    answer(run_id, call_id, word, " ".join(reason))
    return 0
