"""A dataset configuration file as checked tables: parsing, both table forms, and the complaints of the schema in words
for the user."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voluptuous import InInvalid, Invalid, MultipleInvalid, RequiredFieldInvalid, TypeInvalid

from library.core.errors import ConfigError, nearest_name
from library.core.text_files import parse_json, parse_toml, read_text, unique_keys
from library.dataset import DatasetOptions
from library.dataset.config_schema import (
    ALL_KINDS,
    COMMAND_LINE_ONLY,
    KEYS,
    LEVEL_NAMES,
    NOT_FLAT,
    OLD_NAMES,
    RENAMED,
    SECTIONS,
    LooseKeys,
    UnknownKey,
    by_place,
    is_flat,
    keys_of,
    schema_of,
)

BAD = object()
"""stands for a value that was refused, so that nothing else is said about it"""

Place = tuple["int | str", ...]
"""where something stands in the parsed file: ("datasets", 0, "subsets", 1, "num_repeats")"""


@dataclass(frozen=True)
class ConfigProblem:
    """One error of a dataset configuration. `path` is where it stands, e.g. `datasets[0].subsets[1].num_repeats`."""

    path: str
    kind: str
    """unknown_key, wrong_type, out_of_range, missing or conflict"""
    key: str
    message: str
    nearest: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@dataclass
class ProblemList:
    """The problems found so far; one per path and kind."""

    items: list[ConfigProblem] = field(default_factory=list)

    def add(self, path: str, kind: str, message: str, nearest: str | None = None) -> None:
        if not any(item.path == path and item.kind == kind for item in self.items):
            self.items.append(ConfigProblem(path, kind, path.rpartition(".")[2], message, nearest))


@dataclass(frozen=True)
class Table:
    """One table with its place; refused values are BAD."""

    path: str
    values: Mapping[str, Any]

    def where(self, name: str) -> str:
        return f"{self.path}.{name}"


@dataclass(frozen=True)
class DatasetTables:
    table: Table
    subsets: tuple[Table, ...]
    is_flat: bool = False
    """without subsets: it is its own one"""


@dataclass(frozen=True)
class ConfigTables:
    general: Table
    datasets: tuple[DatasetTables, ...]


class Scope:
    """Looks a key up: subset, dataset, general, command line, default; the first that is set wins, False, 0 and "" are
    set."""

    def __init__(self, options: DatasetOptions, *tables: Table) -> None:
        self.options = options
        self.tables = tables

    def get(self, name: str) -> Any:
        """The value in force; BAD when the table that decides holds a refused one."""
        for table in self.tables:
            if name in table.values:
                return table.values[name]
        key = KEYS[name]
        value = getattr(self.options, key.option) if key.option else None
        return key.default if value is None else value

    def written_at(self, name: str) -> str | None:
        """The path of the key in the file, None when it comes from the command line or is a default."""
        return next((table.where(name) for table in self.tables if name in table.values), None)

    def takes_option(self, name: str) -> bool:
        """Whether the key comes from the command line or is a default."""
        return self.written_at(name) is None

    def where(self, name: str) -> str:
        """The path to name in a message."""
        return self.written_at(name) or self.tables[0].where(name)

    def merged(self, name: str) -> dict[str, Any]:
        """A table that exists at several levels, merged key by key; the nearest level wins."""
        result: dict[str, Any] = {}
        for table in reversed(self.tables):
            value = table.values.get(name, {})
            result.update(value if value is not BAD else {})
        return result


def read_config_file(path: Path) -> dict[str, Any]:
    """The content of a .toml or .json file (UTF-8, with or without byte order mark). Raises ConfigError."""
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise ConfigError(f"--dataset_config {path} ends in '{suffix}'; a .toml or .json file is needed")
    text = read_text(path, f"--dataset_config {path}")
    if suffix == ".json":
        return parse_json(text, str(path), pairs_hook=unique_keys)
    return parse_toml(
        text, str(path), hint="; in TOML write Windows paths with / or in single quotes" if "\\" in text else ""
    )


def with_new_names(raw: Any, warnings: list[str]) -> Any:
    """The configuration with keys that were renamed under their new names; where a table has both, the new one
    counts."""

    def renewed(found: Any, where: str) -> Any:
        if not isinstance(found, Mapping) or not found.keys() & OLD_NAMES.keys():
            return found
        for name in found.keys() & OLD_NAMES.keys():
            warnings.append(f"{where}.{name} is called {OLD_NAMES[name]} now")
        new = {OLD_NAMES[name]: value for name, value in found.items() if name in OLD_NAMES}
        return {**new, **{name: value for name, value in found.items() if name not in OLD_NAMES}}

    if not isinstance(raw, Mapping):
        return raw
    raw = {name: renewed(value, name) if name == "general" else value for name, value in raw.items()}
    datasets = raw.get("datasets")
    if isinstance(datasets, list):
        return {**raw, "datasets": [renewed(found, f"datasets[{i}]") for i, found in enumerate(datasets)]}
    if isinstance(datasets, Mapping):
        return {**raw, "datasets": {name: renewed(found, f"datasets.{name}") for name, found in datasets.items()}}
    return raw


class ConfigReader:
    """Holds a parsed configuration against the schema of a script that takes `kinds` of dataset. What is wrong goes to
    `problems`."""

    def __init__(
        self, problems: ProblemList, *, kinds: frozenset[str] = ALL_KINDS, supports_dropout: bool = True,
        learns_videos: bool = False
    ) -> None:
        self.problems = problems
        self.kinds = kinds
        self.supports_dropout = supports_dropout
        self.learns_videos = learns_videos
        self._refused: set[Place] = set()
        self._misplaced: set[Place] = set()
        """keys that may not stand where they are"""

    def read(self, raw: Any) -> ConfigTables:
        """The tables with values in their types: BAD for a refused one; misplaced keys are left out."""
        self._refused.clear()
        self._misplaced.clear()
        try:
            schema_of(self.kinds, self.supports_dropout, self.learns_videos)(raw)
        except MultipleInvalid as found:
            for error in found.errors:
                self._note(error, raw)
        top = {} if () in self._refused else raw
        general = {} if ("general",) in self._refused else top.get("general", {})
        datasets = self._entries(("datasets",), top.get("datasets", []))
        return ConfigTables(self._table(("general",), general), tuple(self._dataset(*entry) for entry in datasets))

    def _dataset(self, path: Place, found: Mapping[str, Any]) -> DatasetTables:
        if is_flat(found, self.learns_videos):
            table = self._table(path, found)
            return DatasetTables(table, (table,), is_flat=True)
        own = {name: value for name, value in found.items() if name != "subsets"}
        subsets = self._entries((*path, "subsets"), found.get("subsets", []))
        return DatasetTables(self._table(path, own), tuple(self._table(*entry) for entry in subsets))

    def _entries(self, path: Place, found: Any) -> Iterable[tuple[Place, Mapping[str, Any]]]:
        """The tables below `path`, but for refused ones."""
        places = {} if path in self._refused else by_place(found)
        return [((*path, place), value) for place, value in places.items() if (*path, place) not in self._refused]

    def _table(self, path: Place, found: Mapping[str, Any]) -> Table:
        return Table(written(path), {
            name: BAD if (*path, name) in self._refused else KEYS[name].check(value)
            for name, value in found.items() if (*path, name) not in self._misplaced
        })

    # ---- messages

    def _note(self, error: Invalid, raw: Any) -> None:
        path, where = tuple(error.path), written(error.path)
        if isinstance(error, UnknownKey):
            self._misplaced.add(path)
            self._note_key(where, path, raw)
            return
        self._refused.add(path)
        if isinstance(error, (RequiredFieldInvalid, LooseKeys)):
            self.problems.add(where, "missing" if isinstance(error, RequiredFieldInvalid) else "conflict", error.msg)
            return
        value = functools.reduce(lambda found, part: found[part], path, raw)
        nearest = nearest_name(value, KEYS[path[-1]].choices) if isinstance(error, InInvalid) else None
        suggestion = f"; did you mean '{nearest}'?" if nearest else ""
        message = f"{'is' if path else 'the file holds'} {_shown(value)}; {error.msg}{suggestion}"
        self.problems.add(where, "wrong_type" if isinstance(error, TypeInvalid) else "out_of_range", message, nearest)

    def _note_key(self, where: str, path: Place, raw: Any) -> None:
        """Why a key may not stand at its place: there is none of the name, or it belongs elsewhere."""
        name, key = path[-1], KEYS.get(path[-1])
        level = "G" if path[0] == "general" else "D" if len(path) == 3 else "S"
        if level == "D" and is_flat(raw["datasets"][path[1]], self.learns_videos):
            level = "F"
        if len(path) == 1:
            self._unknown(where, name, "the top of the file", SECTIONS, nearest_name(name, SECTIONS))
        elif key is None and name in COMMAND_LINE_ONLY:
            message = f"is an option of the command line (--{name}) and not a key of the dataset config"
            self.problems.add(where, "unknown_key", message)
        elif key is None:
            accepted = keys_of(level, self.kinds)
            near = RENAMED.get(name) or nearest_name(name, accepted) or nearest_name(name, KEYS)
            self._unknown(where, name, LEVEL_NAMES[level], accepted, near)
        elif not key.fits(level):
            places = " or ".join(LEVEL_NAMES[place] for place in f"{key.levels}F" if key.fits(place))
            way = NOT_FLAT[name] if level == "F" and name in NOT_FLAT else f"write it in {places}"
            self.problems.add(where, "conflict", f"the key cannot stand in {LEVEL_NAMES[level]}; {way}")
        elif key.is_dropout and not self.supports_dropout:
            message = "this script trains words of the caption and has no caption dropout; remove the key"
            self.problems.add(where, "conflict", message)
        else:
            self.problems.add(where, "conflict", "this script has no dataset that uses the key; remove it")

    def _unknown(self, where: str, name: str, place: str, accepted: Iterable[str], nearest: str | None) -> None:
        suggestion = f"; did you mean '{nearest}'?" if nearest else "."
        message = f"unknown key '{name}'{suggestion} Keys of {place}: {', '.join(accepted)}"
        self.problems.add(where, "unknown_key", message, nearest)


def written(path: Iterable[int | str]) -> str:
    """A place as messages name it: `datasets[0].subsets[1].num_repeats`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
