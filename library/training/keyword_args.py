"""key=value arguments of the command line (`--optimizer_args`, `--lr_scheduler_args`) as typed values."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from library.errors import Problems, did_you_mean


def parse_keyword_arg(text: str, option_name: str = "optimizer_args") -> tuple[str, Any]:
    """`betas=0.9,0.99` -> ("betas", (0.9, 0.99)). Raises ValueError, whose message names the argument.

    Split at the first `=`. The value is read as a Python literal; true and false in any case are booleans; all else is a
    text, so that words and paths need no quotes.
    """
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not separator or not key:
        raise ValueError(f"--{option_name} has the argument '{text}'; key=value is needed, e.g. weight_decay=0.01")
    return key, _literal(value)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # backslashes of Windows paths
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def parse_keyword_args(items: Sequence[str] | None, option_name: str) -> dict[str, Any]:
    """All arguments of an option; the last one wins. Raises ConfigError that names every bad one."""
    problems, result = Problems(), {}
    for item in items or ():
        try:
            key, value = parse_keyword_arg(item, option_name)
        except ValueError as error:
            problems.add(str(error))
        else:
            result[key] = value
    problems.raise_if_any()
    return result


def argument_problems(
    function: Callable, given: dict[str, Any], option_name: str, *, supplied: Iterable[str] = (), what: str = ""
) -> list[str]:
    """What is wrong with passing `given` to `function`, next to the arguments `supplied` by us."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a class written in C tells nothing
        return []
    what = what or getattr(function, "__name__", str(function))
    named = {
        name: p for name, p in parameters.items()
        if name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    supplied = set(supplied)
    problems = []
    for name in given:
        if name in supplied:
            problems.append(f"--{option_name} sets {name}, which {what} gets from the trainer; leave it out")
        elif name not in named and not accepts_all:
            choices = [n for n in named if n not in supplied]
            problems.append(
                f"--{option_name} sets {name}, which {what} does not have{did_you_mean(name, choices) or '.'}"
                f" It has: {', '.join(choices) or 'none'}"
            )
    missing = [n for n, p in named.items() if p.default is p.empty and n not in supplied and n not in given]
    if missing:
        problems.append(f"{what} needs {', '.join(missing)}; give it in --{option_name}, e.g. {missing[0]}=10")
    return problems
