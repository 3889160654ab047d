"""key=value arguments of the command line (`--optimizer_args`, `--lr_scheduler_args`, `--network_args`): texts that
hold several are split, and values get types."""

from __future__ import annotations

import ast
import inspect
import numbers
import re
import shlex
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from library.core.errors import Problems, did_you_mean

_BEGIN = re.compile(r"\s+(?=[A-Za-z_][\w.]*\s*=)")
"""blanks before the next key=value"""
_READ = re.compile(r"""kwargs(?:\.(?:get|pop)\(|\[)\s*['"](\w+)['"]""")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def split_words(text: str) -> list[str]:
    """The words of a text, as a shell splits them, but with backslashes as they are: paths of Windows have them.
    ValueError when a quote is not closed."""
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    return list(words)


def split_arguments(item: str) -> list[str]:
    """`a=1 b=(2, 3)` -> ["a=1", "b=(2, 3)"]: a new argument begins at a key after blanks, outside quotes and
    brackets."""
    pieces, start, quote, closing = [], 0, "", []
    position = 0
    while position < len(item):
        letter = item[position]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _PAIRS:
            closing.append(_PAIRS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif not closing and not item[start:position].endswith("=") and (blanks := _BEGIN.match(item, position)):
            pieces.append(item[start:position])
            start = position = blanks.end()
            continue
        position += 1
    return [piece.strip() for piece in (*pieces, item[start:]) if piece.strip()] or [item]


def split_items(items: Iterable[str] | None) -> list[str]:
    """Every argument of a list option, in whatever number of texts they were given."""
    return [argument for item in items or () for argument in split_arguments(item)]


def parse_keyword_arg(text: str, option_name: str = "optimizer_args") -> tuple[str, Any]:
    """`betas=0.9,0.99` -> ("betas", (0.9, 0.99)). Raises ValueError, whose message names the argument.

    Split at the first `=`. The value is read as a Python literal; true and false in any case are booleans; all else is
    a text, so that words and paths need no quotes.
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
    for item in split_items(items):
        try:
            key, value = parse_keyword_arg(item, option_name)
        except ValueError as error:
            problems.add(str(error))
            continue
        written = item.partition("=")[2].strip()
        if "=" in written and value == written:
            problems.add(
                f"--{option_name} has the argument '{item}', with one = too many; key=value is needed, with a value in "
                "quotes if it holds ="
            )
        result[key] = value
    problems.raise_if_any()
    return result


def argument_problems(
    function: Callable, given: dict[str, Any], option_name: str, *, supplied: Iterable[str] = (), what: str = "",
    further: Collection[str] | None = None,
) -> list[str]:
    """What is wrong with passing `given` to `function`, next to the arguments `supplied` by us. `further`: the names
    that a function with **kwargs reads; None = any."""
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
    for name, value in given.items():
        if name in supplied:
            problems.append(f"--{option_name} sets {name}, which {what} gets from the trainer; leave it out")
        elif name not in named and not (accepts_all and (further is None or name in further)):
            choices = [n for n in (*named, *(further or ())) if n not in supplied]
            problems.append(
                f"--{option_name} sets {name}, which {what} does not have{did_you_mean(name, choices) or '.'}"
                f" It has: {', '.join(choices) or 'none'}"
            )
        elif name in named and (needed := _other_type(value, named[name].default)):
            problems.append(
                f"--{option_name} sets {name} to {value!r}; {what} needs {needed} there, by default "
                f"{named[name].default}"
            )
    missing = [n for n, p in named.items() if p.default is p.empty and n not in supplied and n not in given]
    if missing:
        problems.append(f"{what} needs {', '.join(missing)}; give it in --{option_name}, e.g. {missing[0]}=10")
    return problems


def names_read(cls: type) -> frozenset[str] | None:
    """The names that a class reads from its **kwargs, as its source and those of its bases tell; None where there is
    none. Some packages have **kwargs everywhere and look at next to nothing in them."""
    try:
        own = [base for base in cls.__mro__ if base.__module__.split(".")[0] == cls.__module__.split(".")[0]]
        sources = [inspect.getsource(base) for base in own]
    except (OSError, TypeError):
        return None
    return frozenset(name for source in sources for name in _READ.findall(source))


def _other_type(value: Any, default: Any) -> str | None:
    """What an argument with this default needs instead of `value`, where their types tell. None as default tells
    nothing."""
    if value is None:
        return None
    if isinstance(default, bool):
        return (
            None if isinstance(value, bool) or value in (0, 1) and isinstance(value, numbers.Real) else "True or False"
        )
    if isinstance(default, numbers.Real):
        return None if isinstance(value, numbers.Real) and not isinstance(value, bool) else "a number"
    if isinstance(default, (tuple, list)):
        return "several numbers, separated by commas" if isinstance(value, str) else None
    return None
