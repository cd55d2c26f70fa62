"""What the two pages say is run here, and compared: README.md and recipes/README.md.

What a command prints is what the page shows, but for process numbers, seconds and random IDs.
"""

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, App, wait_for

MODULES = ("agent.py", "tools.py", "config.py")
README = (PROJECT / "README.md").read_text()
RECIPES = (PROJECT / "recipes" / "README.md").read_text()
PAGES = {"README.md": README, "recipes/README.md": RECIPES}
FILES = [PROJECT / name for name in MODULES] + sorted((PROJECT / "recipes").glob("*.py"))
CODE = "".join(path.read_text() for path in FILES)


def commands(page: str) -> list[tuple[str, str]]:
    """Return each command that a page shows, with what it shows of its output."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            found.append((command, shown))
    return found


def masked(text: str) -> str:
    """Leave out what differs from run to run: process numbers, seconds, random IDs, progress."""
    lines = [line for line in text.splitlines() if not re.match(r"\d+ done, \d+ running", line)]
    # Joined, because a longer number folds a paragraph at another place.
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"(ran )\d+\.\d|(seconds )\d+\.\d", r"\1\2#", text)
    text = re.sub(r"(--answer \S+ )[0-9a-f]{16}", r"\1NUMBER", text)
    text = re.sub(r"Process \d+", "NUMBER", text)
    return re.sub(r"[^\s:]+:\d+:[0-9a-f]{8}", "EXECUTOR", text)


def compare(command: str, shown: str, printed: str) -> None:
    """Hold what a command printed against what the page shows; `…` stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in masked(shown).split("…"))
    assert re.fullmatch(pattern, masked(printed)), f"{command}\n{printed}"


def run_as_shown(app: App, command: str, shown: str) -> str:
    """Run a command that a page shows; return what it printed."""
    words = shlex.split(command, comments=True)
    environment = {"DEMO_FAILURE_RATE": "0.5"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = "0" if name == "DEMO_LATENCY" else value
    if words[0] == "grep":
        lines = (app.folder / words[2]).read_text().splitlines()
        return "\n".join(line for line in lines if words[1] in line)
    assert words[:2] == ["uv", "run"], command
    recipe = words[3].removeprefix("recipes.") if words[2] == "-m" else ""
    arguments = words[4:] if recipe else words[3:]
    if "^C" in shown:
        environment["WAIT_AT"] = "inside 2"
    if "in the second terminal" in command:
        first = app.start(*arguments, WAIT_AT="inside 2").until_prints("step 2")
        second = app.start(*arguments).until_prints("executes nothing")
        app.open_gate()
        assert [first.wait(), second.wait()] == [0, 0]
        (app.folder / "ledger.gate").unlink()
        return second.stdout
    process = app.start(*arguments, recipe=recipe, **environment)
    if "^C" in shown:
        process.until_prints("step 2")
        process.signal(signal.SIGINT)
    if "answer:" in shown:
        process.until_prints("or, in place of yes").signal(signal.SIGKILL)
    process.wait()
    return process.stdout + ("^C" if "^C" in shown else "") + process.stderr


BY_OTHER_TESTS = re.compile(
    r"pytest|recipes\.kill_test|recipes\.plain|mkdir|cp |uvicorn|uv run agent.py \"Globex\""
)
"""Commands that are run elsewhere: see the names of the tests below, and test_recipes.py."""


@pytest.mark.parametrize("page", PAGES)
def test_each_command_prints_what_the_page_shows(tmp_path: Path, page: str) -> None:
    app = App(tmp_path, f"sqlite:///{tmp_path / 'research.sqlite'}")
    app.environment = {"COLUMNS": "80"}
    compared = 0
    for command, shown in commands(page):
        if not BY_OTHER_TESTS.search(command):
            compare(command, shown, run_as_shown(app, command, shown))
            compared += 1
    app.close()
    assert compared >= 4


def test_a_bug_that_is_mended_while_the_run_is_half_done_prints_what_the_readme_shows(
    tmp_path: Path,
) -> None:
    [(command, shown)] = [pair for pair in commands("README.md") if '"Globex"' in pair[0]]
    for name in MODULES:
        text = (PROJECT / name).read_text()
        if name == "tools.py":
            line = "        payload = await service.financials(company_name, key)\n"
            assert line in text
            text = text.replace(line, f'{line}        payload["revenue"]\n')
        (tmp_path / name).write_text(text)
    environment = {"PATH": os.environ["PATH"], "DEMO_LATENCY": "0", "COLUMNS": "80"}
    python = [sys.executable, "agent.py", "Globex"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    broken = run()
    assert broken.returncode == 1
    compare(command, shown, broken.stdout + broken.stderr)
    (tmp_path / "tools.py").write_text((PROJECT / "tools.py").read_text())
    mended = run()
    assert mended.returncode == 0, mended.stderr
    assert "step 1:" not in mended.stdout
    assert "step 2:" not in mended.stdout
    assert mended.stdout.count("restored") == 2


def test_the_fresh_start_removes_the_database_and_the_bill(sqlite_app: App) -> None:
    assert "`rm -rf research.sqlite* service.log` removes" in README
    assert sqlite_app.run("Acme").wait() == 0
    subprocess.run("rm -rf research.sqlite* service.log", cwd=sqlite_app.folder, shell=True)
    again = sqlite_app.run("Acme")
    assert again.wait() == 0
    assert ": new." in again.stdout
    assert "answers from its record" not in again.stdout


@pytest.mark.parametrize("quiet", [False, True])
def test_the_five_lines_of_a_program_run_as_they_stand(sqlite_app: App, quiet: bool) -> None:
    [program] = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert "DBOS's log appears, unless you give the logger `dbos` a handler." in README
    handler = "import logging; logging.getLogger('dbos').addHandler(logging.NullHandler())\n"
    done = subprocess.run(
        [sys.executable, "-c", handler * quiet + program],
        env={
            "PYTHONPATH": str(PROJECT),
            "DBOS_SYSTEM_DATABASE_URL": sqlite_app.database_url,
            "DEMO_BILL": str(sqlite_app.folder / "service.log"),
            "DEMO_LATENCY": "0",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "Acme works in quantum hardware with 14586 people. 0"
    assert ("dbos:" in done.stdout + done.stderr) is not quiet


def test_dbos_own_command_cancels_a_run_and_the_same_command_resumes_it(app: App) -> None:
    [line] = [line for line in RECIPES.splitlines() if "dbos workflow cancel RUN_ID" in line]
    started = app.start("Acme", WAIT_AT="inside 3")
    app.until("waiting inside 3")
    run_id = started.stdout.split()[1].rstrip(":")
    words = line.split()[2:]
    words = [str(Path(sys.executable).with_name("dbos")), *words[1:]]
    words[words.index("RUN_ID")] = run_id
    words[words.index("-s") + 1] = app.database_url
    subprocess.run(words, check=True, capture_output=True, env={"PATH": os.environ["PATH"]})
    # The step in flight is stopped although it waits for a gate that nobody opens.
    assert started.wait() == 1
    assert "the run was cancelled" in started.stderr
    again = app.run("Acme")
    assert again.wait() == 0, again.stderr
    assert "cancelled, resumes after 2 finished steps" in " ".join(again.stdout.split())
    assert len(app.ledger("effect")) == 4


def test_the_files_have_as_many_lines_as_the_readme_says() -> None:
    for name in MODULES:
        lines = len((PROJECT / name).read_text().splitlines())
        assert f"| [`{name}`]({name}) | {lines} |" in README, f"{name} has {lines} lines"


def test_the_lesson_is_the_first_250_lines_after_the_imports() -> None:
    code = (PROJECT / "agent.py").read_text()
    _, _, after_imports = code.partition("from tools import")
    lesson = re.split(r"# -+ 4\. details", after_imports.partition("\n")[2])[0]
    assert len(lesson.strip().splitlines()) <= 250
    assert "250 lines after the imports" in README
    before = code[: code.index("return DBOSAgent(")]
    assert len(before.splitlines()) < 100


def test_the_states_in_the_readme_are_the_tables_of_the_code() -> None:
    tree = ast.parse((PROJECT / "agent.py").read_text())
    rows = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in ("research", "prepare"):
            table = re.findall(r"^\| (.+?) \|", ast.get_docstring(node) or "", re.MULTILINE)
            rows += [row for row in table if row not in ("The run is…", "anything else")]
    states = README[README.index("## In which state") :]
    shown = re.findall(r"^\| (.+?) \|", states[: states.index("Exit codes")], re.MULTILINE)
    assert [row for row in shown if row != "The run is…"] == rows


def test_every_message_in_the_table_of_troubles_is_in_the_code() -> None:
    code = re.sub(r'" f?"', "", " ".join(CODE.split()))
    table = RECIPES[RECIPES.index("## Troubleshooting") : RECIPES.index("`--verbose` shows")]
    messages = [m for row in table.splitlines()[4:] for m in re.findall(r"^\| `([^`]+)`", row)]
    assert len(messages) >= 5
    for message in messages:
        assert message in code, message


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_ours_on_the_page_is_in_the_code(page: str) -> None:
    for name in re.findall(r"`([A-Za-z_]+)\(…?\)`", PAGES[page]):
        assert f"def {name}(" in CODE or f"class {name}" in CODE, name
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", PAGES[page]):
        assert name in CODE + " CRASH_ROUNDS CRASH_SEED", name


def test_every_setting_in_the_example_is_read_and_every_one_that_is_read_is_there() -> None:
    example = (PROJECT / ".env.example").read_text()
    shown = set(re.findall(r"^([A-Z_]+)=", example, re.MULTILINE))
    config = (PROJECT / "config.py").read_text()
    read = set(re.findall(r'_(?:read|number)\("([A-Z_]+)"', config))
    read |= set(re.findall(r'^    "([A-Z_]+_KEY)":', config, re.MULTILINE))
    read |= set(re.findall(r'"(\w+_DATABASE_URL)"', config))
    assert shown == read


def test_the_options_and_exit_codes_are_those_of_the_help() -> None:
    environment = {"COLUMNS": "80", "PATH": os.environ["PATH"]}
    helps = {}
    for path in FILES:
        name = path.stem
        words = ["agent.py"] if name == "agent" else ["-m", f"recipes.{name}"]
        if "make_parser(" in path.read_text() or "ArgumentParser(" in path.read_text():
            helps[name] = subprocess.run(
                [sys.executable, *words, "--help"],
                cwd=PROJECT,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
    for page, text in PAGES.items():
        for line in re.findall(r"uv run (?:agent\.py|-m recipes\.\w+)[^`\n]*", text):
            name = "agent" if "agent.py" in line.split("--")[0] else line.split("recipes.")[1]
            name = re.split(r"\W", name)[0]
            for option in re.findall(r"(?<= )--[a-z-]+", line.split(" -- ")[0]):
                assert option in helps[name], f"{page}: {line}"
    codes = re.search(r"Exit codes: (.+?)\.\n", helps["agent"], re.DOTALL)
    assert codes is not None
    assert " ".join(codes[1].split()) in " ".join(README.split())


def test_each_recipe_has_a_row_and_a_section() -> None:
    for path in (PROJECT / "recipes").glob("*.py"):
        assert f"| `{path.stem}` |" in README, path
        assert f"\n## {path.stem}\n" in RECIPES, path
        assert f"]({path.name})" in RECIPES, path


def test_the_readme_of_the_tests_names_every_file() -> None:
    page = (PROJECT / "tests" / "README.md").read_text()
    for path in (PROJECT / "tests").glob("*.py"):
        assert f"`{path.name}`" in page, path
    for name in re.findall(r"`(\w+\.py)`", page):
        assert (PROJECT / "tests" / name).exists(), name


def test_every_row_in_the_table_of_costs_is_one_that_the_benchmark_prints() -> None:
    costs = RECIPES[RECIPES.index("## What it costs") : RECIPES.index("## Troubleshooting")]
    rows = re.findall(r"^\| ([^|]+) \| [\d,.]+ ", costs, re.MULTILINE)
    assert 4 <= len(rows) <= 9
    code = (PROJECT / "tests/benchmark.py").read_text()
    for row in rows:
        assert f'"{row}"' in code, row


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(README.split()) <= 2_800


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_or_a_heading_resolves(page: str) -> None:
    folder = (PROJECT / page).parent

    def headings(path: Path) -> set[str]:
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
        lowered = [line.lstrip("#").strip().lower() for line in lines]
        return {re.sub(r"[^a-z0-9_ -]", "", line).replace(" ", "-") for line in lowered}

    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    assert links
    for link in links:
        if link.startswith(("https://", "../../actions/")):
            continue
        file, _, heading = link.partition("#")
        path = folder / file if file else PROJECT / page
        assert path.exists(), link
        if heading:
            assert heading in headings(path), link


def test_the_moving_picture_is_small_and_shows_the_same_lines_as_the_first_screen() -> None:
    picture = (PROJECT / ".github" / "crash.svg").read_text()
    assert len(picture) < 60_000
    words = set(re.findall(r">([^<>\s]+)</text>", picture))
    for _, shown in commands("README.md")[:2]:
        for word in masked(shown).replace("NUMBER", "").split():
            plain = word.rstrip(".;")
            assert "#" in word or any(plain in part for part in words), word


def test_a_wait_is_told_again_every_fifteen_seconds_as_the_first_line_says(app: App) -> None:
    first = app.start("Acme", WAIT_AT="inside 2")
    app.until("waiting inside 2")
    second = app.start("Acme").until_prints("every 15 seconds it says so")
    wait_for(lambda: "  still waiting" in second.stdout, "the sign of life")
    app.open_gate()
    assert [first.wait(), second.wait()] == [0, 0]
