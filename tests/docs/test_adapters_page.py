"""The page on kinds of adapters: its commands are accepted, its tables name every kind and every argument of the
code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from library.core.registry import import_target
from library.families.registry import FAMILIES
from library.training import cli
from library.training.adapters import KINDS, NETWORKS, NetworkOptions
from networks.kinds.network_args import argument_parsers, families_with
from networks.kinds.targets import targets_of_family

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
SCRIPTS = {
    "train_network.py": "sd",
    "sdxl_train_network.py": "sdxl",
    "flux_train_network.py": "flux",
    "anima_train_network.py": "anima",
    "hunyuan_image_train_network.py": "hunyuan_image",
}
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}
ALL = set().union(*(argument_parsers(targets_of_family(family)) for family in FAMILIES))


def commands() -> list[str]:
    return re.findall(r"```\n(accelerate launch .*?)```", PAGE, re.DOTALL)


def section_of(name: str) -> str:
    return next(text for text in SECTIONS.values() if f"--network_module {name} " in text)


def argument_rows() -> dict[str, str]:
    """Argument -> the cell of families that have it, from the table of what all kinds share."""
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| .* \|$", SECTIONS["Which layers"], re.MULTILINE)
    return {name: families for names, families in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.mark.parametrize("text", commands())
def test_commands_are_accepted(text: str) -> None:
    script, *argv = shlex.split(text.replace("\\\n", " "))[2:]
    family = SCRIPTS[script]
    values = vars(cli.build_parser(family=family, trainable="network").parse_args(argv))
    options = NetworkOptions(**{name: values[name] for name in NetworkOptions.__dataclass_fields__ if name in values})
    if options.module_path.startswith("networks."):
        given = {name: getattr(options, name) for name in ("network_dim", "network_alpha") if f"--{name}" in argv}
        import_target(f"{options.module_path}:check_network_args")(options.pairs, family, given)


@pytest.mark.parametrize("name", NETWORKS.names())
def test_every_name_is_told(name: str) -> None:
    assert f"`{name}`" in PAGE or f"`networks.{name}`" in PAGE
    if name in (*KINDS, "lycoris"):
        assert section_of(name)


@pytest.mark.parametrize("name", KINDS)
def test_every_argument_of_a_kind_is_in_its_section(name: str) -> None:
    section = section_of(name)
    kind = import_target(f"{NETWORKS.entry(name).target}:KIND")
    for targets in map(targets_of_family, FAMILIES):
        own = [*kind.arguments(targets), *(set(kind.targets(targets).optional_classes) - set(targets.optional_classes))]
        assert [argument for argument in own if f"`{argument}`" not in section and f"`{argument}=" not in section] == []


def test_every_shared_argument_is_in_the_table() -> None:
    assert set(argument_rows()) == ALL


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_table_tells_which_family_has_an_argument(name: str) -> None:
    told = argument_rows()[name]
    assert set(FAMILIES if told == "all" else told.split(", ")) == set(families_with(name))


def test_sizes_and_presets_are_told() -> None:
    from library.core.learning_rates import CURVES

    section = SECTIONS["Which layers"] + SECTIONS["Learning rates"]
    assert all(f"`{name}`" in section for name in CURVES)
    for family in FAMILIES:
        blocks = targets_of_family(family).blocks
        assert blocks is None or f"{blocks.count} for" in section
        assert blocks is None or re.search(rf"{len(blocks.down)}, {len(blocks.mid)} and {len(blocks.up)}\b", section)
