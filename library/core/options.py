"""Options are fields of frozen dataclasses: declared once, parsed once, handed on as plain data.

    @dataclass(frozen=True, kw_only=True)
    class SavingOptions:
        '''Where and when files are written.'''
        output_dir: str | None = option(None, help="folder of the trained files")

A field's status says what a script does with it:
  works       the default
  refused     accepted only with its neutral value (the default); anything else is a start-up error with `reason`
  ignored     accepted and without meaning here, as in the known script; the start page lists it with `reason`
  equivalent  chooses among ways with equal results; accepted, and one log line says what is used
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

from library.core.errors import ConfigError, Problems

T = TypeVar("T")

METADATA_KEY = "atelier_option"
LARGEST_WHOLE = 2**31 - 1
"""of a whole number whose option says nothing else: more steps, files or images than any run has"""
LARGEST_NUMBER = 3.4028234663852886e38
"""of float32, in which numbers end up; what lies beyond it is infinite there"""
LARGEST_SEED = 2**64 - 1
LARGEST_SIDE = 65_536
"""pixels of a training image or bucket"""
LARGEST_PICTURE_SIDE = 16_384
"""pixels of a picture that is made"""
LARGEST_BATCH = 65_536
LARGEST_TOKENS = 8_192
LARGEST_RANK = 1_000_000
"""users of LoKr write it for whole matrices"""
LARGEST_STEPS = 10_000
"""of a sampler"""
TRUE_TEXTS = frozenset({"true", "1", "yes", "on"})
FALSE_TEXTS = frozenset({"false", "0", "no", "off"})


@dataclasses.dataclass(frozen=True)
class OptionSpec:
    """What argparse and the configuration file need to know of one field."""

    help: str
    convert: Callable[[str], Any] | None = None
    nargs: str | int | None = None
    choices: tuple[Any, ...] | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    secret: bool = False
    least: float | None = None
    most: float | None = None
    repeatable: bool = False
    status: str = "works"
    reason: str | None = None


def option(
    default: Any = None,
    *,
    help: str,
    convert: Callable[[str], Any] | None = None,
    nargs: str | int | None = None,
    choices: Sequence[Any] | None = None,
    flags: Sequence[str] = (),
    metavar: str | None = None,
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    repeatable: bool = False,
) -> Any:
    """A dataclass field that is a command-line option as well.

    `convert` turns the text into the value (default: from the field's annotation); `flags` are further spellings;
    `least` and `most` are the smallest and the largest number that make sense. Every number is checked against them, or
    against LARGEST_WHOLE and LARGEST_NUMBER. A list that is `repeatable` grows with each `--name value`; of others the
    last one counts.
    """
    spec = OptionSpec(
        help,
        convert,
        nargs,
        tuple(choices) if choices is not None else None,
        tuple(flags),
        metavar,
        secret,
        least,
        most,
        repeatable,
    )
    return dataclasses.field(default=default, metadata={METADATA_KEY: spec}, repr=not secret)


def refused_option(default: Any = None, *, help: str, reason: str, **how: Any) -> Any:
    """An option of the known scripts that this script does not have: its default passes, all else is an error."""
    return _with_status(option(default, help=help, **how), "refused", reason)


def ignored_option(default: Any = None, *, help: str, reason: str, **how: Any) -> Any:
    """An option that the known scripts take and that changes nothing here; `reason` stands on the start page."""
    return _with_status(option(default, help=help, **how), "ignored", reason)


def equivalent_option(default: Any = None, *, help: str, reason: str, **how: Any) -> Any:
    """An option that chooses among ways with equal results; `reason` is the log line that says what is used."""
    return _with_status(option(default, help=help, **how), "equivalent", reason)


def _with_status(field: Any, status: str, reason: str) -> Any:
    spec = dataclasses.replace(field.metadata[METADATA_KEY], status=status, reason=reason)
    return dataclasses.field(default=field.default, metadata={METADATA_KEY: spec})


def parse_bool(text: str | bool) -> bool:
    """true/1/yes/on and false/0/no/off, in any case."""
    if isinstance(text, bool):
        return text
    lowered = str(text).strip().lower()
    if lowered in TRUE_TEXTS:
        return True
    if lowered in FALSE_TEXTS:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a truth value; use true or false")


def number_or_none(text: str | float) -> float | None:
    """A number above 0; 0 is the same as not given, as front ends write it."""
    try:
        return float(text) or None
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


AUTO = "auto"
"""of a number that the program finds"""


def number_or_auto(text: str | int) -> int | str:
    """A whole number or AUTO."""
    if str(text).strip().lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor {AUTO}") from None


def count_or_none(text: str | int) -> int | None:
    """A count of 1 or more; 0 is the same as not given, as front ends write it. Negative ones are left to the
    checks."""
    try:
        return int(text) or None
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


@functools.cache
def option_fields(options_class: type) -> dict[str, tuple[dataclasses.Field, OptionSpec]]:
    """Name -> (dataclass field, spec) of the fields that were made with option()."""
    return {
        field.name: (field, field.metadata[METADATA_KEY])
        for field in dataclasses.fields(options_class)
        if METADATA_KEY in field.metadata
    }


@functools.cache
def _hints(options_class: type) -> dict[str, Any]:
    return typing.get_type_hints(options_class)


def allows_none(options_class: type, name: str) -> bool:
    """Whether the annotation of a field admits None: such an option can be "not given"."""
    return type(None) in typing.get_args(_hints(options_class)[name])


def value_type(options_class: type, name: str) -> type:
    """The type behind a field's annotation: `float | None` -> float, `list[str] | None` -> str."""
    hint = _hints(options_class)[name]
    if typing.get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) in (list, tuple):
        hint = typing.get_args(hint)[0]
    return hint if isinstance(hint, type) else str


def is_bool_option(options_class: type, name: str) -> bool:
    return value_type(options_class, name) is bool


def converter_of(options_class: type, name: str) -> Callable[[str], Any]:
    """The function that turns a text into a value of this option; raises ValueError or ArgumentTypeError."""
    _, spec = option_fields(options_class)[name]
    if spec.convert is not None:
        return spec.convert
    kind = value_type(options_class, name)
    return parse_bool if kind is bool else (kind if kind in (int, float, str, Path) else str)


def add_options(
    parser: argparse.ArgumentParser,
    options_class: type,
    skip: Iterable[str] = (),
    *,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    refused: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> None:
    """Add the options of a class to a parser as one titled group. Values that are not given are left out of the
    namespace, so that the command line can win over a configuration file without guessing. `defaults` holds those that
    differ from the fields' own, `refused` names options that the script does not have and `ignored` those without
    meaning there, all for the help."""
    group = parser.add_argument_group((options_class.__doc__ or options_class.__name__).strip().splitlines()[0])
    skipped, refused, ignored = set(skip), set(refused), set(ignored)
    for name, (field, spec) in option_fields(options_class).items():
        if name in skipped:
            continue
        help_text = spec.help.replace("%", "%%")
        if spec.status == "refused" or name in refused:
            help_text += " [not available here]"
        elif spec.status == "ignored" or name in ignored:
            help_text += " [ignored here]"
        default = defaults.get(name, field.default)
        if default is not None and default is not False and default != "":
            help_text += f" (default: {default})".replace("%", "%%")
        flags = [f"--{name}", *spec.flags]
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
        if is_bool_option(options_class, name):
            group.add_argument(*flags, nargs="?", const=True, type=parse_bool, metavar="true|false", **common)
            group.add_argument(
                f"--no-{name}", f"--no_{name}" if not name.startswith("no_") else f"--no-{name.replace('_', '-')}",
                dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )
        else:
            group.add_argument(
                *flags, type=converter_of(options_class, name), nargs=spec.nargs,
                choices=[c for c in spec.choices if c is not None] if spec.choices else None,
                metavar=spec.metavar, action="extend" if spec.repeatable else "store", **common,
            )


def number_problem(
    value: float, is_whole: bool, most: float | None = None, least: float | None = None
) -> str | None:
    """What is needed instead of a number that is not finite, too small, or too large in size; None when it is right."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if least is not None and most is not None and not least <= value <= most:
        return f"a {'whole ' if is_whole else ''}number from {least:g} to {most:.9g}"
    if least is not None and value < least:
        return f"{least:g} or more"
    largest = most if most is not None else LARGEST_WHOLE if is_whole else LARGEST_NUMBER
    if abs(value) <= largest:
        return None
    return f"a whole number of at most {int(largest)}" if is_whole else f"a number of at most {largest:.9g}"


def range_problems(values: Mapping[str, Any], options_class: type) -> dict[str, str]:
    """Name -> message of every option whose number, or one of whose numbers, no run can use."""
    problems = {}
    for name, (_, spec) in option_fields(options_class).items():
        value, is_whole = values.get(name), value_type(options_class, name) is not float
        for part in value if isinstance(value, (list, tuple)) else [value]:
            needed = (
                number_problem(part, is_whole, spec.most, spec.least)
                if isinstance(part, (int, float)) and not isinstance(part, bool)
                else None
            )
            if needed is not None:
                problems[name] = f"--{name} is {shortened(part)}; needed: {needed}"
    return problems


def shortened(value: Any, characters: int = 30) -> str:
    """For messages: the beginning of a long value."""
    text = str(value)
    return text if len(text) <= characters else f"{text[:characters]}... ({len(text)} characters)"


def read_options(values: Mapping[str, Any], options_class: type[T]) -> T:
    """Build the dataclass from the values that were given; absent ones keep their defaults.

    Raises ConfigError with every number that is out of range and everything that a check in `__post_init__` finds.
    """
    given = {name: values[name] for name in option_fields(options_class) if name in values}
    problems = range_problems(given, options_class)
    try:
        group = options_class(**given)
    except ConfigError as error:
        told = [message for name, message in problems.items() if not any(f"--{name} " in own for own in error.problems)]
        raise ConfigError([*told, *error.problems]) from None
    if problems:
        raise ConfigError(problems.values())
    return group


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Something that the user wrote and that has no meaning in this run: `written` is how it stands there."""

    written: str
    reason: str

    def __str__(self) -> str:
        return f"{self.written}: {self.reason}"


def without_effect(names: Iterable[str], reason: str) -> list[Ignored]:
    """Options, without dashes, that do nothing in this run, all for one reason (no full stop)."""
    return [Ignored(f"--{name}", f"has no effect: {reason}") for name in names]


class MissingGroup(KeyError):
    """A group of options that a Config does not hold, because its values could not be read."""


class Config:
    """All option groups of one run, read by class: `config[SavingOptions].output_dir`.

    `explicit` holds the names that the user wrote, on the command line or in a file; `ignored` what was written there
    and has no meaning for the script.
    """

    def __init__(
        self, groups: Mapping[type, Any], explicit: Iterable[str] = (), ignored: Iterable[Ignored] = ()
    ) -> None:
        self._groups = dict(groups)
        self.explicit = frozenset(explicit)
        self.ignored = tuple(ignored)

    def __getitem__(self, options_class: type[T]) -> T:
        try:
            return self._groups[options_class]
        except KeyError:
            raise MissingGroup(options_class) from None

    def __contains__(self, options_class: object) -> bool:
        return options_class in self._groups

    def classes(self) -> list[type]:
        return list(self._groups)

    def values(self) -> dict[str, Any]:
        """Every option by name, for logs and metadata."""
        return {
            name: getattr(group, name) for group in self._groups.values() for name in option_fields(type(group))
        }

    def value(self, name: str) -> Any:
        for group in self._groups.values():
            if name in option_fields(type(group)):
                return getattr(group, name)
        raise KeyError(name)

    @classmethod
    def read(cls, values: Mapping[str, Any], classes: Sequence[type]) -> Config:
        """Read every group; the problems of all groups are raised together."""
        config, problems = cls.read_partly(values, classes)
        problems.raise_if_any()
        return config

    @classmethod
    def read_partly(cls, values: Mapping[str, Any], classes: Sequence[type]) -> tuple[Config, Problems]:
        """The groups that can be read, and the problems of the others."""
        problems, groups = Problems(), {}
        for options_class in classes:
            try:
                groups[options_class] = read_options(values, options_class)
            except ConfigError as error:
                problems.absorb(error)
        return cls(groups, values.keys()), problems
