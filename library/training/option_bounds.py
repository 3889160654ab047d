"""Checks of single values of a group of options: a message for each that is out of its bounds."""

from __future__ import annotations

from library.core.errors import ConfigError


def raise_problems(problems: list[str]) -> None:
    """Raise one ConfigError that names all problems, or return when there are none."""
    if problems:
        raise ConfigError(problems)


def too_small(group: object, least: float, *names: str, hint: str = "") -> list[str]:
    """A message for each of the named options of `group` that is set and below `least`."""
    problems = []
    for name in names:
        value = getattr(group, name)
        if value is not None and value < least:
            problems.append(f"--{name} is {value}; needed: {least} or more{hint}")
    return problems


def no_file_name(group: object, *names: str) -> list[str]:
    """A message for each of the named options of `group` that is set and cannot be (a part of) the name of a file or
    folder."""
    problems = []
    for name in names:
        value = getattr(group, name)
        if value is not None and (not value.strip(' .') or any(c in '/\\:*?"<>|' or c < " " for c in value)):
            problems.append(
                f"--{name} is '{value}'; needed: a file name without folders and without \\ / : * ? \" < > |"
            )
    return problems


def outside(group: object, low: float, high: float, *names: str) -> list[str]:
    """A message for each of the named options of `group` that is set and not in low..high."""
    values = {name: getattr(group, name) for name in names}
    return [
        f"--{name} is {value}; needed: a number from {low} to {high}"
        for name, value in values.items()
        if value is not None and not low <= value <= high
    ]
