"""Packages that the tests compare with, and what these ask of each other."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import pytest

# (who asks, whom): the asking one carries a table of wishes, which pip does not look at. transformers names a release
# of diffusers too, for tests of its own.
WISHES = (("transformers", "peft"), ("diffusers", "peft"), ("diffusers", "transformers"))


def disagreements(*packages: str) -> list[str]:
    """What one of these packages (all, when none is named) asks of another and the installed release is not."""
    requirement = importlib.import_module("packaging.requirements").Requirement
    found = []
    for asking, asked in WISHES:
        if packages and not {asking, asked} <= set(packages):
            continue
        try:
            wish = importlib.import_module(f"{asking}.dependency_versions_table").deps.get(asked, asked)
            installed = version(asked)
        except (ImportError, PackageNotFoundError):
            continue
        if not requirement(wish).specifier.contains(installed, prereleases=True):
            found.append(f"{asking} {version(asking)} asks for {wish}, and {asked} {installed} is installed")
    return found


def need_agreement(*packages: str) -> None:
    """Skip a test of these packages together while two of them disagree, and say which."""
    found = disagreements(*packages)
    if found:
        pytest.skip("two third parties disagree: " + "; ".join(found))
