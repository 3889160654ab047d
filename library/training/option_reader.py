"""Reading the options of a script: command line, configuration file, what is refused and what is ignored.

An option of a script is one of these; `Script.status` tells which:

    works, equivalent   read; an equivalent one is answered with a line
    ignored             the known script takes it and does nothing with it: listed on the start page
    foreign             the known script does not have it: refused on the command line, ignored in a configuration file
    refused             an error with the reason, unless the value asks for nothing

A name that only other scripts or front ends know is treated like a foreign option; one that nobody knows is an error.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from library.core.console import make_console_safe
from library.core.errors import ConfigError, Problems, did_you_mean
from library.core.options import Config, Ignored, OptionSpec, add_options, allows_none, option_fields
from library.training.config_file import NEVER_IN_FILE, config_path, convert_value, read_config_file
from library.training.known_options import (
    ALSO_NEUTRAL,
    INSTEAD,
    OLD_OPTIONS,
    is_idle,
    is_neutral,
    known_defaults,
    why_ignored,
)


@dataclass(frozen=True)
class Script:
    """One script's options: `family` and `trainable` are the names, `classes` the groups in the order of the help."""

    family: str
    trainable: str
    classes: tuple[type, ...]
    refused: Mapping[str, str]
    defaults: Mapping[str, Any]
    ignored: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    """of the shared options those without meaning here; both: name -> reason"""
    read_values: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    """options of `foreign` of which some values are read all the same: name -> whether a value is one"""
    idle_values: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)
    """options that work, of which some values have no meaning: name -> (value as text -> why, None for the others)"""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """values of options without meaning that ask for what happens anyway"""
    stands_for: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """options that are another spelling of others: name -> these with their values, or functions of its own value"""
    following: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """defaults that follow from what was given: a function of the values by name"""
    shares_file: bool = False
    """a tool that reads the --config_file of a training: keys that are the training's alone are passed over"""

    @cached_property
    def owners(self) -> dict[str, type]:
        """Option name -> group. Raises ConfigError when two groups declare the same name."""
        owners: dict[str, type] = {}
        for options_class in self.classes:
            for name in option_fields(options_class):
                if name in owners:
                    raise ConfigError(
                        f"--{name} is declared in {owners[name].__name__} and {options_class.__name__}; an option has one"
                        " place, and a trainable names of its own"
                    )
                owners[name] = options_class
        return owners

    def spec(self, name: str) -> OptionSpec:
        return option_fields(self.owners[name])[name][1]

    def default(self, name: str) -> Any:
        return self.defaults.get(name, option_fields(self.owners[name])[name][0].default)

    def all_defaults(self) -> dict[str, Any]:
        return {name: self.default(name) for name in self.owners}

    def status(self, name: str) -> str:
        """works, equivalent, ignored, foreign or refused."""
        tables = {"refused": self.refused, "ignored": self.ignored, "foreign": self.foreign}
        return next((status for status, names in tables.items() if name in names), self.spec(name).status)

    def status_of(self, name: str, value: Any) -> str:
        """The status of an option with this value."""
        is_read = name in self.read_values and self.read_values[name](value)
        return "works" if is_read else "ignored" if self._idle_reason(name, value) else self.status(name)

    def _idle_reason(self, name: str, value: Any) -> str | None:
        reason = self.idle_values.get(name)
        return reason(str(value)) if reason is not None and self.status(name) == "works" else None

    def reason_of(self, name: str, value: Any) -> str | None:
        """Why an option with this value is refused, ignored or foreign."""
        return self._idle_reason(name, value) or self.reason(name)

    def reason(self, name: str) -> str | None:
        """Why an option is refused, ignored or foreign; the line that answers an equivalent one."""
        return next(
            (names[name] for names in (self.refused, self.ignored, self.foreign) if name in names),
            self.spec(name).reason,
        )

    def asks_for_nothing(self, name: str, value: Any) -> bool:
        """Whether a value of an option without meaning says what happens anyway."""
        return is_neutral(name, value, [self.default(name), *self.neutral.get(name, ALSO_NEUTRAL.get(name, ()))])


@dataclass(frozen=True)
class Note:
    """A line for the log that came up before the log was set up."""

    level: int
    text: str


class OptionsError(ConfigError):
    """Options that cannot be used. `config` holds the others, so that files and data can be looked at before the user
    is told; `failed` names the options at fault, which have their defaults in it."""

    def __init__(self, problems: Sequence[str], config: Config, failed: frozenset[str]) -> None:
        super().__init__(problems)
        self.config = config
        self.failed = failed


class OptionParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, not the list of two hundred options, and to which a dash is an
    underscore."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; all options: --help\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        make_console_safe()  # every script and tool begins here, also with --help
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._known_spelling(word) for word in words], namespace)

    def _known_spelling(self, word: str) -> str:
        """`--max-token-length` as `--max_token_length`, where that is an option and the word itself is none."""
        name, sign, value = word.partition("=")
        known = self._option_string_actions
        other = f"--{name[2:].replace('-', '_')}"
        return f"{other}{sign}{value}" if name.startswith("--") and name not in known and other in known else word


class _StrictParser(OptionParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def parser_of(what: Script, strict: bool = False) -> argparse.ArgumentParser:
    """The parser of a Script; `strict` raises ConfigError where argparse would end the process."""
    parser_class = _StrictParser if strict else OptionParser
    parser = parser_class(
        description=f"Train: {what.trainable} of {what.family}", allow_abbrev=False, usage="%(prog)s [options]"
    )
    for options_class in what.classes:
        add_options(
            parser,
            options_class,
            defaults=what.defaults,
            refused={**what.foreign, **what.refused},
            ignored=what.ignored,
        )
    return parser


class OptionReader:
    """Collects problems, notes and what is ignored while the sources are read one after the other."""

    def __init__(self, what: Script) -> None:
        self.what = what
        self.owners = what.owners
        self.problems = Problems()
        self.notes: list[Note] = []
        self.ignored: list[Ignored] = []
        self.failed: set[str] = set()

    def command_line(self, argv: Sequence[str]) -> dict[str, Any]:
        """Option name -> text or texts as written; unknown options become problems."""
        parser = parser_of(self.what, strict=True)
        for action in parser._actions:  # values are converted later, all problems at once
            action.type, action.choices = None, None
        try:
            namespace, unknown = parser.parse_known_args(list(argv))
        except ConfigError as error:
            self.problems.absorb(error)
            self.problems.raise_if_any()
        for token in unknown:
            self._unknown_on_line(token)
        return vars(namespace)

    def _unknown_on_line(self, token: str) -> None:
        if not token.startswith("--"):
            if not any("unknown option" in message or "other scripts" in message for message in self.problems.messages):
                self.problems.add(f"'{token}' belongs to no option; does a value with spaces lack its quotes?")
            return
        name = token[2:].partition("=")[0].replace("-", "_")
        if name in OLD_OPTIONS:
            self.ignored.append(Ignored(f"--{name}", OLD_OPTIONS[name]))
        elif name in known_defaults():
            instead = f"; {INSTEAD[name]}" if name in INSTEAD else ""
            self.problems.add(f"--{name} is an option of other scripts and has no meaning here{instead}")
        else:
            self.problems.add(f"unknown option --{name}{did_you_mean(name, self.owners)}")

    def file(self, name: str, on_line: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the configuration file; unknown keys become problems. `on_line`: what the command line has, which
        wins."""
        try:
            content = read_config_file(name)
        except ConfigError as error:
            self.problems.absorb(error)
            return {}
        path = config_path(name)
        aliases = {
            flag.lstrip("-").replace("-", "_"): option
            for option in self.owners
            for flag in self.what.spec(option).flags
        }
        content = {key.replace("-", "_"): value for key, value in content.items()}
        content = {aliases.get(key, key): value for key, value in content.items()}
        if self.what.shares_file:
            content = self._without_training_keys(content, path)
        own = {key: value for key, value in content.items() if key in self.owners and key not in NEVER_IN_FILE}
        self._others({key: value for key, value in content.items() if key not in own}, content, path)
        own = {key: value for key, value in own.items() if value != "" or self._takes_nothing(key)}
        return self.converted(self.with_meaning(own, path, replaced=on_line), f"{path}: {{name}}")

    def _takes_nothing(self, name: str) -> bool:
        """Whether an empty text is a value of an option; elsewhere it is how front ends write that nothing was
        given."""
        return allows_none(self.owners[name], name) or self.what.default(name) == ""

    def _without_training_keys(self, content: dict[str, Any], path: Any) -> dict[str, Any]:
        without = {**self.what.refused, **self.what.ignored, **self.what.foreign}
        others = [key for key in content if key in without or (key in known_defaults() and key not in self.owners)]
        if others:
            self.notes.append(
                Note(logging.INFO, f"{path}: keys of the training, passed over: {', '.join(sorted(others))}")
            )
        return {key: value for key, value in content.items() if key not in others}

    def _others(self, others: Mapping[str, Any], content: Mapping[str, Any], path: Any) -> None:
        """Keys that are no options of the script."""
        silent = []
        for key, value in others.items():
            if key not in known_defaults() or key in NEVER_IN_FILE:
                self.problems.add(f"{path}: unknown key {key}{did_you_mean(key, self.owners)}")
            elif is_neutral(key, value, known_defaults()[key]) or is_idle(key, content):
                silent.append(key)
            else:
                self.ignored.append(Ignored(f"{key} = {value!r}", why_ignored(key, content)))
        if silent:
            what = (
                "a key of other scripts that asks for nothing"
                if len(silent) == 1
                else "keys of other scripts that ask for nothing"
            )
            self.ignored.append(Ignored(", ".join(sorted(silent)), what))

    def with_meaning(self, values: Mapping[str, Any], path: Any = None, replaced: Iterable[str] = ()) -> dict[str, Any]:
        """The values without those of options that have no meaning here; `path` is the file that they stand in. What is
        `replaced` on the command line was looked at there."""
        kept = {}
        for name, value in values.items():
            status = self.what.status_of(name, value)
            if status != "ignored" and not (status == "foreign" and path is not None):
                kept[name] = value
            elif name not in replaced and not self.what.asks_for_nothing(name, value):
                self.ignored.append(Ignored(_as_written(name, value, path), str(self.what.reason_of(name, value))))
        return kept

    def converted(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The values in their types; `where` names an option in messages."""
        result = {}
        for name, value in values.items():
            if self.what.status(name) in ("refused", "foreign") and self.what.asks_for_nothing(name, value):
                continue
            shown = "***" if self.what.spec(name).secret else repr(value)
            try:
                result[name] = convert_value(self.owners[name], name, value)
            except ValueError as error:
                self.failed.add(name)
                self.problems.add(f"{where.format(name=name)} is {shown}; needed: {str(error) or 'another form'}")
            except argparse.ArgumentTypeError as error:
                self.failed.add(name)
                self.problems.add(f"{where.format(name=name)}: {error}")
        return result

    def without_refused(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Complain about refused options that ask for something, note the equivalent ones."""
        kept = {}
        for name, value in values.items():
            status = self.what.status_of(name, value)
            if status in ("refused", "foreign"):
                self.failed.add(name)
                self.problems.add(f"--{name} is {value}; it is not available here: {self.what.reason(name)}")
                continue
            kept[name] = value
            if status == "equivalent" and value != self.what.default(name):
                self.notes.append(Note(logging.INFO, str(self.what.reason(name))))
        return kept

    def config(self, values: dict[str, Any]) -> Config:
        """Read every group; OptionsError with all problems."""
        for name, meant in self.what.stands_for.items():
            if values.get(name):
                said = {other: value(values[name]) if callable(value) else value for other, value in meant.items()}
                values = {**values, **said}
        everything = {
            **self.what.defaults,
            **(self.what.following(values) if self.what.following else {}),
            **{name: value for name, value in values.items() if name not in self.failed},
        }
        groups = {}
        for options_class in self.what.classes:
            group = self._group(options_class, everything)
            if group is not None:
                groups[options_class] = group
        config = Config(groups, everything.keys() & values.keys(), self.ignored)
        if self.problems.messages:
            raise OptionsError(self.problems.messages, config, frozenset(self.failed))
        return config

    def _group(self, options_class: type, values: dict[str, Any]) -> Any:
        """One group. When its checks fail, the options that they name are taken out of `values`, to read the others;
        None when that does not help. A check that names an option which did not convert is not shown: it saw the
        default."""
        while True:
            try:
                return Config.read(values, [options_class])[options_class]
            except ConfigError as error:
                named = {
                    name
                    for problem in error.problems
                    for name in re.findall(r"--(\w+)", problem)
                    if name in option_fields(options_class)
                }
                for problem in error.problems:
                    if not names_any(problem, self.failed):
                        self.problems.add(problem)
                guilty = named & values.keys()
                self.failed |= named
                if not guilty:
                    return None
                for name in guilty:
                    del values[name]


def _as_written(name: str, value: Any, path: Any) -> str:
    """An option as it stands in a file (`path`), or on the command line (None)."""
    if path is not None:
        return f"{name} = {value!r}"
    words = [] if value is True else [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return " ".join([f"--{name}", *words])


def names_any(problem: str, names: Iterable[str]) -> bool:
    """Whether a message is about one of these options, or the dataset setting of the same name."""
    return any(re.search(rf"(?:--|\.|^){re.escape(name)}(?!\w)", problem) for name in names)
