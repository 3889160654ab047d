"""A dataset configuration file as checked tables: parsing, both table forms, names, types and ranges of single
values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.core.errors import ConfigError, nearest_name
from library.core.text_files import parse_json, parse_toml, read_text
from library.dataset import DatasetOptions
from library.dataset.config_schema import (
    ALL_KINDS,
    COMMAND_LINE_ONLY,
    KEYS,
    LEVEL_NAMES,
    RENAMED,
    OutOfRange,
    WrongType,
    keys_of,
)

BAD = object()
"""stands for a value that was refused, so that nothing else is said about it"""

SHAPE_HINT = (
    "datasets are written as [[datasets]] with [[datasets.subsets]], or, with a name, as [datasets.NAME] with"
    " [[datasets.NAME.subsets]]"
)


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
        return parse_json(text, str(path), pairs_hook=_without_duplicates)
    return parse_toml(
        text, str(path), hint="; in TOML write Windows paths with / or in single quotes" if "\\" in text else ""
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key '{name}' is there twice in one object")
        result[name] = value
    return result


class ConfigReader:
    """Checks names, types and ranges of a parsed configuration. What is wrong goes to `problems`."""

    def __init__(
        self, problems: ProblemList, *, kinds: frozenset[str] = ALL_KINDS, supports_dropout: bool = True
    ) -> None:
        self.problems = problems
        self.kinds = kinds
        self.supports_dropout = supports_dropout
        self._dataset_keys = frozenset((*KEYS, "subsets"))

    def read(self, raw: Any) -> ConfigTables:
        if not isinstance(raw, Mapping):
            self.problems.add("", "wrong_type", f"the file holds {_shown(raw)}; a table with [[datasets]] is needed")
            return ConfigTables(Table("general", {}), ())
        for name in raw:
            if name not in ("general", "datasets"):
                nearest = nearest_name(name, ("general", "datasets"))
                self._unknown(name, name, "the top of the file", ("general", "datasets"), nearest)
        general = raw.get("general", {})
        if not isinstance(general, Mapping):
            self.problems.add("general", "wrong_type", f"is {_shown(general)}; a table [general] is needed")
            general = {}
        return ConfigTables(self._table(general, "general", "G"), tuple(self._datasets(raw)))

    def _datasets(self, raw: Mapping[str, Any]) -> Iterable[DatasetTables]:
        found = raw.get("datasets", [])
        if not isinstance(found, (list, Mapping)):
            self.problems.add("datasets", "wrong_type", f"is {_shown(found)}; {SHAPE_HINT}")
            return
        if not found:
            self.problems.add("datasets", "missing", f"the dataset config has no [[datasets]]; {SHAPE_HINT}")
        if isinstance(found, Mapping):
            loose = [
                name for name, value in found.items() if name in self._dataset_keys and not isinstance(value, Mapping)
            ]
            if loose:
                self.problems.add(
                    "datasets", "conflict", f"the keys {', '.join(loose)} stand directly under [datasets]; {SHAPE_HINT}"
                )
                return
            named = [(f"datasets.{name}", value) for name, value in found.items()]
        else:
            named = [(f"datasets[{i}]", value) for i, value in enumerate(found)]
        for path, value in named:
            if isinstance(value, Mapping):
                yield DatasetTables(self._table(value, path, "D"), tuple(self._subsets(value, path)))
            else:
                self.problems.add(path, "wrong_type", f"is {_shown(value)}; {SHAPE_HINT}")

    def _subsets(self, dataset: Mapping[str, Any], path: str) -> Iterable[Table]:
        found = dataset.get("subsets", [])
        path = f"{path}.subsets"
        if not isinstance(found, list):
            self.problems.add(path, "wrong_type", f"is {_shown(found)}; a list of tables is needed, [[...subsets]]")
            return
        if not found:
            self.problems.add(
                path, "missing", "the dataset has no subsets; give each folder or metadata file a [[...subsets]] table"
            )
        for i, value in enumerate(found):
            if isinstance(value, Mapping):
                yield self._table(value, f"{path}[{i}]", "S")
            else:
                self.problems.add(
                    f"{path}[{i}]", "wrong_type", f"is {_shown(value)}; a table is needed, [[...subsets]]"
                )

    def _table(self, raw: Mapping[str, Any], path: str, level: str) -> Table:
        values: dict[str, Any] = {}
        for name, value in raw.items():
            if name == "subsets" and level == "D":
                continue
            if self._known(name, path, level):
                values[name] = self._value(name, value, f"{path}.{name}")
        return Table(path, values)

    def _known(self, name: str, path: str, level: str) -> bool:
        """Whether the key may stand here; otherwise the problem is noted. Kinds are looked at later, per dataset."""
        where = f"{path}.{name}"
        accepted = keys_of(level, self.kinds)
        key = KEYS.get(name)
        if key is None and name in COMMAND_LINE_ONLY:
            self.problems.add(
                where, "unknown_key", f"is an option of the command line (--{name}) and not a key of the dataset config"
            )
        elif key is None:
            near = RENAMED.get(name) or nearest_name(name, accepted) or nearest_name(name, KEYS)
            self._unknown(where, name, LEVEL_NAMES[level], accepted, near)
        elif level not in key.levels:
            places = " or ".join(LEVEL_NAMES[place] for place in key.levels)
            self.problems.add(where, "conflict", f"the key cannot stand in {LEVEL_NAMES[level]}; write it in {places}")
        elif key.is_dropout and not self.supports_dropout:
            self.problems.add(
                where, "conflict", "this script trains words of the caption and has no caption dropout; remove the key"
            )
        elif level == "G" and not key.kinds & self.kinds:
            self.problems.add(where, "conflict", "this script has no dataset that uses the key; remove it")
        else:
            return True
        return False

    def _unknown(self, where: str, name: str, place: str, accepted: Iterable[str], nearest: str | None) -> None:
        suggestion = f"; did you mean '{nearest}'?" if nearest else "."
        self.problems.add(
            where, "unknown_key", f"unknown key '{name}'{suggestion} Keys of {place}: {', '.join(accepted)}", nearest
        )

    def _value(self, name: str, value: Any, where: str) -> Any:
        try:
            return KEYS[name].parse(value)
        except WrongType as error:
            self.problems.add(where, "wrong_type", f"is {_shown(value)}; {error}")
        except OutOfRange as error:
            suggestion = f"; did you mean '{error.nearest}'?" if error.nearest else ""
            self.problems.add(where, "out_of_range", f"is {_shown(value)}; {error}{suggestion}", error.nearest)
        return BAD


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
