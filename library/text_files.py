"""Input files: opened only when they are files, JSON and TOML read with one kind of error, TOML written so that it can be read."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

TOO_DEEP = "values are nested too deeply"


def require_file(path: str | os.PathLike[str]) -> None:
    """OSError for what is no regular file: a pipe or a device would be waited for, perhaps for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, a file is needed", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, a file is needed", os.fspath(path))


def open_file(path: str | os.PathLike[str], mode: str = "rb", **how: Any) -> IO[Any]:
    """open() for an input file; OSError when it is none."""
    require_file(path)
    return open(path, mode, **how)


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8-sig") -> str:
    """The text of an input file, without a byte order mark."""
    require_file(path)
    return Path(path).read_text(encoding=encoding)


def parse_json(text: str | bytes, **how: Any) -> Any:
    """json.loads whose every complaint is a ValueError."""
    try:
        return json.loads(text, **how)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def parse_toml(text: str) -> dict[str, Any]:
    """The content of a TOML document; every complaint is a ValueError. Python's own reader where there is one (3.11): the toml
    package refuses arrays such as [1e-4, 0]."""
    try:
        return _toml_reader()(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (IndexError, TypeError, AttributeError, KeyError) as error:  # faults of the toml package
        raise ValueError(f"it cannot be understood ({type(error).__name__})") from error


def _toml_reader() -> Callable[[str], dict[str, Any]]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import toml

        return toml.loads
    return tomllib.loads


def toml_text(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of plain values as a TOML document."""
    parts = ("\n".join([f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items()), ""]) for name, table in tables.items())
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
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # strings of JSON are strings of TOML but for this
