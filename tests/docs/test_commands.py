"""Every command that a page or the head of a script shows names a script that exists, with options that it knows."""

from __future__ import annotations

import re

import pytest
from tests.docs.commands import PAGES, ROOT, SCRIPTS, docstring_commands, fenced_commands, parse, script_of

SHOWN = [
    pytest.param(command, id=f"{page.name}-{script_of(command)}")
    for page in PAGES
    for command in fenced_commands(page.read_text(encoding="utf-8"))
]
HEADS = [
    pytest.param(command, id=f"{path.name}-{number}")
    for path in SCRIPTS if '"""' in (source := path.read_text(encoding="utf-8")) and "def setup_parser" in source
    for number, command in enumerate(docstring_commands(source))
]  # fmt: skip


@pytest.mark.parametrize("command", [*SHOWN, *HEADS])
def test_a_command_is_one_that_its_script_takes(command):
    parse(command)


@pytest.mark.parametrize("command", SHOWN)
def test_a_rank_never_stands_without_its_alpha(command):
    """A reader who pastes it would train at 1 / rank of the strength, where the script has an alpha."""
    gives_rank = re.search(r"--network_dim[ =]", command) and "network_alpha" in vars(parse(command))
    assert not gives_rank or re.search(r"--network_alpha[ =]", command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    """Links to files of the repository, and scripts that the text names."""
    text = page.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    scripts = re.findall(r"`((?:tools|networks|finetune|benchmarks)/\w+\.py)\b", text)
    assert [name for name in scripts if not (ROOT / name).exists() and "foo" not in name] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_anchors_exist(page):
    for target, anchor in re.findall(r"\]\(([\w.-]*)#([\w-]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        ]
        assert anchor in headings, f"{target}#{anchor}"


def test_every_page_is_in_the_table_of_pages():
    table = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in table
    ] == []


def test_a_wrong_command_is_found():
    with pytest.raises(SystemExit):
        parse("python tools/merge_lora.py --save_too x")
    assert fenced_commands("```\naccelerate launch --num_processes 1 train_network.py \\\n  --seed 1\n```\n")
