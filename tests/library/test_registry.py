"""Registries: adding, finding, importing; and the tables of the project, each with its first entries."""

from __future__ import annotations

import types

import pytest

from library.core.errors import ConfigError
from library.core.registry import Registry, import_target
from library.training.adapters import NETWORKS
from library.training.inference_samplers import INFERENCE_SAMPLERS, SIGMA_TABLES
from library.training.loss_weights import LOSS_WEIGHTS
from library.training.losses import LOSSES
from library.training.optimizers import OPTIMIZERS
from library.training.schedulers import SCHEDULERS
from library.training.timestep_samplers import TIMESTEP_SAMPLERS

TABLES = (
    OPTIMIZERS, SCHEDULERS, LOSSES, LOSS_WEIGHTS, TIMESTEP_SAMPLERS, INFERENCE_SAMPLERS, SIGMA_TABLES, NETWORKS,
)  # fmt: skip


def table(**targets: str) -> Registry:
    registry: Registry = Registry("formula", option="formula_type")
    for name, target in targets.items():
        registry.add(name, target)
    return registry


def test_names_are_found_in_any_case_and_imported_when_asked_for():
    registry = table(Ratio="fractions:Fraction")
    assert "ratio" in registry and registry.names() == ["Ratio"]
    assert registry.resolve("RATIO").__name__ == "Fraction"


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="formula 'A' is registered twice"):
        registry = table(a="fractions:Fraction")
        registry.add("A", "fractions:Fraction")


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"unknown formula 'ratoi' \(--formula_type\); did you mean 'ratio'\? Known: ratio"
    ):
        table(ratio="fractions:Fraction").resolve("ratoi")


@pytest.mark.parametrize(
    "target, message",
    [
        ("no_such_package.module:Thing", "needs the package no_such_package.*pip install no_such_package"),
        ("fractions:NoSuchClass", "is fractions:NoSuchClass, which the installed package does not have"),
        ("fractions.NoSuchClass", "which the installed package does not have"),
    ],
)
def test_what_cannot_be_imported_is_an_error_of_the_choice(target, message):
    with pytest.raises(ConfigError, match=message):
        table(x=target).resolve("x")


@pytest.mark.parametrize(
    "target, kind", [("networks.lora", types.ModuleType), ("json", types.ModuleType), ("fractions.Fraction", type)]
)
def test_a_target_may_be_a_module_or_a_dotted_name(target, kind):
    assert isinstance(import_target(target), kind)


@pytest.mark.parametrize("registry, name", [(table, name) for table in TABLES for name in table.names()])
def test_every_entry_of_the_project_is_there_or_names_its_package(registry, name):
    try:
        found = registry.resolve(name)
    except ConfigError as error:
        assert registry.entry(name).package and f"pip install {registry.entry(name).package}" in str(error)
    else:
        assert callable(found) or hasattr(found, "create_network")


# ---- from outside ----------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module of the current folder, and a registry that asks for functions of one argument."""
    (tmp_path / "users_module.py").write_text(
        "def double(value):\n    return 2 * value\n\ndef pair(a, b):\n    return a, b\n\nNUMBER = 1\n"
    )
    (tmp_path / "users_broken.py").write_text("1 / 0\n")
    (tmp_path / "users_needy.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    for name in ("users_module", "users_broken", "users_needy"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return Registry(
        "formula",
        option="formula_type",
        group="formulas",
        takes=("value",),
        wanted="a function of (value)",
        info={"exact": None},
    )


def test_a_path_is_taken_from_the_current_folder(outside):
    assert outside.problem("users_module:double") is None
    assert outside.resolve("users_module:double")(4) == 8
    assert outside.entry("users_module:double").info == {"exact": None}


@pytest.mark.parametrize(
    "path, message",
    [
        ("no_such_module:double", "--formula_type is no_such_module:double; there is no module no_such_module, neither in the current folder"),
        ("users_module:duoble", "the module users_module has no duoble; did you mean 'double'"),
        ("users_broken:double", r"users_broken cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("users_needy:double", "it imports no_such_package, which is not installed"),
        ("users_module:NUMBER", r"is users_module:NUMBER, which is a value of the type int; needed: a function of \(value\)"),
        ("users_module:pair", r"cannot be called with \(value\): missing a required argument: 'b'; needed"),
        ("duoble", r"unknown formula 'duoble' \(--formula_type\).*or a path package.module:name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_message(outside, path, message):
    with pytest.raises(ConfigError, match=message):
        outside.resolve(path)


def test_a_registry_without_a_group_takes_no_paths():
    with pytest.raises(ConfigError, match="unknown formula 'fractions:Fraction'"):
        table(a="fractions:Fraction").resolve("fractions:Fraction")


def half(value):
    return value / 2


def test_a_registered_thing_has_a_name_and_says_what_it_is(outside):
    for _ in range(2):  # as a cell of a notebook that runs twice
        assert outside.register("Half", exact=True)(half) is half
    assert outside.resolve("half") is half and outside.entry("HALF").info == {"exact": True}
    assert outside.entry(f"{__name__}:half").info == {"exact": True}
    with pytest.raises(ValueError, match="formula 'half' is registered twice"):
        outside.register("half")(lambda value: value)


def test_installed_packages_offer_names(outside, monkeypatch):
    monkeypatch.setattr(
        "library.core.registry.installed_points",
        lambda group: {"twofold": "users_module:double"} if group == "formulas" else {},
    )
    assert "TwoFold" in outside and outside.resolve("TwoFold")(4) == 8
    with pytest.raises(ConfigError, match="did you mean 'twofold'"):
        outside.resolve("twofolt")


def test_names_of_installed_packages_are_read_from_their_entry_points(monkeypatch):
    from importlib.metadata import EntryPoint

    from library.core import registry

    points = [EntryPoint("Huber", "package.losses:huber", "atelier.losses")]
    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda group: points if group == "atelier.losses" else []
    )
    registry.installed_points.cache_clear()
    try:
        assert (
            registry.installed_points("losses") == {"huber": "package.losses:huber"}
            and registry.installed_points("schedulers") == {}
        )
    finally:
        registry.installed_points.cache_clear()


def test_the_page_names_every_group_of_entry_points():
    import re
    from pathlib import Path

    import library
    from library.training.adapters import NETWORKS
    from library.training.own_hooks import HOOKS
    from library.training.parser_common import TRAINABLES

    tables = [
        library.LOSSES, library.LOSS_WEIGHTS, library.TIMESTEP_SAMPLERS, library.INFERENCE_SAMPLERS, library.SCHEDULERS,
        library.OPTIMIZERS, NETWORKS, TRAINABLES, HOOKS, SIGMA_TABLES,
    ]  # fmt: skip
    text = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    listed = re.findall(r"`atelier\.(\w+)`", text[text.index("The groups are") :])
    assert sorted(listed) == sorted([*(table.group for table in tables), "families"])


def test_plugins_are_told_together_when_they_cannot_be_imported(outside):
    from library.core.plugins import PluginOptions, plugins_on

    PluginOptions(plugins=["users_module"])
    with pytest.raises(ConfigError) as caught:
        PluginOptions(plugins=["users_broken", "no_such_module"])
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "--plugins is users_broken",
        "--plugins is no_such_module",
    ]
    assert plugins_on(["--a", "b", "--plugins", "one", "two", "--c", "d", "--plugins=three", "e"]) == [
        "one",
        "two",
        "three",
    ]
