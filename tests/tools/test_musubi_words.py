"""Every word of musubi-tuner's tools for adapters is understood by the tool of this name."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.musubi import known_options

TOOLS = ("convert_lora", "merge_lora", "lora_post_hoc_ema")


@pytest.mark.parametrize("tool", TOOLS)
def test_every_option_is_read(tool):
    parser = import_module(f"tools.{tool}").setup_parser()
    ours = {flag: action for action in parser._actions for flag in action.option_strings}
    for option in known_options(f"{tool}.py"):
        for flag in option["flags"]:
            assert flag in ours, f"{tool}.py has no {flag}"
            takes_none = option["nargs"] == 0
            assert (ours[flag].nargs in (0, "?")) == takes_none, flag
