"""Text, JSON and TOML from files of any origin: what cannot be read is one message that names the file and the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from library.errors import AtelierError, ConfigError

MOST_NESTED = 100
"""levels of lists and tables; no file that means something here has a tenth of that, and more would end in a RecursionError later"""


def read_text(path: str | os.PathLike[str], what: str | None = None, error: type[AtelierError] = ConfigError) -> str:
    """The text of a UTF-8 file, with or without byte order mark. `what` says in messages which file it is."""
    name = what or str(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise error(f"{name} does not exist") from None
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text (byte {problem.start}); save it as UTF-8") from problem
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise error(f"{name} cannot be read ({getattr(problem, 'strerror', None) or problem})") from problem


def parse_json(
    text: str | bytes, what: str, error: type[AtelierError] = ConfigError, *, hint: str = "", pairs_hook: Callable[..., Any] | None = None
) -> Any:
    """The value of a JSON text; `what` names it in messages."""
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
        check_depth(value)
    except RecursionError:
        raise error(f"{what} is not valid JSON: values are nested too deeply{hint}") from None
    except ValueError as problem:
        raise error(f"{what} is not valid JSON: {_short(problem)}{hint}") from problem
    return value


def parse_toml(text: str, what: str, error: type[AtelierError] = ConfigError, *, hint: str = "") -> dict[str, Any]:
    """The table of a TOML text. Python's own reader where there is one (3.11): the toml package refuses arrays such as [1e-4, 0]."""
    try:
        try:
            import tomllib
        except ModuleNotFoundError:
            import toml

            value = toml.loads(text)
        else:
            value = tomllib.loads(text)
        check_depth(value)
    except RecursionError:
        raise error(f"{what} is not valid TOML: values are nested too deeply{hint}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as problem:  # all but the first: faults of the toml package
        raise error(f"{what} is not valid TOML: {_short(problem)}{hint}") from problem
    return value


def read_json(path: str | os.PathLike[str], what: str | None = None, error: type[AtelierError] = ConfigError, *, needed: type = object) -> Any:
    """The value of a JSON file, which has to be of the type `needed`."""
    name = what or str(path)
    value = parse_json(read_text(path, what, error), name, error)
    if not isinstance(value, needed):
        words = {dict: "an object", list: "a list"}
        raise error(f"{name} holds {type(value).__name__}; {words.get(needed, needed.__name__)} is needed")
    return value


def check_depth(value: Any) -> None:
    """RecursionError for more than MOST_NESTED levels of lists and tables."""
    level: Iterable[Any] = [value]
    for _ in range(MOST_NESTED):
        level = [part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else ())]
        if not level:
            return
    raise RecursionError


def _short(problem: Exception) -> str:
    text = str(problem)
    return text if len(text) <= 300 else f"{text[:297]}..."
