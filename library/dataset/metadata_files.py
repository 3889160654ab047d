"""Metadata files of fine-tuning datasets: a JSON object keyed by image, or JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from library.core.errors import ConfigError
from library.core.text_files import parse_json, read_text

MOST_SHOWN = 10


@dataclass(frozen=True)
class MetadataEntry:
    """One image of a metadata file: the key as written and what is said of it (caption, tags, image_size, ...)."""

    key: str
    values: dict[str, Any] = field(default_factory=dict)


def read_metadata_file(path: str) -> list[MetadataEntry]:
    """The entries of a metadata file, sorted by key. `.jsonl` by suffix, everything else is one JSON object.

    Raises ConfigError naming file and line for what cannot be read, all of it at once.
    """
    text = read_text(path, f"the metadata file {path}")
    problems: list[str] = []
    reader = _from_lines if path.lower().endswith(".jsonl") else _from_object
    entries = list(reader(path, text, problems))
    if problems:
        more = len(problems) - MOST_SHOWN
        raise ConfigError(problems[:MOST_SHOWN] + ([f"{path}: {more} more faulty entries"] if more > 0 else []))
    return sorted(entries, key=lambda entry: entry.key)


def _from_object(path: str, text: str, problems: list[str]) -> Iterator[MetadataEntry]:
    try:
        content = parse_json(text, path)
    except ConfigError as error:
        problems.append(str(error))
        return
    if not isinstance(content, dict):
        problems.append(
            f"{path} holds a {type(content).__name__}; an object that maps each image to its entry is needed"
        )
        return
    for key, values in content.items():
        if _is_entry(values, f"{path}: {key}", problems):
            yield MetadataEntry(key, values)


def _from_lines(path: str, text: str, problems: list[str]) -> Iterator[MetadataEntry]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = parse_json(line, where)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if not _is_entry(values, where, problems):
            continue
        key = values.get("image_path")
        if isinstance(key, str) and key:
            yield MetadataEntry(key, values)
        else:
            problems.append(f"{where} has no image_path")


def _is_entry(values: Any, where: str, problems: list[str]) -> bool:
    if not isinstance(values, dict):
        problems.append(f"{where} is not an object with caption or tags")
        return False
    for name in ("caption", "tags"):
        value = values.get(name)
        is_list = name == "tags" and isinstance(value, list)
        if value is not None and not isinstance(value, str) and not is_list:
            problems.append(f"{where}: {name} is {value!r}; a text is needed")
            return False
    return True


class ImageFinder:
    """Finds the files that metadata keys mean; keys may lack the extension. Each folder is listed once."""

    def __init__(self, image_dir: str | None, extensions: frozenset[str]) -> None:
        self.image_dir = image_dir
        self.extensions = extensions
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, key: str) -> str:
        """The path of the image. Raises ConfigError when there is none."""
        if not os.path.isabs(key) and self.image_dir is None:
            raise ConfigError(
                f"the key '{key}' is a relative path; the subset needs an image_dir (without a dataset configuration: "
                "--train_data_dir)"
            )
        path = key if os.path.isabs(key) else os.path.join(self.image_dir or "", key)
        if os.path.splitext(path)[1].lower() in self.extensions:
            if not os.path.isfile(path):
                raise ConfigError(f"{path} does not exist")
            return path
        folder, stem = os.path.split(path)
        names = self._listed(folder).get(stem)
        if not names:
            raise ConfigError(f"{path} does not exist, neither as it is nor with an image extension")
        return os.path.join(folder, names[0])

    def _listed(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._stems:
            stems: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
                stem, extension = os.path.splitext(name)
                if extension.lower() in self.extensions:
                    stems.setdefault(stem, []).append(name)
            self._stems[folder] = stems
        return self._stems[folder]
