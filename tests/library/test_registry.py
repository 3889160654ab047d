"""Registries: adding, finding, importing; and the tables of the project, each with its first entries."""

from __future__ import annotations

import types

import pytest

from library.core.errors import ConfigError
from library.core.registry import Registry, import_target
from library.training.adapters import NETWORKS
from library.training.inference_samplers import INFERENCE_SAMPLERS
from library.training.loss_weights import LOSS_WEIGHTS
from library.training.losses import LOSSES
from library.training.optimizers import OPTIMIZERS
from library.training.schedulers import SCHEDULERS
from library.training.timestep_samplers import TIMESTEP_SAMPLERS

TABLES = (OPTIMIZERS, SCHEDULERS, LOSSES, LOSS_WEIGHTS, TIMESTEP_SAMPLERS, INFERENCE_SAMPLERS, NETWORKS)


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
    with pytest.raises(ConfigError, match=r"unknown formula 'ratoi' \(--formula_type\); did you mean 'ratio'\? Known: ratio"):
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


@pytest.mark.parametrize("target, kind", [("networks.lora", types.ModuleType), ("json", types.ModuleType), ("fractions.Fraction", type)])
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
