"""Commands that pages show, and the parsers of the scripts that they call."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

from library.families.registry import FAMILIES, script_name
from library.training.option_reader import parser_of
from library.training.parser_common import script, with_own_hooks

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "assets").rglob("*.md"),
    ]
)
SCRIPTS = sorted(path for folder in (".", "tools", "finetune") for path in (ROOT / folder).glob("*.py"))
LAUNCH = re.compile(r"(?:python|accelerate launch)\s")


def fenced_commands(text: str) -> list[str]:
    """Lines of fenced blocks that start a script of this repository; lines that end in a backslash go on in the
    next."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line for line in lines if LAUNCH.match(line) and script_of(line)]
    return found


def docstring_commands(source: str) -> list[str]:
    """Commands in the text at the head of a script."""
    text = source.split('"""')[1] if source.startswith('"""') else ""
    return [
        line.strip()
        for line in text.replace("\\\n", " ").splitlines()
        if LAUNCH.match(line.strip()) and script_of(line)
    ]


def script_of(command: str) -> str | None:
    """The script that a command starts, None when it starts none of ours (`python -m ...`)."""
    return next((word for word in shlex.split(command, comments=True) if word.endswith(".py")), None)


def script_and_words(command: str) -> tuple[object, list[str]]:
    """The imported script, and what the command hands to it."""
    words = shlex.split(command, comments=True)
    place = words.index(script_of(command))
    return importlib.import_module(words[place].removesuffix(".py").replace("/", ".")), words[place + 1 :]


def parse(command: str) -> object:
    """The values that the script's own parser reads from a command. SystemExit when it refuses it."""
    module, words = script_and_words(command)
    if module.__name__ == "tools.caption":
        part, *words = words
        tool = importlib.import_module(f"tools.caption_tools.{module.PARTS[part][0]}").TOOL
        return tool.parser().parse_args(tool._plain(words))
    if "--hook" in words:  # its options are those of the script then
        family = next(name for name in FAMILIES if script_name(name) == module.__name__)
        return parser_of(with_own_hooks(script(family, "network"), words)).parse_args(words)
    return module.setup_parser().parse_args(words)
