"""The page for users of musubi-tuner: its commands are known ones and are read without a complaint about an option, its
names can be imported, its trainer has methods that are called."""

from __future__ import annotations

import importlib
import re

import pytest

from library.compat.trainer_run import check_parameters
from library.families.registry import FAMILIES, script_name
from library.training.parser_common import parse_command
from tests.docs.commands import ROOT, fenced_commands, script_and_words, script_of
from tests.musubi import known_options

TEXT = (ROOT / "docs" / "from_musubi_tuner.md").read_text(encoding="utf-8")
THERE = {"hv_cache_latents.py": "cache_latents.py", "hv_cache_text_encoder_outputs.py": "cache_text_encoder_outputs.py"}
"""scripts whose names differ"""
TRAINED = {
    **{f"{script_name(name)}.py": (name, "network") for name in FAMILIES},
    **{f"{other.name}.py": (name, kind) for name, record in FAMILIES.items() for kind, other in record.scripts.items()},
}
COMMANDS = [pytest.param(command, id=f"{n}-{script_of(command)}") for n, command in enumerate(fenced_commands(TEXT))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_options_of_the_known_script_alone(command):
    script = script_of(command).rpartition("/")[2]
    known = {flag for option in known_options(THERE.get(script, script)) for flag in option["flags"]}
    words = script_and_words(command)[1]
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("command", [one for one in COMMANDS if script_of(one.values[0]) in TRAINED])
def test_a_command_is_read_and_nothing_of_it_is_ignored(command):
    """What means nothing here is answered with a line, as an equivalent."""
    parsed = parse_command(script_and_words(command)[1], *TRAINED[script_of(command)])
    assert [str(item) for item in parsed.config.ignored] == []


def test_every_family_and_way_of_training_has_a_command():
    shown = {script_of(one.values[0]) for one in COMMANDS}
    assert {"hv_train_network.py", "wan_train_network.py", "fpack_train_network.py", "hv_train.py"} <= shown


def test_names_are_where_the_page_says():
    rows = re.findall(r"^\| `musubi_tuner\.([\w.]+)`(?:: (.*?))? \| `(\w+)` \|$", TEXT, re.MULTILINE)
    assert len(rows) == 8
    for _, names, module in rows:
        home = importlib.import_module(module)
        for name in re.findall(r"`([\w.]+)`", names):
            found = dir(home) if name.endswith("...") else [name]
            assert any(entry.startswith(name.rstrip(".")) for entry in found) and all(
                hasattr(home, entry) for entry in found if entry.startswith(name.rstrip("."))
            ), name


def test_the_trainer_of_the_page_has_methods_that_are_called():
    (source,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "page"}
    exec(compile(source, "page", "exec"), names)
    trainer = names["MyTrainer"]()
    check_parameters(trainer)
    assert set(trainer._overridden()) == {"compute_loss"}
