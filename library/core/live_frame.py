"""Lines that stay below everything else on a terminal and are drawn anew in their place.

Nothing of the terminal is changed that a killed process would leave so: no hidden cursor, no other screen, no region of
scrolling. Before each drawing the cursor stands in the empty line below the frame, where the terminal also echoes what
is typed (the ^C of Ctrl-C); to draw is to go up by the height of the frame and to write over it.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, TextIO

Render = Callable[[int, int, str], list[str]]
"""(width, height, activity) -> the lines of the frame: at most `height`, each of at most `width` columns"""

LOOK_S, DRAW_S = 0.25, 1.0
"""seconds between two looks at the size of the terminal, and between two drawings when nothing is new"""
CURSOR_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-HJKfhlsu]")

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a process that is forked while a thread draws would wait for that thread for ever
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class LiveFrame:
    """Between `start` and `close` what is written to stdout and stderr, where these are terminals, and by the log
    handlers of stderr appears above the frame. A line that is not ended and begins anew with a carriage return (a bar
    of progress) is the `activity`, which `render` is given. Processes that are forked meanwhile write as without a
    frame.

    `stream`: the terminal.
    """

    def __init__(self, stream: TextIO, render: Render) -> None:
        self._stream, self._render = stream, render
        self._process = os.getpid()
        self._height = self._width = 0
        """of what stands on the terminal"""
        self._size = (0, 0)
        self._drawn_at = -math.inf
        self._urgent: deque[str] = deque()
        self._activity = ""
        self._restore: list[Callable[[], object]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="frame", daemon=True)

    @staticmethod
    def holding() -> AbstractContextManager[object]:
        """Inside, nothing is drawn: for changes of what `render` reads."""
        return _lock

    def start(self) -> None:
        self._size = self._terminal_size()
        self._take("stderr")
        self._take("stdout")
        self.draw()
        self._thread.start()

    def close(self) -> None:
        """Draw a last time, without activity; what stands there stays, and what comes is written below."""
        with _lock:
            if self._ended.is_set():
                return
            self._activity = ""
            self.draw()
            self._ended.set()
            for restore in self._restore:
                restore()
        if self._thread.is_alive():
            self._thread.join()

    def refresh(self) -> None:
        """Draw what is new, at most twice as often as when nothing is."""
        if time.monotonic() - self._drawn_at >= DRAW_S / 2:
            self.draw()

    def write_soon(self, text: str) -> None:
        """A line above the frame, soon; for signal handlers, which may have interrupted a drawing."""
        self._urgent.append(text)

    def is_ours(self) -> bool:
        """Whether writing is the frame's matter: it is not over, and this is the process that draws it."""
        return not self._ended.is_set() and os.getpid() == self._process

    def put(self, pending: str, text: str) -> str:
        """Write the complete lines of `pending` + `text` above the frame; the rest, which is not ended yet."""
        *lines, rest = (pending + text).split("\n")
        with _lock:
            if lines:
                self.draw([_as_seen(line) for line in lines])
            if "\r" in rest:
                self._activity = _as_seen(rest).strip()
                self.refresh()
            elif lines:
                self._activity = ""
        if "\r" not in rest:
            return rest
        return "\r" + _as_seen(rest) + ("\r" if rest.endswith("\r") else "")

    def draw(self, above: list[str] | None = None) -> None:
        """Write `above` where the frame stands, and the frame below it."""
        with _lock:
            if not self.is_ours():
                return
            columns, rows = self._size = self._terminal_size()
            lines = [*(above or ()), *self._urgent_lines()]
            frame = self._render(max(1, columns - 1), max(1, rows - 1), self._activity)[: max(1, rows - 1)]
            text = "\r" + (f"\x1b[{self._height}A" if self._height else "")
            if columns <= self._width:
                # Its lines may have been broken by the narrower terminal, or not: nobody tells. What is surely its own
                # is erased, and the rest goes where the lines above it are, beyond the upper edge.
                text += "\x1b[J" + "\n" * rows
            if lines:
                text += "\x1b[J" + "".join(f"{line}\n" for line in lines)
            text += "".join(f"\x1b[K{line}\n" for line in frame) + "\x1b[J"
            self._height, self._width, self._drawn_at = len(frame), columns - 1, time.monotonic()
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # the terminal is gone; the run is not
                self._ended.set()
                for restore in self._restore:
                    restore()

    def _urgent_lines(self) -> list[str]:
        lines = []
        while self._urgent:
            lines.append(self._urgent.popleft())
        return lines

    def _keep_drawing(self) -> None:
        while not self._ended.wait(LOOK_S):
            size = self._terminal_size()
            if size != self._size:
                self._size = size  # while it still changes, nothing is drawn
                self._drawn_at = -math.inf
            elif self._urgent or time.monotonic() - self._drawn_at >= DRAW_S:
                self.draw()

    def _terminal_size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            return 80, 24
        return size.columns or 80, size.lines or 24

    def _take(self, name: str) -> None:
        """Let what is written to `sys.<name>`, and by the log handlers that write there, come through the frame."""
        original = getattr(sys, name)
        if original is None or not original.isatty():
            return
        through = _AboveFrame(self, original)
        setattr(sys, name, through)
        self._restore.append(lambda: setattr(sys, name, original) if getattr(sys, name) is through else None)
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and handler.stream is original:
                handler.setStream(through)
                self._restore.append(lambda handler=handler: handler.setStream(original))


class _AboveFrame:
    """A stream of a terminal on which a frame stands."""

    def __init__(self, frame: LiveFrame, original: TextIO) -> None:
        self._frame, self._original, self._pending = frame, original, ""

    def write(self, text: str) -> int:
        if not self._frame.is_ours():
            return self._original.write(text)
        with _lock:
            self._pending = self._frame.put(self._pending, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(ValueError):
            self._original.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _as_seen(line: str) -> str:
    """What a terminal shows of a line that carriage returns begin anew: the last part that says something."""
    parts = [part for part in CURSOR_MOVES.sub("", line).split("\r") if part]
    return parts[-1] if parts else ""
