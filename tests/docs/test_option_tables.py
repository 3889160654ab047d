"""The pages of the training scripts list every option as the script has it now."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training.parser_common import script
from tests.option_sets import SCRIPTS
from tools.document_options import (
    CACHES_PAGE,
    FEATURES,
    GENERATION_PAGE,
    PAGES,
    TRAINABLES_PAGE,
    between_marks,
    cache_tool_tables,
    generation_script,
    trainables_table,
    video_page,
    video_scripts,
    with_tables,
)

ROOT = Path(__file__).parents[2]


def test_every_script_has_a_page() -> None:
    assert set(PAGES) == set(SCRIPTS)


@pytest.mark.parametrize("which", PAGES, ids="_".join)
def test_the_tables_are_current(which: tuple[str, str]) -> None:
    """When an option changed: `python tools/document_options.py all`."""
    page, what = (ROOT / PAGES[which]).read_text(encoding="utf-8"), script(*which)
    assert with_tables(page, what) == page
    assert [name for name in what.owners if f"`--{name}`" not in page] == []


def test_the_table_of_the_image_script_is_current() -> None:
    page = (ROOT / GENERATION_PAGE).read_text(encoding="utf-8")
    assert with_tables(page, generation_script()) == page
    assert [name for name in generation_script().owners if f"`--{name}`" not in page] == []


def test_the_tables_of_the_cache_tools_are_current() -> None:
    page = (ROOT / CACHES_PAGE).read_text(encoding="utf-8")
    assert between_marks(page, cache_tool_tables()) == page


@pytest.mark.parametrize("family", video_scripts())
def test_the_tables_of_video_scripts_are_current(family: str) -> None:
    page, what = (ROOT / video_page(family)).read_text(encoding="utf-8"), video_scripts()[family]
    assert with_tables(page, what) == page


def test_the_table_of_trainables_is_current() -> None:
    """Each is told in words, each column with the options that it stands for."""
    page = (ROOT / TRAINABLES_PAGE).read_text(encoding="utf-8")
    assert between_marks(page, trainables_table()) == page
    assert [trainable for _, trainable in PAGES if f"\n- `{trainable}`:" not in page] == []
    legend = page.partition("<!--")[0]
    assert [column for column in FEATURES if not any(part in legend for part in column.split())] == []
    assert [column for column, options in FEATURES.items() if not any(f"`--{name}`" in legend for name in options)] == []
