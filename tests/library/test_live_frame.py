"""Lines that stay below everything else on a terminal, whatever is written and however large the terminal is."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("pty", reason="pseudo-terminals are a matter of POSIX systems")

from library.core import live_frame  # noqa: E402
from library.core.live_frame import LiveFrame  # noqa: E402
from tests.terminal import Screen, Terminal, console_on  # noqa: E402
from tests.waiting import PATIENCE  # noqa: E402


@pytest.fixture(autouse=True)
def still(monkeypatch):
    """Nothing is drawn but what a test asks for."""
    monkeypatch.setattr(live_frame, "LOOK_S", 3600.0)
    monkeypatch.setattr(live_frame, "DRAW_S", 0.0)


class Counted:
    """A frame of three lines as wide as it may be, which counts its drawings."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, width: int, height: int, activity: str) -> list[str]:
        self.drawn += 1
        return ["=" * width, f"| {activity} {self.drawn}"[:width], "#" * width]


@contextmanager
def framed(reflows: bool = True) -> Iterator[tuple[Terminal, LiveFrame, Counted]]:
    """A terminal as the console, and a frame that stands on it."""
    with console_on(Terminal(reflows=reflows)) as terminal:
        render = Counted()
        frame = LiveFrame(terminal.stream, render)
        frame.start()
        try:
            yield terminal, frame, render
        finally:
            frame.close()


def frames_on(rows: list[str]) -> int:
    return sum(row.startswith("=") for row in rows)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_is_written_stands_above_the_frame_in_its_order():
    from tqdm import tqdm

    with framed() as (terminal, frame, _):
        handler = next(h for h in logging.getLogger().handlers if getattr(h, "stream", None) is sys.stderr)
        print("printed", "in parts")
        logging.getLogger("x").warning("logged\nin two lines, one of them %s", "x" * 100)
        bar = tqdm(total=4, desc="sampling", file=sys.stderr, leave=False, mininterval=0)
        bar.update(2)
        assert "sampling:  50%" in terminal.sync().shown[-3] and frames_on(terminal.screen.shown) == 1
        print("beside a bar")
        bar.close()
        terminal.type(b"\x03")
        frame.write_soon("from a signal handler")
        sys.stderr.write("\x1b[31mred\x1b[0m, ended later\n")
        frame.close()
        print("below")
        rows = terminal.sync().shown
        assert sys.stdout is terminal.stream and sys.stderr is terminal.stream and handler.stream is terminal.stream
    assert rows[:3] == ["printed in parts", "logged", "in two lines, one of them " + "x" * 54]
    assert rows[3:7] == ["x" * 46, "beside a bar", "red, ended later", "from a signal handler"]
    assert rows[7] == "=" * 79 and rows[8].startswith("|  ") and rows[9:11] == ["#" * 79, "below"]
    assert not terminal.screen.unknown and frames_on(terminal.screen.lines) == 1


@pytest.mark.parametrize("reflows", [True, False], ids=["breaks", "cuts"])
def test_a_terminal_of_another_size_has_one_frame_and_every_line(reflows):
    """Narrower, wider, lower, higher: on terminals that break their lines anew, and on those that cut them off."""
    sizes = [(80, 24), (50, 24), (90, 24), (90, 6), (31, 12), (100, 40), (9, 4), (80, 24)]
    with framed(reflows) as (terminal, frame, _):
        for number, size in enumerate(sizes):
            terminal.resize(*size)
            print("line", number)
            frame.draw()
            shown = [row for row in terminal.sync().shown if row]
            assert frames_on(shown) == 1 and shown[-1] == "#" * (size[0] - 1), (size, shown)
        frame.close()
        lines = terminal.sync().lines
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(len(sizes))]


def test_the_thread_draws_after_a_change_of_size_and_when_a_handler_has_a_line(monkeypatch):
    monkeypatch.setattr(live_frame, "LOOK_S", 0.005)
    monkeypatch.setattr(live_frame, "DRAW_S", 3600.0)
    with framed() as (terminal, frame, _):
        terminal.resize(50, 24)
        until(lambda: terminal.sync().shown[-2:-1] == ["#" * 49])
        frame.write_soon("SIGINT: finishing")
        until(lambda: "SIGINT: finishing" in terminal.sync().shown)


def test_a_forked_process_writes_as_without_a_frame():
    with framed() as (terminal, _, render):
        drawn = render.drawn
        child = os.fork()
        if child == 0:
            sys.stderr.write("from the child\n")
            sys.stderr.flush()
            os._exit(0 if render.drawn == drawn else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert "from the child" in terminal.sync().shown


def test_a_terminal_that_is_gone_ends_the_frame_alone(monkeypatch):
    with framed() as (terminal, frame, _):
        monkeypatch.setattr(frame, "_stream", open(os.devnull))  # which cannot be written
        frame.draw()
        assert not frame.is_ours() and sys.stderr is terminal.stream
        print("goes on")
        assert "goes on" in terminal.sync().lines


def test_the_screen_of_the_tests_breaks_and_cuts_lines():
    for reflows, shown in ((True, ["abcd", "ef", "gh", ""]), (False, ["abcd", "gh", ""])):
        screen = Screen(10, 5, reflows)
        screen.feed("abcdef\r\ngh\r\n")
        screen.resize(4, 5)
        assert screen.shown == shown
