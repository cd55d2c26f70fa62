"""Draw crash.svg, the moving picture at the top of README.md, from a real recording.

    uv run .github/movie.py

A run is killed in its third step, and the same command goes on there. Both commands are run in a
temporary folder, with none of this machine's settings. Only the waits are shortened.
"""
# ruff: noqa: S603 - it starts no program that others choose

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS = 20, 80
LINE, CHARACTER, PAD = 20, 8.43, 16
"""Pixels: the height of a line, the width of a character, the frame around all."""
LONGEST_WAIT, AT_START, AFTER_KILL, AT_END = 0.8, 0.3, 1.8, 7.0
"""Seconds: the longest waits between two lines, before the first step, and around the runs."""
COLOURS = {r"now SIGKILL": "#ff8a80", r"\brestored$": "#63d2c3", r"\bran\b": "#f2b25c"}
STYLE = """text{{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;\
fill:#d5dade;white-space:pre}}.command{{font-weight:700;fill:#fff}}.comment{{fill:#8b98a5}}
#text{{animation:scroll {length}s step-end infinite;transform:translateY({last}px)}}
#cover{{animation:reveal {length}s step-end infinite;transform:translateY({all}px)}}
@media(prefers-reduced-motion){{#text,#cover{{animation:none}}}}
@keyframes scroll{{{scroll}}}@keyframes reveal{{{reveal}}}"""


def record(folder: Path, *options: str) -> list[tuple[float, str]]:
    """Run the command; return each line that it prints, and the seconds before the line."""
    settings = {"PATH": os.environ["PATH"], "COLUMNS": str(COLUMNS)}
    command = [sys.executable, "agent.py", "Acme", *options]
    lines, before, longest = [], time.monotonic(), AT_START
    with subprocess.Popen(
        command, cwd=folder, env=settings, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append((min(time.monotonic() - before, longest), line.rstrip("\n")))
            before = time.monotonic()
            longest = LONGEST_WAIT if "step" in line else longest
    return lines


def drawn(number: int, line: str) -> str:
    """Return a line of text as SVG."""
    kind = {"$": ' class="command"', "#": ' class="comment"'}.get(line[:1], "")
    text = escape(line)
    for word, colour in COLOURS.items():
        text = re.sub(word, rf'<tspan fill="{colour}">\g<0></tspan>', text)
    return f'<text{kind} x="{PAD}" y="{PAD + number * LINE + 14}">{text}</text>\n'


def keyframes(moments: list[float], length: float, places: list[int]) -> str:
    """Return where a thing stands from each moment on."""
    return "".join(
        f"{100 * moment / length:.2f}%{{transform:translateY({place}px)}}"
        for moment, place in zip(moments, places, strict=True)
    )


def draw(lines: list[tuple[float, str]]) -> str:
    """Return the moving picture: the text scrolls, and a cover hides what is not printed yet."""
    moments = [sum(wait for wait, _ in lines[: count + 1]) for count in range(len(lines))]
    length = round(moments[-1] + AT_END, 1)
    scroll = [-LINE * max(0, count + 1 - ROWS) for count in range(len(lines))]
    reveal = [LINE * (count + 1) for count in range(len(lines))]
    style = STYLE.format(
        length=length,
        last=scroll[-1],
        all=reveal[-1],
        scroll=keyframes(moments, length, scroll),
        reveal=keyframes(moments, length, reveal),
    )
    width, height, field = round(COLUMNS * CHARACTER + 2 * PAD), ROWS * LINE, 'fill="#1c2024"'
    text = "".join(drawn(number, line) for number, (_, line) in enumerate(lines))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 2 * PAD}">
<style>{style}</style>
<rect width="100%" height="100%" rx="8" {field}/>
<clipPath id="screen"><rect y="{PAD}" width="{width}" height="{height}"/></clipPath>
<g clip-path="url(#screen)"><g id="text">
{text}<rect id="cover" y="{PAD}" width="{width}" height="{reveal[-1]}" {field}/>
</g></g></svg>
"""


with tempfile.TemporaryDirectory() as name:
    for path in ("agent.py", "config.py", "tools.py"):
        shutil.copy(PROJECT / path, name)
    for path in ("demo", "durable"):
        shutil.copytree(PROJECT / path, Path(name) / path)
    killed, resumed = record(Path(name), "--crash"), record(Path(name))
picture = draw(
    [
        (0, '$ uv run agent.py "Acme" --crash'),
        *killed,
        (AFTER_KILL, ""),
        (0, "# The same command. Steps 1 and 2 print nothing: their results are stored."),
        (LONGEST_WAIT, '$ uv run agent.py "Acme"'),
        *resumed,
    ]
)
(PROJECT / ".github" / "crash.svg").write_text(picture)
print(f".github/crash.svg: {len(picture)} bytes")
