"""Letters of prompt lines in the image scripts of all families: guidance by each known letter, each on its page."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from library.core.registry import import_target
from library.families.registry import FAMILIES
from library.generation import chroma_options, flux_options
from library.generation.script import ImageScript, LineReader

ROOT = Path(__file__).parents[3]
FLOW = [name for name, record in FAMILIES.items() if record.pictures.endswith("_minimal_inference.py")]


def script_of(family: str) -> ImageScript:
    return import_target(FAMILIES[family].image_script or f"library.generation.{family}_inference:SCRIPT")


@pytest.mark.parametrize("family", FLOW)
def test_letters_of_guidance(family: str, caplog) -> None:
    letters = script_of(family).line_options
    assert letters["l"].field == letters["c"].field == "cfg_scale"
    assert letters["g"].field == ("guidance" if family in ("flux", "chroma") else "cfg_scale")
    text = (ROOT / "docs" / FAMILIES[family].pictures.replace(".py", ".md")).read_text(encoding="utf-8")
    told = next(part for part in text.split("\n\n") if "`--w --h` size" in part)
    assert set(letters) == set(re.findall(r"--([a-z0-9]+)", told)), "the page names every letter, and no other"


def test_the_embedded_guidance_of_lines_changes_nothing_where_there_is_none(caplog) -> None:
    line = "a cat --g 2.5 --l 3 --s 4"
    asked = flux_options.FluxRequest(prompt="", width=64, height=64)
    flux = LineReader(flux_options.LINE_OPTIONS, 16).read(line, asked)
    assert (flux.guidance, flux.cfg_scale) == (2.5, 3.0)
    default = chroma_options.ChromaRequest(prompt="", width=64, height=64)
    with caplog.at_level(logging.WARNING):
        chroma = LineReader(chroma_options.LINE_OPTIONS, 16).read(line, default, "line 3")
    assert chroma.cfg_scale == 3.0 and chroma.steps == 4
    assert "line 3: --g has no effect: Chroma has no embedded guidance" in caplog.text
