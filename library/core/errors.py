"""Errors that are written for the user: what has which value, what is needed, how to get there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
MOST_LISTED = 5
"""names of one kind in a message"""


class AtelierError(Exception):
    """Base of the errors shown without a traceback. `exit_code` is the status of the process that ends with it."""

    exit_code = 1


class ConfigError(AtelierError):
    """Something in the options or the configuration files that the user can mend.

    Takes one message or several; all of them are shown, so that one run reports every problem.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            text = f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(text)


class UnsupportedCombination(ConfigError):
    """Options that are each right and do not go together, or a feature that this model family does not have."""


class CheckpointError(AtelierError):
    """A model, adapter or state file that is missing, damaged or of another kind than needed."""

    exit_code = 2


class TrainingError(AtelierError):
    """A run that has to stop: a loss that is not finite, a process group that did not form."""


class RunInterrupted(AtelierError):
    """A run that a signal ended in good order: its message tells where it is and how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Problems:
    """Collects messages so that all of them are raised together."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        if message not in self.messages:
            self.messages.append(message)

    def absorb(self, error: ConfigError) -> None:
        for message in error.problems:
            self.add(message)

    def attempt(self, check: Callable[[], T]) -> T | None:
        """Run a check and keep what it complains about; its result, or None after a complaint."""
        try:
            return check()
        except ConfigError as error:
            self.absorb(error)
        except AtelierError as error:
            self.add(str(error))
        return None

    def raise_if_any(self) -> None:
        if self.messages:
            raise ConfigError(self.messages)


def problems_of(check: Callable[[], object]) -> list[str]:
    """What a check complains about."""
    problems = Problems()
    problems.attempt(check)
    return problems.messages


@contextmanager
def foreign_errors(kind: type[AtelierError], what: str) -> Iterator[None]:
    """Turn whatever another library raises for damaged input, a panic of its native code included, into one message."""
    try:
        yield
    except (AtelierError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        text = str(error).strip().partition("\n")[0][:200]
        raise kind(f"{what} ({type(error).__name__}{': ' if text else ''}{text})") from error


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None when nothing is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for an unknown name, or an empty text."""
    nearest = nearest_name(name, known)
    return f"; did you mean '{nearest}'?" if nearest else ""

def counted(reasons: Mapping[str, int]) -> str:
    """` (3: one reason; 1: another)`, nothing without reasons; the reason alone where all have one."""
    if len(reasons) < 2:
        return "".join(f" ({reason})" for reason in reasons)
    return f" ({'; '.join(f'{count}: {reason}' for reason, count in reasons.items())})"


def listed(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
