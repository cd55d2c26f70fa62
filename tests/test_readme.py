"""What the README says is run here, and compared. Its recipes are in test_recipes.py."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT, App
from provider import Provider
from recipes import ENVIRONMENT, MODULES, README, apply_diff, blocks, copy_app, run

CODE = "".join((PROJECT / name).read_text() for name in MODULES)


def masked(text: str) -> str:
    """Leave out what differs from run to run: failed attempts, progress, names, seconds, PIDs."""
    lines = [
        re.sub(r"(ran +)\d+ +\d+\.\d|\d+\.\d( +finished)|seconds \d+\.\d$", r"\1\2 #", line)
        for line in text.splitlines()
        if not re.search(r"failed with|\(attempt|^\d+ done, |not finished yet", line)
    ]
    # Joined, because a name of another length folds a paragraph at another place.
    text = " ".join(" ".join(lines).split())
    text = re.sub(r"times, last \w+: [\w ]+", "times, last ERROR", text)
    text = re.sub(r"Process \d+|pyd_ai_[0-9a-f]+", "NUMBER", text)
    return re.sub(r"[^\s:]+:\d+:[0-9a-f]{8}", "EXECUTOR", text)


def compare(command: str, shown: str, printed: str) -> None:
    """Hold what a command printed against what the README shows; `…` stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in masked(shown).split("…"))
    assert re.fullmatch(pattern, masked(printed)), f"{command}\n{printed}"


def test_each_command_prints_what_the_readme_shows(tmp_path: Path, provider: Provider) -> None:
    provider.script = ["401"]
    folder = copy_app(tmp_path)
    app = App(folder, f"sqlite:///{folder / 'research.sqlite'}", environment={"COLUMNS": "80"})
    compared = 0
    for block in blocks("console"):
        command, _, shown = block.removeprefix("$ ").partition("\n")
        if not shown or "with approval.diff" in command:
            continue
        arguments = shlex.split(command.partition("uv run agent.py")[2], comments=True)
        environment = {**provider.environment, "MODEL": ""} if "KEY=wrong" in command else {}
        if "DEMO_FAILURE_RATE=1" in command:
            environment["DEMO_FAILURE_RATE"] = "1"
        if "^C" in shown:
            environment["WAIT_AT"] = "inside 2"
        if "in the second terminal" in command:
            first = app.start(*arguments, WAIT_AT="inside 2").until_prints("step 2")
            second = app.start(*arguments).until_prints("executes nothing")
            app.open_gate()
            assert [first.wait(), second.wait()] == [0, 0]
            assert "4  model request              ran" in first.stdout
            printed = second.stdout
        else:
            process = app.start(*arguments, **environment)
            if "^C" in shown:
                process.until_prints(shown.split("\n^C")[0].splitlines()[-1])
                process.signal(signal.SIGINT)
            process.wait()
            printed = process.stdout + ("^C" if "^C" in shown else "") + process.stderr
        compare(command, shown, printed)
        compared += 1
    assert compared == 8


def test_the_run_that_waits_for_a_person_prints_what_the_readme_shows(tmp_path: Path) -> None:
    apply_diff("approval.diff", copy_app(tmp_path))
    [block] = blocks("console", "with approval.diff")
    command, _, shown = block.partition("\n")
    with subprocess.Popen(
        [sys.executable, "-u", "agent.py", "Acme"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        while "or, in place of yes" not in printed:
            printed += process.stdout.readline()
        process.kill()
    compare(command, shown, printed)


def test_each_command_within_the_text_runs(sqlite_app: App) -> None:
    names = sqlite_app.folder / "companies.txt"
    names.write_text("# customers\nAcme\nGlobex\n")
    commands = re.findall(r"`(?:[A-Z_]+=\S+ )?uv run agent\.py ([^`]*)`", README)
    commands = [command for command in commands if command != "--worker"]
    assert len(commands) >= 5
    for command in commands:
        arguments, _, file = command.partition(" < ")
        patches = {"stdin": str(names)} if file else {}
        done = sqlite_app.run(*shlex.split(arguments), patches=patches)
        assert done.wait() == 0, f"{command}\n{done.stderr}"


def test_the_files_have_as_many_lines_as_the_readme_says() -> None:
    for name in MODULES:
        lines = len((PROJECT / name).read_text().splitlines())
        assert f"| [`{name}`]({name}) | {lines} |" in README, f"{name} has {lines} lines"


def test_the_lesson_is_the_first_250_lines_after_the_imports() -> None:
    code = (PROJECT / "agent.py").read_text()
    _, _, after_imports = code.partition("from tools import")
    lesson = re.split(r"# -+ 5\. details", after_imports.partition("\n")[2])[0]
    assert len(lesson.strip().splitlines()) <= 250
    assert "250 lines after the imports" in README


def test_every_message_in_the_table_of_troubles_is_in_the_code() -> None:
    code = re.sub(r'" f?"', "", " ".join(CODE.split()))
    table = README[README.index("## Troubleshooting") : README.index("`--verbose` shows")]
    messages = [m for row in table.splitlines()[4:-1] for m in re.findall(r"`([^`]+)`", row[:60])]
    assert len(messages) >= 5
    for message in messages:
        assert message in code, message


def test_every_name_of_ours_in_the_readme_is_in_the_code() -> None:
    for name in re.findall(r"`([A-Za-z_]+)\(\)`", README):
        assert f"def {name}(" in CODE or f"class {name}" in CODE, name
    for name in re.findall(r"`([A-Z]+_[A-Z_]+)`", README):
        assert name in CODE + " CRASH_ROUNDS CRASH_SEED", name


def test_the_options_and_exit_codes_are_those_of_the_help() -> None:
    told = run(PROJECT, "agent.py", "--help").stdout
    for option in re.findall(r"`(?:uv run agent\.py )?(--[a-z-]+)", README):
        assert option in told + " --group --cors-origins", option
    codes = re.search(r"Exit codes: (.+?)\.\n", told, re.DOTALL)
    assert codes is not None
    assert " ".join(codes[1].split()) in " ".join(README.split())


def test_every_row_in_the_table_of_costs_is_one_that_the_benchmark_prints() -> None:
    costs = README[README.index("## What it costs") : README.index("## Operate it")]
    rows = re.findall(r"^\| ([^|]+) \| [\d,.]+ ", costs, re.MULTILINE)
    assert 4 <= len(rows) <= 8
    code = (PROJECT / "tests/benchmark.py").read_text()
    for row in rows:
        assert f'"{row}"' in code, row


def test_the_readme_is_read_in_a_sitting() -> None:
    """Words, code and transcripts included, diffs not."""
    text = re.sub(r"^```diff\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 3600


def test_every_link_to_a_file_or_a_heading_resolves() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.strip("# ").lower()).replace(" ", "-")
        for line in README.splitlines()
        if line.startswith("#")
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings
        elif link.partition("#")[0] and not link.startswith(("https://", "../../actions/")):
            assert (PROJECT / link).exists(), link
