"""What the tools for folders of images share: their command line, the files of a folder, batches read ahead, a count of
what was done."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from library.core.errors import AtelierError, ConfigError, Problems
from library.core.options import FALSE_TEXTS, TRUE_TEXTS, Config, add_options, is_bool_option, option, option_fields
from library.core.text_files import read_text
from library.scripts.command_line import read_command, refused_problems, tell_equivalent
from library.training.option_reader import OptionParser

logger = logging.getLogger("atelier")

T = TypeVar("T")
R = TypeVar("R")

READ_THREADS = 4
"""images decoded at a time where --max_data_loader_n_workers is not given"""


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """Output"""

    overwrite: bool = option(False, help="write over files that exist; without it they stay and are counted as skipped")


@dataclass(frozen=True, kw_only=True)
class DetailOptions:
    """Details"""

    debug: bool = option(False, help="one line for every image with what was made of it")


@dataclass(frozen=True)
class FolderTool:
    """The command line of a tool: option groups, those of their fields that are told by place, and what it does."""

    description: str
    classes: tuple[type, ...]
    positional: tuple[str, ...] = ()

    def parser(self) -> argparse.ArgumentParser:
        parser = OptionParser(description=self.description, allow_abbrev=False)
        for name in self.positional:
            spec = next(fields[name][1] for fields in map(option_fields, self.classes) if name in fields)
            parser.add_argument(name, help=spec.help)
        for options_class in self.classes:
            add_options(parser, options_class, skip=self.positional)
        return parser

    def read(self, argv: Sequence[str] | None, check: Callable[[Config], Iterable[str]] = lambda config: ()) -> Config:
        """The options, after every problem of theirs was looked for. ConfigError with all that `check` and the groups
        find."""
        config = read_command(self._plain(sys.argv[1:] if argv is None else argv), self.parser(), self.classes)
        problems = Problems()
        for message in (*refused_problems(config), *check(config), *_worker_problems(config)):
            problems.add(message)
        problems.raise_if_any()
        tell_equivalent(config)
        return config

    def _plain(self, words: Sequence[str]) -> list[str]:
        """The words with `=true` behind switches, which would otherwise take a folder that follows for their value."""
        switches = {
            flag for group in self.classes for name,
            (_, spec) in option_fields(group).items() if is_bool_option(group, name)
            for flag in (f"--{name}", *spec.flags)
        }  # fmt: skip
        truths = TRUE_TEXTS | FALSE_TEXTS
        return [
            f"{word}=true" if word in switches and following.lower() not in truths else word
            for word, following in zip(words, [*words[1:], ""])
        ]


def _worker_problems(config: Config) -> Iterator[str]:
    workers = config.values().get("max_data_loader_n_workers")
    if workers is not None and workers < 0:
        yield f"--max_data_loader_n_workers is {workers}; needed: 1 or more, or 0 for {READ_THREADS}"


# -- files -------------------------------------------------------------------------------------------------------------


def folder_problem(name: str, folder: str | None) -> str | None:
    """Why a folder cannot be read, or None."""
    if not folder:
        return f"{name} is missing; name a folder"
    if os.path.isfile(folder):
        return f"{name} is {folder}, which is a file; a folder is needed"
    return None if os.path.isdir(folder) else f"{name} is {folder}, which does not exist"


def files_of(folder: str, recursive: bool = False) -> list[str]:
    """Paths of all files in a folder, sorted; hidden ones (a name that begins with a dot) are left out."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        found += [os.path.join(where, name) for name in names if not name.startswith(".")]
    return sorted(found)


def images_of(folder: str, recursive: bool = False) -> list[str]:
    """Paths of the images of a folder, sorted. ConfigError when there are none."""
    from library.dataset.media_utils import image_extensions

    extensions = image_extensions()
    images = [path for path in files_of(folder, recursive) if os.path.splitext(path)[1].lower() in extensions]
    if not images:
        deeper = "" if recursive else ", or images in its folders with --recursive where the tool has it"
        raise ConfigError(f"{folder} holds no images; needed: files ending in {', '.join(sorted(extensions))}{deeper}")
    return images


def read_text_file(path: str) -> str:
    """A UTF-8 file, without a byte order mark. ConfigError."""
    return read_text(path)


# -- work --------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the files of a run."""

    done: int = 0
    skipped: Counter = field(default_factory=Counter)
    failed: int = 0

    def skip(self, reason: str) -> None:
        self.skipped[reason] += 1

    def fail(self, problem: object) -> None:
        """One file that could not be used; the others go on."""
        self.failed += 1
        logger.warning("%s; left out", problem)

    def finish(self, what: str) -> None:
        """The last line of a run. AtelierError (exit code 1) when nothing was done at all."""
        reasons = (
            f" ({', '.join(f'{count} {reason}' for reason, count in self.skipped.items())})" if self.skipped else ""
        )
        line = f"{what}: {self.done} done, {sum(self.skipped.values())} skipped{reasons}, {self.failed} failed"
        if not self.done:
            raise AtelierError(f"nothing was done; {line}")
        logger.info("%s", line)


def progress(values: Sequence[T], what: str, unit: str = "image") -> Iterable[T]:
    from tqdm import tqdm

    return tqdm(values, desc=what, unit=unit)


def read_ahead(
    read: Callable[[str], R], paths: Sequence[str], tally: Tally, *, what: str, workers: int | None = None
) -> Iterator[tuple[str, R]]:
    """(path, what `read` gave) in order, read in threads; files that cannot be read are told, counted and left out."""
    from tqdm import tqdm

    from library.dataset.background import map_ahead

    threads = workers or READ_THREADS
    with tqdm(total=len(paths), desc=what, unit="image") as bar:
        for path, result in map_ahead(read, paths, num_threads=threads, ahead=2 * threads):
            bar.update()
            if isinstance(result, AtelierError):
                tally.fail(result)
            elif isinstance(result, BaseException):
                raise result
            else:
                yield path, result


def batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` values; the last one may be shorter."""
    batch: list[T] = []
    for value in values:
        batch.append(value)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def numbers_problem(name: str, text: str | None, count: int, separator: str = ",", kind: Any = int) -> str | None:
    """A message when a text is not `count` positive numbers with a separator between them, or None. No text passes."""
    if text is None:
        return None
    try:
        values = [kind(part) for part in text.split(separator)]
    except ValueError:
        values = []
    if len(values) == count and all(0 < value < float("inf") for value in values):
        return None
    example = separator.join(("512", "768", "512", "768")[:count])
    return f"{name} is '{text}'; needed: {count} positive numbers with '{separator}' between them, e.g. {example}"
