"""Plug-ins: modules of users that register formulas, samplers, adapters or families, imported before names are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import option
from library.core.registry import import_outside, is_path, search_current_folder


def import_plugins(modules: Iterable[str]) -> None:
    """Import modules, each of which registers what it has. One ConfigError for all that cannot be imported."""
    problems = Problems()
    for module in modules:
        if is_path(module):
            name = module.partition(":")[0]
            problems.add(
                f"--plugins is {module}, a path of one thing; needed: the module, --plugins {name}, which registers"
                f" what it has; the path itself belongs to the option that chooses the thing, e.g. --loss_type {module}"
            )
            continue
        problems.attempt(lambda module=module: import_outside(module, "--plugins"))
    problems.raise_if_any()


def plugins_on(argv: Sequence[str]) -> list[str]:
    """The modules behind --plugins on a command line whose options are not known yet."""
    found, taking = [], False
    for word in argv:
        if word.startswith("--"):
            name, sign, value = word.partition("=")
            taking = name == "--plugins" and not sign
            found += [value] if name == "--plugins" and sign else []
        elif taking:
            found.append(word)
    return found


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Plug-ins

    The group stands before all others: its modules are imported when it is read, so that the others know their names.
    """

    plugins: list[str] | None = option(
        None,
        nargs="*",
        metavar="MODULE",
        help="modules, in the current folder or installed, that are imported at start and register losses, samplers, kinds of adapter and more",
    )

    def __post_init__(self) -> None:
        self.load()

    def load(self) -> None:
        """Import the modules; from now on the current folder is searched for every option that names a module."""
        search_current_folder()
        import_plugins(self.plugins or ())
