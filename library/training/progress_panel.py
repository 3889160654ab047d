"""The panel of a run on a terminal: where it stands, its losses as a curve, rate, time and memory."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from library.core.live_frame import LiveFrame
from library.training.progress_facts import Display, Length, Meter, Status, rates_text, time_texts

WIDEST = 100
CURVE_WIDTH, CURVE_HEIGHT = 60, 8
LEAST_CURVE = 3
"""lines of a curve that says something"""
EIGHTHS = " ▁▂▃▄▅▆▇█"


class PanelDisplay(Display):
    """The panel, below all other lines of the terminal. It leaves these at least half of the height, and does without
    curve, then without frame, where there is little."""

    def __init__(self, length: Length, meter: Meter, losses_shown: int) -> None:
        self._length, self._meter = length, meter
        self._losses: deque[float] = deque(length.losses, maxlen=losses_shown)
        self._status: Status | None = None
        self._texts: dict[str, str] = {}
        self._console = Console(file=sys.stderr, highlight=False)
        self._frame = LiveFrame(sys.stderr, self.lines)
        self._frame.start()

    def update(self, status: Status) -> None:
        with self._frame.holding():
            self._status = status
            self._losses.extend(loss for loss in status.losses if math.isfinite(loss))
        if status.step >= self._length.total:
            self._frame.draw()
        else:
            self._frame.refresh()

    def show(self, texts: Mapping[str, str]) -> None:
        with self._frame.holding():
            self._texts.update(texts)
        self._frame.refresh()

    def close(self) -> None:
        self._frame.close()

    def telling(self, directly: Callable[[str], object]) -> Callable[[str], object]:
        return lambda text: self._frame.write_soon(text) if self._frame.is_ours() else directly(text)

    def lines(self, width: int, height: int, activity: str) -> list[str]:
        """The panel as lines of a terminal of this size."""
        width, room = min(width, WIDEST), (height + 1) // 2
        rows: list[RenderableType] = [self._position(), *(_one_line(text) for text in self._facts() if text)]
        last = [_one_line(activity, "dim")] if activity else []
        if room < len(rows) + len(last) + 2:
            return self._printed(Group(*[*rows, *last][: max(1, room)]), width)
        curve_height = min(CURVE_HEIGHT, room - len(rows) - len(last) - 2)
        if curve_height >= LEAST_CURVE and len(self._losses) > 1:
            is_utf = self._console.encoding.startswith("utf")
            curve = curve_rows(list(self._losses), min(CURVE_WIDTH, width - 14), curve_height, is_utf)
            rows += [_one_line(row) for row in curve]
        return self._printed(Panel(Group(*rows, *last), title=Text(self._length.name or "training")), width)

    def _printed(self, what: RenderableType, width: int) -> list[str]:
        self._console.width = width
        with self._console.capture() as capture:
            self._console.print(what)
        return capture.get().rstrip("\n").split("\n")

    def _position(self) -> Table:
        """One row: step, bar, share, epoch."""
        status, length = self._status, self._length
        step = length.done if status is None else status.step
        epoch = "" if status is None else f" epoch {status.epoch}/{length.num_epochs}"
        row = Table.grid(expand=True, padding=(0, 1))
        for column in range(3):
            row.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if column == 1 else None)
        share = f"{step / max(1, length.total):.0%}"
        row.add_row(f"step {step}/{length.total}", ProgressBar(length.total, step), f"{share:>4}{epoch}")
        return row

    def _facts(self) -> list[str]:
        status, left = self._status, self._length.total - self._length.done
        learned = "waiting for the first step"
        if status is not None:
            left = self._length.total - status.step
            rates = rates_text(status.logs)
            learned = f"loss {status.losses[-1]:.4g}  mean of an epoch {status.average:.4g}  {rates}".rstrip()
        further = "  ".join(f"{name} {text}" for name, text in self._texts.items())
        return [learned, further, "  ".join(time_texts(self._meter, left))]


def _one_line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def bucket_means(values: Sequence[float], count: int) -> list[float]:
    """`values` in order as at most `count` means of parts whose lengths differ by one at most."""
    count = min(count, len(values))
    borders = [len(values) * i // count for i in range(count + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in zip(borders, borders[1:])]


def curve_rows(values: Sequence[float], width: int, height: int, is_utf: bool) -> list[str]:
    """The values as a picture of at most `width` columns and exactly `height` rows, with the largest and the smallest
    mean at its left: columns of eighths of a letter, or stars where the terminal has no such letters."""
    means = bucket_means(values, max(1, width))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    rows = []
    for row in range(height):
        floor = height - 1 - row  # full rows below this one
        if is_utf:
            levels = [1 + (mean - low) / span * (8 * height - 1) for mean in means]
            body = "".join(EIGHTHS[max(0, min(8, round(level) - 8 * floor))] for level in levels)
        else:
            body = "".join("*" if round((mean - low) / span * (height - 1)) == floor else " " for mean in means)
        rows.append(f"{labels[row]:>9} {'│' if is_utf else '|'}{body}")
    return rows
