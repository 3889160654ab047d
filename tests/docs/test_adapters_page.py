"""The page on kinds of adapters: its commands are accepted, its tables name every argument of a kind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.registry import import_target
from library.training import cli
from library.training.adapters import NETWORKS, NetworkOptions
from networks.targets import targets_of_family

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
FAMILIES = {"train_network.py": "sd", "sdxl_train_network.py": "sdxl", "flux_train_network.py": "flux", "anima_train_network.py": "anima"}
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}


def commands() -> list[str]:
    return re.findall(r"```\n(accelerate launch .*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", commands())
def test_commands_are_accepted(text: str) -> None:
    script, *argv = shlex.split(text.replace("\\\n", " "))[2:]
    family = FAMILIES[script]
    values = vars(cli.build_parser(family=family, trainable="network").parse_args(argv))
    options = NetworkOptions(**{name: values[name] for name in NetworkOptions.__dataclass_fields__ if name in values})
    import_target(f"{options.module_path}:check_network_args")(options.pairs, family)


@pytest.mark.parametrize("name", [name for name in NETWORKS.names() if f"`{name}`" in PAGE])
def test_every_argument_of_a_kind_is_in_its_section(name: str) -> None:
    section = next(text for text in SECTIONS.values() if f"--network_module {name} " in text)
    kind = import_target(f"{NETWORKS.entry(name).target}:KIND")
    targets = targets_of_family("sd")
    own = [*kind.arguments(targets), *(set(kind.targets(targets).optional_classes) - set(targets.optional_classes))]
    missing = [argument for argument in own if f"`{argument}`" not in section]
    assert not missing
