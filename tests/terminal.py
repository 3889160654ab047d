"""A pseudo-terminal with a screen that can be looked at: what a user sees of a program that draws on a terminal.

The screen knows the little that our programs write: letters of one column, new lines, carriage returns, going up,
erasing.
Two kinds of terminals do different things when they become narrower: some break the lines that stand on them anew
(`reflows`), others cut them off.
"""

from __future__ import annotations

import codecs
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.waiting import PATIENCE

_CODES = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


@dataclass
class _Row:
    text: str = ""
    goes_on: bool = False
    """into the row below, as the terminal was too narrow"""


class Screen:
    """Rows of letters with a cursor; rows that leave at the top are in `history`."""

    def __init__(self, columns: int = 80, rows: int = 24, reflows: bool = True) -> None:
        self.columns, self.height, self.reflows = columns, rows, reflows
        self.history: list[_Row] = []
        self.rows = [_Row()]
        self.x = self.y = 0
        self.unknown: list[str] = []

    def feed(self, text: str) -> None:
        place = 0
        while place < len(text):
            code = _CODES.match(text, place)
            if code:
                self._obey(code[1], code[2])
                place = code.end()
                continue
            self._letter(text[place])
            place += 1

    def _letter(self, letter: str) -> None:
        if letter == "\n":
            self._down()
        elif letter == "\r":
            self.x = 0
        elif letter >= " ":
            if self.x == self.columns:
                self.rows[self.y].goes_on = True
                self.x = 0
                self._down()
            row = self.rows[self.y]
            row.text = row.text.ljust(self.x)[: self.x] + letter + row.text[self.x + 1 :]
            self.x += 1

    def _down(self) -> None:
        self.y += 1
        if self.y == len(self.rows):
            self.rows.append(_Row())
        self._scroll()

    def _scroll(self) -> None:
        while len(self.rows) > self.height:
            self.history.append(self.rows.pop(0))
            self.y = max(0, self.y - 1)

    def _obey(self, number: str, what: str) -> None:
        if what == "A":
            self.y = max(0, self.y - int(number or 1))
        elif what in "JK" and number in ("", "0"):
            row = self.rows[self.y]
            row.text, row.goes_on = row.text[: self.x], False
            if what == "J":
                del self.rows[self.y + 1 :]
        elif what != "m":
            self.unknown.append(number + what)

    def resize(self, columns: int, rows: int) -> None:
        if self.reflows:
            self._reflow(columns)
        else:
            for row in self.rows:
                row.text = row.text[:columns]
        self.columns, self.height = columns, rows
        self.x = min(self.x, columns - 1)
        self._scroll()

    def _reflow(self, columns: int) -> None:
        """Lines of the screen broken anew; the cursor stays in its line."""
        broken: list[_Row] = []
        line, y = "", 0
        for number, row in enumerate(self.rows):
            line += row.text
            if number == self.y:
                y = len(broken)
            if row.goes_on:
                continue
            parts = [line[i : i + columns] for i in range(0, len(line), columns)] or [""]
            broken += [_Row(part, goes_on=True) for part in parts]
            broken[-1].goes_on = False
            line = ""
        self.rows, self.y = broken, y

    @property
    def shown(self) -> list[str]:
        return [row.text.rstrip() for row in self.rows]

    @property
    def lines(self) -> list[str]:
        """All that can be read, also by scrolling up; lines that were broken are whole."""
        found = [""]
        for row in (*self.history, *self.rows):
            found[-1] += row.text
            if not row.goes_on:
                found.append("")
        return [line.rstrip() for line in found]


@dataclass
class Terminal:
    """`stream` is the program's side. Use as a context manager."""

    columns: int = 80
    rows: int = 24
    reflows: bool = True
    written: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Terminal:
        self._master, slave = pty.openpty()
        self.stream = open(slave, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        self.screen = Screen(self.columns, self.rows, self.reflows)
        self.resize(self.columns, self.rows)
        self._marks = self._asked = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *of_error: object) -> None:
        self.stream.close()
        self._reader.join(PATIENCE)
        os.close(self._master)

    def _read(self) -> None:
        letters = codecs.getincrementaldecoder("utf-8")()
        while True:
            try:
                read = os.read(self._master, 65536)
            except OSError:  # the program's side is closed
                return
            if not read:
                return
            self.written.append(read)
            text = letters.decode(read)
            self.screen.feed(text)
            self._marks += text.count("\0")

    def resize(self, columns: int, rows: int) -> None:
        """Between two drawings, as far as they are read."""
        if hasattr(self, "_reader"):
            self.sync()
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(columns, rows)

    def type(self, keys: bytes) -> None:
        """What the terminal echoes."""
        os.write(self._master, keys)

    def sync(self) -> Screen:
        """The screen, on which all is that was written before."""
        self.stream.flush()
        self._asked += 1
        os.write(self.stream.fileno(), b"\0")
        end = time.monotonic() + PATIENCE
        while self._marks < self._asked:
            assert time.monotonic() < end, "the terminal is not read"
            time.sleep(0.002)
        return self.screen


@contextmanager
def console_on(terminal: Terminal, has_log: bool = True) -> Iterator[Terminal]:
    """Inside, the terminal is where stdout, stderr and, with `has_log`, a handler of the log write. In the body of a
    test, not in a fixture: pytest gives each phase of a test streams of its own."""
    kept = sys.stdout, sys.stderr
    with terminal:
        handler = logging.StreamHandler(terminal.stream) if has_log else logging.NullHandler()
        logging.getLogger().addHandler(handler)
        sys.stdout = sys.stderr = terminal.stream
        try:
            yield terminal
        finally:
            sys.stdout, sys.stderr = kept
            logging.getLogger().removeHandler(handler)
