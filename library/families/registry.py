"""Where records of families are found: the files of this folder, the entry-point group `atelier.families` of installed
packages, and `register_family`. Every table of facts by family is derived from here."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from library import families
from library.core.errors import ConfigError, did_you_mean
from library.core.registry import import_target, installed_points
from library.families.record import FamilyRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")
_records: dict[str, FamilyRecord] = {}
_is_complete = False


def register_family(record: FamilyRecord) -> None:
    """Make a family known, before the options of a script are read. ValueError when its name is taken by another."""
    _find()
    _add(record)


def records() -> dict[str, FamilyRecord]:
    """All records by name, in the order in which lists show them."""
    _find()
    return dict(_records)


def record_of(name: str) -> FamilyRecord:
    """The record of a family that can be trained; ConfigError with the nearest name when there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family '{name}'{did_you_mean(name, FAMILIES) or '.'} Known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


class Derived(Mapping[str, T]):
    """The (name, value) pairs that `pairs` gives for every record; records that are registered later are seen too."""

    def __init__(self, pairs: Callable[[FamilyRecord], Iterable[tuple[str, T]]]) -> None:
        self._pairs = pairs
        self._of: list[FamilyRecord] | None = None
        self._made: dict[str, T] = {}

    def _table(self) -> dict[str, T]:
        """Made once for the records that are known: steps of a training read it."""
        _find()
        known = list(_records.values())
        if known != self._of:
            self._made = {name: value for record in known for name, value in self._pairs(record)}
            self._of = known
        return self._made

    def __getitem__(self, name: str) -> T:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


def by_family(make: Callable[[FamilyRecord], T | None]) -> Mapping[str, T]:
    """Name of a family -> what `make` gives for its record, where that is not None."""

    def pairs(record: FamilyRecord) -> Iterator[tuple[str, T]]:
        value = make(record)
        if value is not None:
            yield record.name, value

    return Derived(pairs)


FAMILIES: Mapping[str, FamilyRecord] = by_family(lambda record: record if record.family else None)
"""families that can be trained"""


def adapter_family_of(record: FamilyRecord) -> FamilyRecord:
    """The record whose adapters a family has: its own, or that of a family that shares them."""
    return records()[record.adapters_of] if record.adapters_of else record


def family_of_denoiser(class_name: str) -> str | None:
    """The family whose denoiser has this class name, or None."""
    return next((name for name, record in FAMILIES.items() if class_name in record.denoisers), None)


def script_name(family: str, kind: str = "train_network") -> str:
    """The script of a family that does what `train_network.py` does for the first one: its name without .py."""
    record = record_of(family)
    return (record_of(record.variant_of[0]) if record.variant_of else record).prefix + kind


def script_of_kind(kind: str, *, for_pictures: bool = False) -> str | None:
    """The script that trains adapters for a kind of model file, or makes images with it, with the option that chooses a
    variant; of a net beside a denoiser the script that trains it. None when no family here has it."""
    for name, record in FAMILIES.items():
        trained_by = next((own.script for own in record.model_kinds if own.name == kind), "")
        if trained_by and not for_pictures:
            return f"{record.scripts[trained_by].name}.py"
        if kind in record.kinds:
            script = record.pictures if for_pictures else f"{script_name(name)}.py"
            chosen_by = f" --{record.variant_of[1]} {record.variant_of[2]}" if script and record.variant_of else ""
            return f"{script}{chosen_by}"
    return None


def options_away_from(kind: str, wanted: Collection[str]) -> list[str]:
    """The options that chose the variant which needs one of the `wanted` kinds of model files, where its family has
    this kind."""
    chosen = [record for record in FAMILIES.values() if record.variant_of and not set(record.kinds).isdisjoint(wanted)]
    return [record.variant_of[1] for record in chosen if kind in record_of(record.variant_of[0]).kinds]


def variants_of(family: str) -> list[FamilyRecord]:
    """Records that an option of this family's scripts can choose instead of it."""
    return [record for record in FAMILIES.values() if record.variant_of is not None and record.variant_of[0] == family]


def _find() -> None:
    """Fill the table once: own records, then those of installed packages."""
    global _is_complete
    if _is_complete:
        return
    _is_complete = True  # before anything is imported that may look in here
    for module in pkgutil.iter_modules(families.__path__):
        record = getattr(importlib.import_module(f"{families.__name__}.{module.name}"), "FAMILY", None)
        if record is not None:
            _add(record)
    for name, target in installed_points("families").items():
        try:
            found = import_target(target)
            for record in [found] if isinstance(found, FamilyRecord) else list(found):
                _add(record)
        except Exception as error:  # whatever a package of the user's raises; scripts of other families go on
            logger.warning("the model family '%s' of an installed package is left out (%s): %s", name, target, error)


def _add(record: FamilyRecord) -> None:
    if not isinstance(record, FamilyRecord):
        raise TypeError(f"{record!r} is no FamilyRecord")
    if _records.get(record.name, record) != record:
        raise ValueError(f"a family is called '{record.name}' already; give the new one another name")
    _set([*_records.values(), record])


def _set(new: Iterable[FamilyRecord]) -> None:
    ordered = sorted(new, key=lambda record: (record.place, record.name))
    _records.clear()
    _records.update((record.name, record) for record in ordered)
