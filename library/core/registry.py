"""Tables of names that a user can choose from; what a name stands for is imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from library.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


def import_target(target: str) -> Any:
    """Import `package.module:attribute`, `package.module.attribute` or a module alone.

    ImportError when a module is missing, AttributeError when it has no such attribute.
    """
    module_name, separator, attribute = target.partition(":")
    if not separator:
        module_name, _, attribute = target.rpartition(".")
        if not module_name:
            return importlib.import_module(target)
    module = importlib.import_module(module_name)
    if not separator and not hasattr(module, attribute) and hasattr(module, "__path__"):
        if importlib.util.find_spec(target) is not None:  # a module of a package that nobody has imported yet
            return importlib.import_module(target)
    return getattr(module, attribute)


@dataclass(frozen=True)
class Entry:
    """One name of a registry. `package` names the optional package that the target needs."""

    name: str
    target: str
    package: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Names -> targets, looked up without regard to case.

    `kind` and `option` appear in messages: "unknown optimizer 'AdamX' (--optimizer_type); did you mean 'AdamW'?"
    """

    def __init__(self, kind: str, option: str | None = None) -> None:
        self.kind = kind
        self.option = option
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, target: str, *, package: str | None = None, **info: Any) -> None:
        """Register `name`; `target` is "module:attribute" and stays a text until it is chosen."""
        key = name.lower()
        if key in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[key] = Entry(name, target, package, info)

    def names(self) -> list[str]:
        return [entry.name for entry in self._entries.values()]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def entry(self, name: str) -> Entry:
        """The entry of `name`; ConfigError with the nearest name when there is none."""
        try:
            return self._entries[name.lower()]
        except KeyError:
            where = f" (--{self.option})" if self.option else ""
            raise ConfigError(
                f"unknown {self.kind} '{name}'{where}{did_you_mean(name, self.names())}"
                f" Known: {', '.join(self.names())}"
            ) from None

    def resolve(self, name: str) -> T:
        """Import and return what `name` stands for."""
        entry = self.entry(name)
        try:
            return import_target(entry.target)
        except ImportError as error:
            package = entry.package or (error.name or entry.target).split(".")[0]
            raise ConfigError(
                f"{self.kind} '{entry.name}' needs the package {package}, which cannot be imported ({error});"
                f" install it with: pip install {package}"
            ) from error
        except AttributeError as error:
            raise ConfigError(
                f"{self.kind} '{entry.name}' is {entry.target}, which the installed package does not have ({error});"
                " install a release that has it"
            ) from error
