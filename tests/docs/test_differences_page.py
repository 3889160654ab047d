"""Every line that a start logs about numbers that differ on purpose stands on the page, and the page promises no
other."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.commands import ROOT

PAGE = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
PROMISED = re.findall(r"\| `([^`]+)` \|$", PAGE, re.MULTILINE)


def texts_of(path) -> list[str]:
    """Texts of a source file, f-strings with {} in the place of their values."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    return found


TEXTS = [
    text
    for folder in ("library", "networks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for text in texts_of(path)
]
LINES = sorted(
    {text for text in TEXTS if re.search(r"\(known trainers |, which known tools do|than those of tools that", text)}
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:40])
def test_a_line_of_the_log_stands_on_the_page(line):
    assert any(start in line for start in PROMISED), line


@pytest.mark.parametrize("start", PROMISED, ids=lambda start: start[:40])
def test_a_line_of_the_page_is_one_of_the_log(start):
    assert any(start in text for text in TEXTS), start


def test_there_are_lines():
    assert len(LINES) > 8 and len(PROMISED) > 12
