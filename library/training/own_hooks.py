"""Hooks that `--hook package.module:Class` names: their classes, their options, and making them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence

from library.core.errors import ConfigError, Problems
from library.core.options import Config, option_fields
from library.core.registry import Registry
from library.training.checkpoint import AVERAGED
from library.training.hooks.base import Hook
from library.training.new_words import AddedWordOptions
from library.training.option_groups import HookOptions


HOOKS: Registry[type[Hook]] = Registry(
    "hook", option="hook", group="hooks", is_a=lambda found: isinstance(found, type) and issubclass(found, Hook),
    wanted="package.module:Class, a subclass of library.training.hooks.base:Hook",
)
"""names that plug-ins give their hooks; the project has none of its own here"""


def hook_classes(names: Iterable[str]) -> list[type[Hook]]:
    """All of them, each once; one ConfigError with every problem."""
    problems = Problems()
    found = [problems.attempt(lambda name=name: HOOKS.resolve(name)) for name in dict.fromkeys(names)]
    for cls in dict.fromkeys(filter(None, found)):
        for problem in _calls_that_fail(cls):
            problems.add(problem)
    problems.raise_if_any()
    return list(dict.fromkeys(found))


REPLACEMENTS = {"process_batch": ("step", "batch", "times"), "compute_loss": ("step", "output", "sample", "batch")}
"""what is given to the methods that replace a part of the step"""


def _calls_that_fail(cls: type[Hook]) -> list[str]:
    """The methods of the class that a run cannot call with what it gives them."""
    given = {"__init__": () if cls.options is None else ("options",), **REPLACEMENTS}
    for name, method in vars(Hook).items():
        if inspect.isfunction(method) and name != "__init__":
            given[name] = tuple(inspect.signature(method).parameters)[1:]
    problems = []
    for name, words in given.items():
        own = inspect.getattr_static(cls, name)
        if own is inspect.getattr_static(Hook, name) or not callable(getattr(cls, name)):
            continue
        problem = _refusal(getattr(cls, name), () if isinstance(own, (staticmethod, classmethod)) else ("self",), words)
        if problem is not None:
            problems.append(
                f"--hook {cls.__name__}: {name} is called with ({', '.join(words)}), which it does not take: {problem}"
            )
    return problems


def _refusal(method: Callable[..., object], bound: Sequence[str], words: Sequence[str]) -> str | None:
    try:
        inspect.signature(method).bind(*bound, *words)
    except TypeError as error:
        return str(error)
    except ValueError:  # made in C: it tells nothing
        return None
    return None


LIKE = 0.8
"""how alike a name must be to one that is called, from 0 to 1"""


def names_never_called(cls: type[Hook]) -> list[str]:
    """A line for every method that a hook adds under a name much like one that a run calls, or that begins with `on_`
    as those do: such a one is probably misspelled, and never called."""
    known = [name for name in vars(Hook) if not name.startswith("_")]
    bases = cls.__mro__[: cls.__mro__.index(Hook)]
    own = dict.fromkeys(name for base in bases for name, value in vars(base).items() if inspect.isfunction(value))
    lines = []
    for name in own:
        near = difflib.get_close_matches(name, known, n=1, cutoff=LIKE)
        if name.startswith("_") or name in known or not (near or name.startswith("on_")):
            continue
        points = ", ".join(point for point in known if point.startswith("on_"))
        meant = f"; did you mean {near[0]}?" if near else f"; known: {points}."
        lines.append(
            f"the hook {cls.__name__} has a method {name}, which a run never calls{meant} Give a method of its own"
            " another name, or one that begins with _"
        )
    return lines


def option_groups_of(names: Iterable[str], present: Iterable[str]) -> tuple[type, ...]:
    """Groups of the options that these hooks declare; ConfigError when one has the name of an option that is there."""
    taken, groups, problems = set(present), [], Problems()
    for cls in hook_classes(names):
        if cls.options is None or cls.options in groups:
            continue
        twice = sorted(option_fields(cls.options).keys() & taken)
        if twice:
            problems.add(
                f"--hook {cls.__name__} declares --{', --'.join(twice)}, which the script has already; the hook needs "
                "names of its own"
            )
        taken |= option_fields(cls.options).keys()
        groups.append(cls.options)
    problems.raise_if_any()
    return tuple(groups)


def make_hooks(config: Config) -> list[Hook]:
    """One object of each class that the options name."""
    names = config[HookOptions].hook if HookOptions in config else None
    return [cls() if cls.options is None else cls(config[cls.options]) for cls in hook_classes(names or ())]


def companion_endings(config: Config) -> Sequence[str]:
    """What stands behind the names of files that runs with these options write beside a model file."""
    try:
        classes = hook_classes((config[HookOptions].hook if HookOptions in config else None) or ())
    except ConfigError:
        classes = []  # told where the options are read
    words = config[AddedWordOptions].companions if AddedWordOptions in config else ()
    words = [*words, *(f"{ending}{AVERAGED}" for ending in words)]
    return list(dict.fromkeys([AVERAGED, *words, *(ending for cls in classes for ending in cls.companions)]))
