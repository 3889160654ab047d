"""Values that are set before a forward and read in it, where a step has several forwards with values of their own: what
a backward pass computes again has to read those of its own forward, not of the last one. Without torch."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

T = TypeVar("T")


class ForwardValue(Generic[T]):
    """One such value, None before it is set."""

    def __init__(self) -> None:
        self.value: T | None = None
        _ALL.add(self)


_ALL: weakref.WeakSet[ForwardValue] = weakref.WeakSet()


class AsNow(AbstractContextManager):
    """Inside, all values are what they were when it was made; afterwards as before. It can be entered again."""

    def __init__(self) -> None:
        self._kept = [(one, one.value) for one in _ALL]

    def __enter__(self) -> None:
        self._outside = [(one, one.value) for one, _ in self._kept]
        _set(self._kept)

    def __exit__(self, *error: object) -> None:
        _set(self._outside)


def _set(values: list[tuple[ForwardValue, object]]) -> None:
    for one, value in values:
        one.value = value


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch's checkpoints: around the forward, and around computing it again."""
    return nullcontext(), AsNow()
