"""Work beside the encoder: files written by one thread, images decoded by several, both with a bounded backlog."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
WAITING_PER_TASK = 5e-4
"""seconds of waiting from which several threads pay"""


class BackgroundWriter:
    """One thread that runs what is submitted, in order. `submit` waits while `backlog` jobs are open, and raises the
    first error of an earlier job. Leaving the block waits for all jobs, also when it is left by an error or an
    interrupt."""

    def __init__(self, backlog: int = 8) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache-writer")
        self._slots = threading.Semaphore(backlog)
        self._error: BaseException | None = None

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        self._raise_error()
        self._slots.acquire()
        self._pool.submit(function, *args).add_done_callback(self._done)

    def _done(self, future: Future) -> None:
        if self._error is None:
            self._error = future.exception()
        self._slots.release()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise_error()


def map_in_threads(function: Callable[[T], R], values: Sequence[T], *, num_threads: int, part: int = 128) -> list[R]:
    """Results in the order of `values`; for many small tasks that may wait for the disk. Raises the first exception.

    The first ones are done here, and where they hardly waited so are the others: threads that take turns at every file
    cost several times the work. A network drive or a cold disk is asked by several at once.
    """
    results, waits = [], []
    for value in values[:part]:
        wall, work = time.perf_counter(), time.thread_time()
        results.append(function(value))
        waits.append(time.perf_counter() - wall - (time.thread_time() - work))
    usual = sorted(waits)[: -(-len(waits) * 9 // 10)]  # without the few at which a busy machine did something else
    if sum(usual) < WAITING_PER_TASK * len(usual) or len(values) <= part:
        return results + [function(value) for value in values[part:]]
    parts = [values[start : start + part] for start in range(part, len(values), part)]
    with ThreadPoolExecutor(min(num_threads, len(parts)), thread_name_prefix="files") as pool:
        for found in pool.map(lambda some: [function(value) for value in some], parts):
            results += found
    return results


def map_ahead(
    function: Callable[[T], R], values: Iterable[T], *, num_threads: int, ahead: int
) -> Iterator[tuple[T, R | BaseException]]:
    """Results in the order of `values`, computed by threads at most `ahead` values in advance. An exception is handed
    out in place of a result, so that the caller can name what it belongs to."""
    with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[T, Future]] = deque()
        try:
            for value in values:
                waiting.append((value, pool.submit(function, value)))
                if len(waiting) > ahead:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()


def _result(value: T, future: Future) -> tuple[T, Any]:
    return value, future.exception() or future.result()
