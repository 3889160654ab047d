"""Option groups from any object that has the options as attributes, as scripts of other trainers hand them around."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from library.core.options import Config, allows_none, option_fields
from library.training import parser_common
from library.training.option_reader import OptionReader

T = TypeVar("T")

logger = logging.getLogger("atelier")


def options_of(args: Any, options_class: type[T]) -> T:
    """The option group whose names are attributes of `args`; absent ones, and None where it means nothing, are left at
    their defaults. Raises ConfigError when a value is out of its range."""
    values = {name: getattr(args, name) for name in option_fields(options_class) if hasattr(args, name)}
    return options_class(
        **{name: value for name, value in values.items() if value is not None or allows_none(options_class, name)}
    )


def config_of(args: Any, family: str, trainable: str) -> Config:
    """The Config of a namespace that a script's parser made; what differs from a default counts as written by the user.
    ConfigError with all problems."""
    script = parser_common.script(family, trainable)
    given = {
        name: getattr(args, name)
        for name in script.owners
        if hasattr(args, name) and getattr(args, name) != script.default(name)
    }
    reader = OptionReader(script)
    config = reader.config(reader.without_refused(reader.converted(reader.with_meaning(given), "--{name}")))
    for note in reader.notes:
        logger.log(note.level, note.text)
    return config
