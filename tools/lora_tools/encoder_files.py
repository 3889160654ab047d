"""Options of tools for the text encoders that families have in files of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from library.core.options import option
from library.families.record import EncoderFile
from library.families.registry import FAMILIES


def encoder_files() -> list[EncoderFile]:
    """Each once, in the order of the families."""
    found = {file.option: file for record in FAMILIES.values() for file in record.encoder_files}
    return list(found.values())


def encoder_options() -> tuple[str, ...]:
    """The options by which trainers name these files."""
    return tuple(file.option for file in encoder_files())


def with_encoder_files(helps: Mapping[str, str]) -> Callable[[type], type]:
    """Decorator of an option group: adds `--<encoder>_<end>` for every end in `helps`, whose text has `{}` for the
    encoder's name."""

    def extended(group: type) -> type:
        fields = [
            (f"{file.option}_{end}" if end else file.option, str | None, option(None, help=text.format(file.title)))
            for file in encoder_files()
            for end, text in helps.items()
        ]
        made = dataclasses.make_dataclass(group.__name__, fields, bases=(group,), frozen=True, kw_only=True)
        made.__doc__, made.__module__ = group.__doc__, group.__module__
        return made

    return extended
