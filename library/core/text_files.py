"""Text, JSON and TOML from files of any origin: what cannot be read is one message that names the file and the reason.
Input files are opened only when they are files, and TOML is written so that it can be read."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from library.core.errors import AtelierError, ConfigError

MOST_NESTED = 100
"""levels of lists and tables; no file that means something here has a tenth of that, and more would end in a
RecursionError later"""

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
"""a pipe is opened without waiting for its writer, and then refused"""


def require_file(path: str | os.PathLike[str]) -> None:
    """OSError for what is no regular file: a pipe or a device would be waited for, perhaps for ever."""
    _require_file(os.stat(path).st_mode, path)


def _require_file(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, a file is needed", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, a file is needed", os.fspath(path))


def open_file(path: str | os.PathLike[str], mode: str = "rb", **how: Any) -> IO[Any]:
    """open() for an input file; OSError when it is none."""
    require_file(path)
    return open(path, mode, **how)


def open_descriptor(path: str | os.PathLike[str]) -> tuple[int, os.stat_result]:
    """The descriptor of an input file, to be closed by os.close, and what the system says of the file. For looks into
    many small files, of which the layers of open() would be the greater part. OSError when it is none."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError:
        require_file(path)  # systems that open no folder say something else
        raise
    try:
        status = os.fstat(descriptor)
        _require_file(status.st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a small input file; see open_descriptor."""
    descriptor, status = open_descriptor(path)
    try:
        content = os.read(descriptor, status.st_size + 1)
        if 0 < len(content) == status.st_size:
            return content
        while more := os.read(descriptor, 1 << 16):
            content += more
        return content
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike[str], what: str | None = None, error: type[AtelierError] = ConfigError) -> str:
    """The text of a UTF-8 file, with or without byte order mark. `what` says in messages which file it is."""
    name = what or str(path)
    try:
        with open_file(path, "r", encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise error(f"{name} does not exist") from None
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text (byte {problem.start}); save it as UTF-8") from problem
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise error(f"{name} cannot be read ({getattr(problem, 'strerror', None) or problem})") from problem


def parse_json(
    text: str | bytes, what: str, error: type[AtelierError] = ConfigError, *, hint: str = "",
    pairs_hook: Callable[..., Any] | None = None
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`pairs_hook` of files in which a key that comes twice is a mistake."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key '{name}' is there twice in one object")
        result[name] = value
    return result


def parse_toml(text: str, what: str, error: type[AtelierError] = ConfigError, *, hint: str = "") -> dict[str, Any]:
    """The table of a TOML text. Python's own reader where there is one (3.11): the toml package refuses arrays such as
    [1e-4, 0]."""
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
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
    ) as problem:  # all but the first: faults of the toml package
        raise error(f"{what} is not valid TOML: {_short(problem)}{hint}") from problem
    return value


def read_json(
    path: str | os.PathLike[str],
    what: str | None = None,
    error: type[AtelierError] = ConfigError,
    *,
    needed: type = object,
) -> Any:
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
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else ())
        ]
        if not level:
            return
    raise RecursionError


def _short(problem: Exception) -> str:
    text = str(problem)
    return text if len(text) <= 300 else f"{text[:297]}..."


def toml_text(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of plain values as a TOML document."""
    parts = (
        "\n".join([f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items()), ""])
        for name, table in tables.items()
    )
    return "\n".join(parts)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # strings of JSON are strings of TOML but for this
