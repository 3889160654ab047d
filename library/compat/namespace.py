"""Option groups from any object that has the options as attributes, as scripts of other trainers hand them around."""

from __future__ import annotations

from typing import Any, TypeVar

from library.core.options import allows_none, option_fields

T = TypeVar("T")


def options_of(args: Any, options_class: type[T]) -> T:
    """The option group whose names are attributes of `args`; absent ones, and None where it means nothing, are left at their
    defaults. Raises ConfigError when a value is out of its range."""
    values = {name: getattr(args, name) for name in option_fields(options_class) if hasattr(args, name)}
    return options_class(
        **{name: value for name, value in values.items() if value is not None or allows_none(options_class, name)}
    )
