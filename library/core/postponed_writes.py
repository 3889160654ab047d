"""Files whose content is copied now and written later, by whoever asked for that: `postponing` is around code that
writes, as it always does, and the functions that write files of weights look for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Postponed(Protocol):
    """Takes writes, and does them in the order in which they came."""

    def takes(self, nbytes: int) -> bool:
        """Whether there is room for a copy of so much. Where there is none, all that came before is written when the
        call returns, so that the order is kept by writing now."""
        ...

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in main memory, complete when the next write that is added is done."""
        ...

    def add(self, write: Callable[[], None]) -> None: ...


_taker: ContextVar[Postponed | None] = ContextVar("postponed_writes", default=None)


@contextmanager
def postponing(taker: Postponed | None) -> Iterator[None]:
    """Inside, files of weights are not there yet when the function that writes them returns; of other threads
    nothing changes. None: they are."""
    token = _taker.set(taker)
    try:
        yield
    finally:
        _taker.reset(token)


def taker_of(nbytes: int) -> Postponed | None:
    """Who takes a write of so many bytes, or None when it is to be done now."""
    taker = _taker.get()
    return taker if taker is not None and taker.takes(nbytes) else None
