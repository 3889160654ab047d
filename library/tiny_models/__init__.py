"""Random tiny checkpoints of every family, in the files of real ones: for tests, and for trying a script offline.

One record per set: strings only, so that reading the table imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from library.core.errors import ConfigError, did_you_mean
from library.core.registry import import_target


class TinySet(Protocol):
    """The files that a builder wrote."""

    folder: Path

    def arguments(self) -> list[str]:
        """Command-line options that name the files."""
        ...


@dataclass(frozen=True)
class TinyEntry:
    """`build`: a function (folder, *, seed, dtype) -> TinySet; `family`: the family's name in family_table; `script`: what
    trains it, with `network_module` and `options`."""

    title: str
    build: str
    family: str
    script: str
    network_module: str
    options: tuple[str, ...] = ()


_HERE = "library.tiny_models"
TINY_SETS: dict[str, TinyEntry] = {
    "flux": TinyEntry("FLUX.1 dev", f"{_HERE}.flux_tiny:build_tiny_flux", "flux", "flux_train_network.py", "networks.lora_flux"),
    "sd1": TinyEntry("Stable Diffusion 1", f"{_HERE}.sd_tiny:build_tiny_sd1", "sd", "train_network.py", "networks.lora"),
    "sd2": TinyEntry(
        "Stable Diffusion 2, velocity prediction", f"{_HERE}.sd_tiny:build_tiny_sd2", "sd", "train_network.py", "networks.lora",
        ("--v_parameterization",),
    ),
    "sdxl": TinyEntry("SDXL", f"{_HERE}.sdxl_tiny:build_tiny_sdxl", "sdxl", "sdxl_train_network.py", "networks.lora"),
    "anima": TinyEntry("Anima", f"{_HERE}.anima_tiny:build_tiny_anima", "anima", "anima_train_network.py", "networks.lora_anima"),
}  # fmt: skip


def tiny_entry(name: str) -> TinyEntry:
    """The record of a set; ConfigError with the nearest name when there is none."""
    if name not in TINY_SETS:
        raise ConfigError(f"unknown tiny model '{name}'{did_you_mean(name, TINY_SETS)} Known: {', '.join(TINY_SETS)}")
    return TINY_SETS[name]


def build_tiny(name: str, folder: str | Path, *, seed: int = 0, **settings: Any) -> TinySet:
    """Write the set `name` into `folder` (made when missing): the same bytes for the same arguments.

    `settings` are those of the builder, `dtype` among them. ConfigError when there is no such set.
    """
    return import_target(tiny_entry(name).build)(folder, seed=seed, **settings)
