"""Lists of regular expressions, and expressions with values, as users write them in options."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from library.core.errors import ConfigError
from library.core.options import number_problem
from library.core.text_files import parse_toml

V = TypeVar("V")
NUMBER_FORM = r"[-+.\deE]+"


def number(value: Any) -> float:
    """A finite number; ValueError says what is needed."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a number is needed") from None
    needed = number_problem(result, is_whole=False)
    if needed is not None:
        raise ValueError(f"{needed} is needed")
    return result


def patterns(value: Any) -> tuple[re.Pattern[str], ...]:
    """A Python or JSON list of regular expressions, or one expression."""
    if isinstance(value, str):
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        value = parsed if isinstance(parsed, (list, tuple, str)) else value
    return tuple(_compiled(item) for item in ([value] if isinstance(value, str) else value))


def pattern_values(
    value: Any, parse: Callable[[Any], V], form: str = NUMBER_FORM
) -> tuple[tuple[re.Pattern[str], V], ...]:
    """`regex=value,regex=value`, or a JSON object or TOML table for expressions with commas or equal signs; order is
    kept. `form`: what a value looks like, by which a comma inside an expression is told from one between two."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif str(value).strip().startswith("{"):
        pairs = list(_mapping(str(value)).items())
    else:
        pairs = _pairs(str(value), form)
    return tuple((_compiled(str(pattern)), parse(item)) for pattern, item in pairs)


def _mapping(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return parse_toml(f"value = {text}", "the table")["value"]
        except (ConfigError, KeyError) as error:
            raise ValueError(f"it is neither JSON nor a TOML table ({error})") from None


def _pairs(text: str, form: str) -> list[tuple[str, str]]:
    pairs, pending = [], ""
    for piece in text.split(","):
        pending = f"{pending},{piece}" if pending else piece
        match = re.fullmatch(rf"\s*(.+?)\s*=\s*({form})\s*", pending)
        if match:  # a comma inside an expression does not end with =value
            pairs.append((match[1], match[2]))
            pending = ""
    if pending.strip():
        raise ValueError(f"'{pending.strip()}' is not of the form expression=value")
    return pairs


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(str(pattern))
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression ({error})") from None
