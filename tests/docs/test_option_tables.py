"""The pages of the training scripts list every option as the script has it now."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training.parser_common import script
from tests.option_sets import SCRIPTS
from tools.document_options import GENERATION_PAGE, PAGES, generation_script, with_tables

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
