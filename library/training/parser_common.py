"""From a command line to a Config: the option groups of a script, its parser, the merging of --config_file.

    command line  beats  --config_file  beats  the family's default  beats  the option's default

Nothing heavy is imported here: groups are named as texts and their packages hold options alone.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from library.errors import ConfigError, Problems, did_you_mean
from library.family_table import family_entry
from library.options import Config, OptionSpec, add_options, option_fields
from library.registry import import_target
from library.training.config_file import NEVER_IN_FILE, config_path, convert_value, read_config_file
from library.training.known_options import ALSO_NEUTRAL, INSTEAD, is_idle, is_neutral, known_defaults
from library.training.option_groups import SHARED_GROUPS

logger = logging.getLogger(__name__)

PACKAGE_GROUPS: tuple[str, ...] = (
    "library.dataset:DatasetOptions",
    "library.dataset:CachingOptions",
    "library.training.optimizers:OptimizerOptions",
    "library.training.schedulers:SchedulerOptions",
    "library.training.losses:LossOptions",
    "library.training.loss_weights:LossWeightOptions",
    "library.training.timestep_samplers:TimestepOptions",
    "library.training.inference_samplers:SamplerOptions",
)
PATH_OPTIONS: tuple[str, ...] = (
    "pretrained_model_name_or_path",
    "vae",
    "tokenizer_cache_dir",
    "train_data_dir",
    "conditioning_data_dir",
    "reg_data_dir",
    "output_dir",
    "logging_dir",
)
"""never recorded with the curves, and named in the log when W&B would record the command line"""


@dataclass(frozen=True)
class TrainableEntry:
    """`trainable`: class of library/training/trainables; `options`: its group, importable without torch;
    `refused`: options that this kind of training does not have, name -> reason."""

    trainable: str
    options: str
    refused: Mapping[str, str] = field(default_factory=dict)


TRAINABLES: dict[str, TrainableEntry] = {
    "network": TrainableEntry("library.training.trainables.network:NetworkTrainable", "library.training.adapters:NetworkOptions"),
}


@dataclass(frozen=True)
class Script:
    """One script's options: `family` and `trainable` are the names, `classes` the groups in the order of the help."""

    family: str
    trainable: str
    classes: tuple[type, ...]
    refused: Mapping[str, str]
    defaults: Mapping[str, Any]
    shares_file: bool = False
    """a tool that reads the --config_file of a training: keys that are the training's alone are passed over"""

    @cached_property
    def owners(self) -> dict[str, type]:
        """Option name -> group. Raises ValueError when two groups declare the same name."""
        owners: dict[str, type] = {}
        for options_class in self.classes:
            for name in option_fields(options_class):
                if name in owners:
                    raise ValueError(f"option {name} is declared in {owners[name].__name__} and {options_class.__name__}")
                owners[name] = options_class
        return owners

    def spec(self, name: str) -> OptionSpec:
        return option_fields(self.owners[name])[name][1]

    def default(self, name: str) -> Any:
        return self.defaults.get(name, option_fields(self.owners[name])[name][0].default)

    def all_defaults(self) -> dict[str, Any]:
        return {name: self.default(name) for name in self.owners}


@dataclass(frozen=True)
class Note:
    """A line for the log that came up before the log was set up."""

    level: int
    text: str


@dataclass(frozen=True)
class Parsed:
    config: Config
    notes: tuple[Note, ...]


class OptionsError(ConfigError):
    """Options that cannot be used. `config` holds the others, so that files and data can be looked at before the user is
    told; `failed` names the options at fault, which have their defaults in it."""

    def __init__(self, problems: Sequence[str], config: Config, failed: frozenset[str]) -> None:
        super().__init__(problems)
        self.config = config
        self.failed = failed


class OptionParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, not the list of two hundred options."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; all options: --help\n")


class _StrictParser(OptionParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def script(family: str, trainable: str) -> Script:
    """The options of the script that trains `trainable` of `family`."""
    family_class = import_target(family_entry(family).family)
    entry = TRAINABLES[trainable]
    packages = tuple(import_target(target) for target in PACKAGE_GROUPS)
    first, rest = SHARED_GROUPS[:2], SHARED_GROUPS[2:]
    return Script(
        family,
        trainable,
        classes=(*first, family_class.options, import_target(entry.options), *packages, *rest),
        refused={**family_class.refused, **entry.refused},
        defaults=family_class.defaults,
    )


def build_parser(family: str, trainable: str, strict: bool = False) -> argparse.ArgumentParser:
    """A parser of every option of a script. Options that are not given are absent from its namespace."""
    return parser_of(script(family, trainable), strict)


def parser_of(what: Script, strict: bool = False) -> argparse.ArgumentParser:
    """The parser of a Script; `strict` raises ConfigError where argparse would end the process."""
    parser_class = _StrictParser if strict else OptionParser
    parser = parser_class(description=f"Train: {what.trainable} of {what.family}", allow_abbrev=False, usage="%(prog)s [options]")
    for options_class in what.classes:
        add_options(parser, options_class, defaults=what.defaults, refused=what.refused)
    return parser


def parse(argv: Sequence[str] | None, family: str, trainable: str) -> Config:
    """Read the command line and the configuration file; raises one ConfigError with every problem."""
    parsed = parse_command(argv, family, trainable)
    for note in parsed.notes:
        logger.log(note.level, note.text)
    return parsed.config


def parse_command(argv: Sequence[str] | None, family: str, trainable: str) -> Parsed:
    """Like `parse`, with the log lines handed back: the log is set up from the options themselves."""
    return parse_script(argv, script(family, trainable))


def parse_script(argv: Sequence[str] | None, what: Script) -> Parsed:
    """The same for a Script that was put together elsewhere."""
    reader = _Reader(what)
    written = reader.command_line(sys.argv[1:] if argv is None else argv)
    on_line = reader.converted(written, "--{name}")
    in_file: dict[str, Any] = {}
    if on_line.get("config_file") and not on_line.get("output_config"):
        in_file = reader.file(on_line["config_file"])
    merged = reader.without_refused({**in_file, **on_line})
    config = reader.config(merged)
    return Parsed(config, (*reader.notes, *_privacy_notes(what, config, on_line)))


class _Reader:
    """Collects problems and notes while the sources are read one after the other."""

    def __init__(self, what: Script) -> None:
        self.what = what
        self.owners = what.owners
        self.problems = Problems()
        self.notes: list[Note] = []
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
        if name in known_defaults():
            self.problems.add(f"--{name} is an option of other scripts and has no meaning here{_instead(name)}")
        else:
            self.problems.add(f"unknown option --{name}{did_you_mean(name, self.owners)}")

    def converted(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The values in their types; `where` names an option in messages."""
        result = {}
        for name, value in values.items():
            if name in self.what.refused and _means_nothing(name, value, self.what.default(name)):
                continue
            try:
                result[name] = convert_value(self.owners[name], name, value)
            except ValueError as error:
                self.failed.add(name)
                self.problems.add(f"{where.format(name=name)} is {value!r}; needed: {str(error) or 'another form'}")
            except argparse.ArgumentTypeError as error:
                self.failed.add(name)
                self.problems.add(f"{where.format(name=name)}: {error}")
        return result

    def file(self, name: str) -> dict[str, Any]:
        """Values of the configuration file; its unknown and foreign keys become problems or one warning."""
        try:
            content = read_config_file(name)
        except ConfigError as error:
            self.problems.absorb(error)
            return {}
        path = config_path(name)
        if self.what.shares_file:
            content = self._without_training_keys(content, path)
        aliases = {flag.lstrip("-").replace("-", "_"): option for option in self.owners for flag in self.what.spec(option).flags}
        content = {aliases.get(key, key): value for key, value in content.items()}
        own = {key: value for key, value in content.items() if key in self.owners and key not in NEVER_IN_FILE}
        self._foreign({key: value for key, value in content.items() if key not in own}, own, path)
        return self.converted(own, f"{path}: {{name}}")

    def _without_training_keys(self, content: dict[str, Any], path: Any) -> dict[str, Any]:
        others = [key for key in content if key in self.what.refused or (key in known_defaults() and key not in self.owners)]
        if others:
            self.notes.append(Note(logging.INFO, f"{path}: keys of the training, passed over: {', '.join(sorted(others))}"))
        return {key: value for key, value in content.items() if key not in others}

    def _foreign(self, others: dict[str, Any], own: dict[str, Any], path: Any) -> None:
        ignored = []
        for key, value in others.items():
            if key not in known_defaults():
                self.problems.add(f"{path}: unknown key {key}{did_you_mean(key, self.owners)}")
            elif is_neutral(key, value, known_defaults()[key]) or is_idle(key, {**own, **others}) or _said_twice(key, value, own):
                ignored.append(key)
            else:
                self.problems.add(
                    f"{path}: {key} is {value!r}; it is a key of other scripts and has no meaning here{_instead(key)}"
                )
        if ignored:
            self.notes.append(
                Note(
                    logging.WARNING,
                    f"{path}: keys of other scripts, ignored as they ask for nothing: {', '.join(sorted(ignored))}",
                )
            )

    def without_refused(self, values: dict[str, Any]) -> dict[str, Any]:
        """Drop refused options that ask for nothing, complain about the others, note the equivalent ones."""
        kept, idle = {}, []
        for name, value in values.items():
            spec = self.what.spec(name)
            reason = self.what.refused.get(name) or (spec.reason if spec.status == "refused" else None)
            if reason is None:
                kept[name] = value
                if spec.status == "equivalent" and value != self.what.default(name):
                    self.notes.append(Note(logging.INFO, str(spec.reason)))
            elif is_neutral(name, value, [self.what.default(name)]):
                continue
            elif is_idle(name, values):
                idle.append(name)
            else:
                self.failed.add(name)
                self.problems.add(f"--{name} is {value}; it is not available here: {reason}")
        if idle:
            self.notes.append(Note(logging.WARNING, f"settings of features that are off, ignored: {', '.join(sorted(idle))}"))
        return kept

    def config(self, values: dict[str, Any]) -> Config:
        """Read every group; OptionsError with all problems."""
        everything = {**self.what.defaults, **{name: value for name, value in values.items() if name not in self.failed}}
        groups = {}
        for options_class in self.what.classes:
            group = self._group(options_class, everything)
            if group is not None:
                groups[options_class] = group
        config = Config(groups, everything.keys() & values.keys())
        if self.problems.messages:
            raise OptionsError(self.problems.messages, config, frozenset(self.failed))
        return config

    def _group(self, options_class: type, values: dict[str, Any]) -> Any:
        """One group. When its checks fail, the options that they name are taken out of `values`, to read the others; None
        when that does not help. A check that names an option which did not convert is not shown: it saw the default."""
        while True:
            try:
                return Config.read(values, [options_class])[options_class]
            except ConfigError as error:
                named = {name for problem in error.problems for name in re.findall(r"--(\w+)", problem) if name in option_fields(options_class)}
                for problem in error.problems:
                    if not names_any(problem, self.failed):
                        self.problems.add(problem)
                guilty = named & values.keys()
                self.failed |= named
                if not guilty:
                    return None
                for name in guilty:
                    del values[name]


def names_any(problem: str, names: Iterable[str]) -> bool:
    """Whether a message is about one of these options, or the dataset setting of the same name."""
    return any(re.search(rf"(?:--|\.|^){re.escape(name)}(?!\w)", problem) for name in names)


def _means_nothing(name: str, value: Any, default: Any) -> bool:
    """A refused option in a spelling of its default that the converter would not take (max_token_length = 75)."""
    return name in ALSO_NEUTRAL and is_neutral(name, value, [default])


def _said_twice(key: str, value: Any, own: Mapping[str, Any]) -> bool:
    """`epoch` beside an equal max_train_epochs, as front ends write it."""
    return key == "epoch" and "max_train_epochs" in own and str(own["max_train_epochs"]) == str(value)


def _instead(name: str) -> str:
    return f"; {INSTEAD[name]}" if name in INSTEAD else ""


def _privacy_notes(what: Script, config: Config, on_line: Mapping[str, Any]) -> list[Note]:
    """Secrets on the command line, which other programs and W&B can read; paths, when W&B is on."""
    notes = [
        Note(logging.WARNING, f"--{name} on the command line can be read by other programs; use --config_file or the environment")
        for name, value in on_line.items()
        if value and what.spec(name).secret
    ]
    if "log_with" in what.owners and config.value("log_with") in ("wandb", "all"):
        shown = [
            name
            for name in PATH_OPTIONS
            if str(on_line.get(name, "")).startswith(("/", "~")) or ":\\" in str(on_line.get(name, ""))
        ]
        if shown:
            notes.append(
                Note(
                    logging.INFO,
                    f"W&B may record the command line with these paths: {', '.join(shown)}; a --config_file avoids it",
                )
            )
    return notes
