"""Tables of names that a user can choose from; what a name stands for is imported on first use.

Beside the names of the project a table takes those that a plug-in registers (`Registry.register`), those of installed
packages (entry points of the group `atelier.<what>`) and paths `package.module:thing`, also of modules in the current
folder. What comes from outside is held against the table's contract when it is chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from library.core.errors import AtelierError, ConfigError, did_you_mean

T = TypeVar("T")

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_path(name: str) -> bool:
    """Whether a name is written `package.module:thing`."""
    return _PATH.fullmatch(name) is not None


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


def search_current_folder() -> None:
    """Let modules of the current folder be imported; behind all others, so that a file of the folder hides no
    package."""
    if not {os.getcwd(), ""} & set(sys.path):
        sys.path.append(os.getcwd())


def import_outside(target: str, what: str) -> Any:
    """Import what a user names: `package.module:thing` or a module, installed or in the current folder. `what` is where
    it was named ("--loss_type"). ConfigError for a module that is not there or cannot be imported, and for a name that
    it does not have.
    """
    search_current_folder()
    module = target.partition(":")[0]
    try:
        return import_target(target)
    except AtelierError:
        raise
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigError(f"{what} is {target}; {_import_problem(module, target, error)}") from error


def _import_problem(module: str, target: str, error: Exception) -> str:
    if module.endswith(".py") or "/" in module or "\\" in module:
        name = os.path.basename(module.replace("\\", "/")).removesuffix(".py")
        return f"that is a path of a file; write the name of the module, {name}, of the current folder or of PYTHONPATH"
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and f"{target}.".replace(":", ".").startswith(f"{error.name}.")
    ):
        return f"there is no module {error.name}, neither in the current folder nor among the installed packages"
    if isinstance(error, ModuleNotFoundError):
        return f"it imports {error.name}, which is not installed"
    loaded = sys.modules.get(module)  # a module whose import fails is taken out of there
    name = target.partition(":")[2]
    if isinstance(error, AttributeError) and loaded is not None and name and not hasattr(loaded, name):
        return f"the module {module} has no {name}{did_you_mean(name, [known for known in vars(loaded) if not known.startswith('_')])}"
    line = str(error).strip().partition("\n")[0]
    return f"{module} cannot be imported ({type(error).__name__}{': ' if line else ''}{line})"


@functools.cache
def installed_points(group: str) -> dict[str, str]:
    """Name in small letters -> "module:attribute" of what installed packages offer in the entry-point group
    `atelier.<group>`."""
    import importlib.metadata

    return {point.name.lower(): point.value for point in importlib.metadata.entry_points(group=f"atelier.{group}")}


@dataclass(frozen=True)
class Entry:
    """One name of a registry. `package` names the optional package that the target needs; `is_outside`: no part of the
    project."""

    name: str
    target: str
    package: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    is_outside: bool = False


class Registry(Generic[T]):
    """Names -> targets, looked up without regard to case.

    `kind` and `option` appear in messages: "unknown optimizer 'AdamX' (--optimizer_type); did you mean 'AdamW'?"
    `group`: what installed packages name in the entry-point group `atelier.<group>` is in the table too. `wanted`,
    `takes`, `is_a` are the contract of targets from outside: in words, by the names of the arguments that they are
    called with, and as a test. `info` holds what an entry says when it does not say otherwise.
    """

    def __init__(
        self, kind: str, option: str | None = None, *, group: str | None = None, wanted: str = "",
        takes: tuple[str, ...] = (),
        is_a: Callable[[Any], bool] = callable, info: dict[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.option = option
        self.group = group
        self.wanted = wanted
        self.takes = takes
        self.is_a = is_a
        self.default_info = dict(info or {})
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, target: str, *, package: str | None = None, **info: Any) -> None:
        """Register `name`; `target` is "module:attribute" and stays a text until it is chosen."""
        self._put(Entry(name, target, package, {**self.default_info, **info}))

    def register(self, name: str, **info: Any) -> Callable[[T], T]:
        """For plug-ins: a decorator that gives a function or class a name, and says of it what the registry asks
        (`info`).

        Neither a cell of a notebook that runs again nor a module that is loaded again is a second thing of the name.
        """

        def decorate(thing: T) -> T:
            target = f"{thing.__module__}:{thing.__qualname__}"  # type: ignore[attr-defined]
            self._put(Entry(name, target, None, {**self.default_info, **info}, is_outside=True))
            return thing

        return decorate

    def _put(self, entry: Entry) -> None:
        key = entry.name.lower()
        if key in self._entries and not (entry.is_outside and self._entries[key].target == entry.target):
            raise ValueError(f"{self.kind} '{entry.name}' is registered twice")
        self._entries[key] = entry

    def names(self) -> list[str]:
        """The names that are registered, those of installed packages left out."""
        return [entry.name for entry in self._entries.values()]

    def __contains__(self, name: object) -> bool:
        """Whether `name` is a name of the table (a path is none)."""
        return isinstance(name, str) and (name.lower() in self._entries or self._installed(name) is not None)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def _installed(self, name: str) -> str | None:
        return installed_points(self.group).get(name.lower()) if self.group else None

    def problem(self, name: str, where: str | None = None) -> str | None:
        """The message for a name that the table does not have; None for one that it has, and for a path, which is
        looked at when it is chosen (`resolve`). `where`: the place of the name, where that is not the option of the
        table."""
        if name in self or (self.group and is_path(name)):
            return None
        return f"{where or self._where} is '{name}'{self._known_beside(name)}"

    def _known_beside(self, name: str) -> str:
        known = [*self.names(), *(installed_points(self.group) if self.group else ())]
        path = ", or a path package.module:name" if self.group else ""
        return f"{did_you_mean(name, known) or '.'} Known: {', '.join(known)}{path}"

    def entry(self, name: str, where: str | None = None) -> Entry:
        """The entry of `name` or of a path; ConfigError with the nearest name when there is none. What is from outside
        is imported, to know what it says of itself."""
        if self.problem(name) is not None:
            option = f" (--{self.option})" if self.option else ""
            raise ConfigError(f"unknown {self.kind} '{name}'{option}{self._known_beside(name)}")
        if name.lower() in self._entries:
            return self._entries[name.lower()]
        target = self._installed(name) or name
        import_outside(target, where or self._where)
        registered = next((entry for entry in self._entries.values() if entry.target == target), None)
        return registered or Entry(name, target, None, self.default_info, is_outside=True)

    @property
    def _where(self) -> str:
        return f"--{self.option}" if self.option else f"the {self.kind}"

    def resolve(self, name: str, where: str | None = None) -> T:
        """Import and return what `name` stands for. ConfigError when it cannot be imported, or does not keep the
        contract."""
        entry = self.entry(name, where)
        if entry.is_outside:
            found = import_outside(entry.target, where or self._where)
            self._check_contract(entry.target, found, where or self._where)
            return found
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

    def _check_contract(self, target: str, found: Any, where: str) -> None:
        unwritten = sorted(getattr(found, "__abstractmethods__", ()))
        if unwritten:
            raise ConfigError(f"{where} is {target}, which leaves out {', '.join(unwritten)}; needed: {self.wanted}")
        if not self.is_a(found):
            raise ConfigError(
                f"{where} is {target}, which is {_described(found)}; needed: {self.wanted or 'a ' + self.kind}"
            )
        try:
            inspect.signature(found).bind(*self.takes)
        except TypeError as error:
            if self.takes:
                raise ConfigError(
                    f"{where} is {target}, which cannot be called with ({', '.join(self.takes)}): {error}; needed: "
                    f"{self.wanted}"
                ) from error
        except ValueError:  # made in C: it tells nothing
            return


def _described(thing: Any) -> str:
    if inspect.ismodule(thing):
        return "a module"
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return (
        f"the function {thing.__name__}" if inspect.isfunction(thing) else f"a value of the type {type(thing).__name__}"
    )
