"""Configuration files: reading, turning values into what the options want, writing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.core.atomic_file import write_text_atomically
from library.core.errors import ConfigError, did_you_mean
from library.core.options import (
    Config,
    allows_none,
    converter_of,
    is_bool_option,
    option_fields,
    parse_bool,
    value_type,
)
from library.core.text_files import parse_toml, read_text, toml_text
from library.training.keyword_args import split_words

NEVER_IN_FILE = frozenset({"config_file", "output_config"})


def config_path(name: str) -> Path:
    """The file that --config_file means; `.toml` may be left out."""
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def read_config_file(name: str) -> dict[str, Any]:
    """Keys and values of a TOML file, as written there. One level of tables is flattened, their names mean nothing.

    Raises ConfigError when the file is missing or is not TOML, and for tables inside tables.
    """
    path = config_path(name)
    if not path.is_file():
        raise ConfigError(f"--config_file is {name}; there is no file {path}")
    content = parse_toml(read_text(path), str(path))
    values: dict[str, Any] = {}
    for key, value in content.items():
        values.update(value if isinstance(value, dict) else {key: value})
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(
            [
                f"{path}: {key} is a table inside a table; options are written as key = value"
                f" (a dataset configuration belongs to --dataset_config)"
                for key in nested
            ]
        )
    return values


def convert_value(options_class: type, name: str, value: Any) -> Any:
    """`value`, a text from the command line or anything that TOML can hold, as the option's type.

    Raises ValueError with what is needed, ArgumentTypeError with a whole sentence (an option's own converter).
    """
    _, spec = option_fields(options_class)[name]
    if (value in ("", []) or value is None) and allows_none(options_class, name):
        return None
    if is_bool_option(options_class, name):
        if not isinstance(value, (bool, str)) and value not in (0, 1):
            raise ValueError("true or false")
        return _converted(parse_bool, str(value), "true or false")
    if spec.nargs is not None and spec.nargs != "?":
        items = value if isinstance(value, (list, tuple)) else _words(value) if isinstance(value, str) else [value]
        return [_convert_one(options_class, name, item) for item in items]
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
            raise ValueError(f"one {_kind_of(options_class, name)}, not a list")
        value = ",".join(str(item) for item in value)
    return _convert_one(options_class, name, value)


def _words(text: str) -> list[str]:
    try:
        return split_words(text)
    except ValueError:
        raise ValueError(f"words whose quotes are closed, or a list: {[text]!r}") from None


def _convert_one(options_class: type, name: str, value: Any) -> Any:
    _, spec = option_fields(options_class)[name]
    needed = _kind_of(options_class, name)
    if isinstance(value, bool) or isinstance(value, (dict, list)):
        raise ValueError(needed)
    if isinstance(value, float) and value_type(options_class, name) is int and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else str(value)
    result = (
        spec.convert(text) if spec.convert is not None else _converted(converter_of(options_class, name), text, needed)
    )
    if spec.choices is not None and result not in spec.choices:
        known = [str(choice) for choice in spec.choices if choice is not None]
        raise ValueError(f"one of {', '.join(known)}{did_you_mean(str(result), known)}")
    return result


def _converted(convert: Any, text: str, needed: str) -> Any:
    try:
        return convert(text)
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise ValueError(needed) from error


def _kind_of(options_class: type, name: str) -> str:
    kind = value_type(options_class, name)
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def write_config_file(name: str, config: Config, defaults: Mapping[str, Any]) -> Path:
    """Write the options that differ from their defaults, one table per group; secrets are left out.

    Raises ConfigError when the file exists.
    """
    path = config_path(name)
    if path.exists():
        raise ConfigError(f"--output_config would replace {path}; name another file with --config_file or remove it")
    tables = {}
    for options_class in config.classes():
        fields = option_fields(options_class)
        table = {
            key: _as_toml(getattr(config[options_class], key))
            for key, (field, spec) in fields.items()
            if key not in NEVER_IN_FILE
            and not spec.secret
            and getattr(config[options_class], key) != defaults.get(key, field.default)
        }
        if table:
            tables[options_class.__name__.removesuffix("Options").lower()] = table
    write_text_atomically(path, toml_text(tables))
    return path


def _as_toml(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return [_as_toml(item) for item in value]
    return str(value) if isinstance(value, Path) else value
