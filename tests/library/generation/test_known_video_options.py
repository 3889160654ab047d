"""The options of the video scripts: those of the known scripts are all there, with their types and defaults; the set is
frozen; none is accepted and silently without effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.core.options import is_bool_option, value_type
from library.families.registry import FAMILIES
from tests.musubi import known_options
from tests.option_sets import option_set, video_path
from tools.document_options import video_scripts

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = video_scripts()
OTHER_DEFAULTS = {
    "lora_multiplier": None, "blocks_to_swap": 0, "vae_dtype": "float16", "negative_prompt": None, "fps": None,
    "task": None,
}  # fmt: skip
"""written otherwise, and the same: 1 for each file, none, half precision"""


@pytest.mark.parametrize("family", SCRIPTS)
def test_the_known_options_are_there(family: str) -> None:
    what = SCRIPTS[family]
    for entry in known_options(FAMILIES[family].pictures):
        name = entry["dest"]
        assert name in what.owners, name
        owner, spec = what.owners[name], what.spec(name)
        assert set(entry["flags"]) <= {f"--{name}", *spec.flags}, name
        assert is_bool_option(owner, name) == (entry["action"] == "store_true"), name
        if entry["type"] in ("int", "float"):
            wanted = ("float",) if entry["type"] == "float" else ("int", "float")
            assert value_type(owner, name).__name__ in wanted, name
        if entry["action"] != "store_true":
            assert spec.nargs == entry["nargs"], name
        if entry["choices"]:
            assert set(entry["choices"]) <= set(spec.choices), name
        default = what.default(name)
        if entry["action"] != "store_true" and name not in OTHER_DEFAULTS and default != entry["default"]:
            assert list(default or ()) == list(entry["default"] or ()), name


@pytest.mark.parametrize("family", SCRIPTS)
def test_the_options_are_the_frozen_ones(family: str) -> None:
    """A change that is meant: `python -m tests.option_sets`, and look at the difference."""
    assert option_set(SCRIPTS[family]) == json.loads(video_path(family).read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", SCRIPTS)
def test_every_option_that_works_is_read_somewhere(family: str) -> None:
    """Its name stands in the code that makes videos, beside its declaration."""
    files = [*(ROOT / "library" / "generation").glob("*.py"), *(ROOT / "library" / "scripts").glob("*.py")]
    files += [ROOT / "library" / "training" / name for name in ("cli.py", "attention_options.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    what = SCRIPTS[family]
    unread = [
        name for name in what.owners
        if what.status(name) == "works" and text.count(f".{name}") + text.count(f'"{name}"') == 0
    ]  # fmt: skip
    assert unread == ["plugins"] * ("plugins" in unread)
