"""Random tiny checkpoints of every family, in the files of real ones: for tests, and for trying a script offline.

The sets stand in the records of families as strings, so that reading the table imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from library.core.errors import ConfigError, did_you_mean
from library.core.registry import import_target
from library.families.record import FamilyRecord
from library.families.registry import Derived, script_name


class TinySet(Protocol):
    """The files that a builder wrote."""

    folder: Path

    def arguments(self) -> list[str]:
        """Command-line options that name the files."""
        ...


@dataclass(frozen=True)
class TinyEntry:
    """`build`: a function (folder, *, seed, dtype) -> TinySet; `family`: the name of its record; `script`: what
    trains it, with `network_module` and `options`; `first_frame`: its samples begin with a picture."""

    title: str
    build: str
    family: str
    script: str
    network_module: str
    options: tuple[str, ...] = ()
    first_frame: bool = False


def _sets_of(record: FamilyRecord) -> Iterator[tuple[str, TinyEntry]]:
    for tiny in record.tiny:
        yield (
            tiny.name,
            TinyEntry(
                tiny.title, tiny.build, record.name, f"{script_name(record.name)}.py", tiny.network_module,
                tiny.options, tiny.first_frame,
            ),
        )


TINY_SETS: Mapping[str, TinyEntry] = Derived(_sets_of)


def tiny_entry(name: str) -> TinyEntry:
    """The record of a set; ConfigError with the nearest name when there is none."""
    if name not in TINY_SETS:
        raise ConfigError(f"unknown tiny model '{name}'{did_you_mean(name, TINY_SETS) or '.'} Known: {', '.join(TINY_SETS)}")
    return TINY_SETS[name]


def build_tiny(name: str, folder: str | Path, *, seed: int = 0, **settings: Any) -> TinySet:
    """Write the set `name` into `folder` (made when missing): the same bytes for the same arguments.

    `settings` are those of the builder, `dtype` among them. ConfigError when there is no such set.
    """
    return import_target(tiny_entry(name).build)(folder, seed=seed, **settings)
