"""Names that a module hands on from elsewhere, looked up when they are asked for, so that importing the module costs
nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from library.core.registry import import_target


def homes(home: str, *names: str) -> dict[str, str]:
    """name -> target for names that live in one module under the same names."""
    return {name: f"{home}:{name}" for name in names}


def lazy_names(module: str, targets: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """(`__getattr__`, `__dir__`) of a module that hands on names: `targets` is name -> "module:attribute"."""

    def look_up(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = import_target(targets[name])
        setattr(sys.modules[module], name, value)  # the next look-up finds it without coming here
        return value

    return look_up, lambda: sorted({*vars(sys.modules[module]), *targets})
