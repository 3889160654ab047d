"""How a run shows where it stands: a panel, a bar, or lines of the log."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from library.training.progress_facts import Display, Length, Meter, Status, rates_text, time_texts

if TYPE_CHECKING:
    from library.training.option_groups import ProgressOptions

logger = logging.getLogger(__name__)

STEPS_BETWEEN_LINES = 10
LOSSES_SHOWN = 500


class LogLines(Display):
    """A line of the log every `every` steps."""

    def __init__(self, length: Length, meter: Meter, every: int) -> None:
        self._length, self._meter, self._every = length, meter, every
        self._texts: dict[str, str] = {}
        self._last = length.done

    def update(self, status: Status) -> None:
        if status.step // self._every == self._last // self._every and status.step != self._length.total:
            return
        self._last = status.step
        parts = [
            f"loss {status.losses[-1]:.4g}, mean {status.average:.4g}", rates_text(status.logs),
            *(f"{name} {text}" for name, text in self._texts.items()),
            *time_texts(self._meter, self._length.total - status.step),
        ]
        logger.info(
            "step %d/%d, epoch %d/%d: %s", status.step, self._length.total, status.epoch, self._length.num_epochs,
            ", ".join(part for part in parts if part),
        )  # fmt: skip

    def show(self, texts: Mapping[str, str]) -> None:
        self._texts.update(texts)


class Bar(Display):
    """A bar with rate and remaining time; on a console it moves twice a second, in a log file it is a line every ten
    seconds."""

    def __init__(self, length: Length) -> None:
        self._average: float | None = None
        self._texts: dict[str, str] = {}
        self._bar = _tqdm_bar(length.total, length.done, self._words)
        self._restore = lines_above_bar() if sys.stderr.isatty() else None

    def update(self, status: Status) -> None:
        self._average = status.average
        self._bar.update(status.step - self._bar.n)

    def show(self, texts: Mapping[str, str]) -> None:
        self._texts.update(texts)

    def _words(self) -> str:
        """What stands behind the bar."""
        average = {} if self._average is None else {"avr_loss": f"{self._average:.4g}"}
        return ", ".join(f"{name}={text.strip()}" for name, text in (average | self._texts).items())

    def close(self) -> None:
        self._bar.close()
        if self._restore is not None:
            self._restore()
            self._restore = None


def open_display(options: ProgressOptions, length: Length, meter: Meter) -> Display | None:
    """What the options ask for and the place of the messages can show."""
    kind = options.display or "panel"
    if kind == "none":
        return None
    if kind == "lines":
        return LogLines(length, meter, options.log_every or STEPS_BETWEEN_LINES)
    if kind == "panel" and can_hold_panel():
        from library.training.progress_panel import PanelDisplay

        return PanelDisplay(length, meter, options.loss_curve_steps or LOSSES_SHOWN)
    return Bar(length) if importlib.util.find_spec("tqdm") is not None else None


def can_hold_panel() -> bool:
    """Whether standard error is a terminal on which lines can be drawn anew, and the package that draws is there."""
    if sys.stderr is None or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        return False
    from rich.console import Console

    console = Console(file=sys.stderr)
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


def _tqdm_bar(total: int, done: int, words: Callable[[], str]) -> Any:
    """`words`: what stands behind the bar, asked for when it is drawn, which most steps do not do."""
    from tqdm import tqdm

    class WordedBar(tqdm):
        @property
        def format_dict(self) -> Mapping[str, Any]:
            return {**super().format_dict, "postfix": words()}

    is_console = sys.stderr.isatty()
    return WordedBar(
        total=total,
        initial=done,
        desc="steps",
        unit="step",
        position=0,  # whatever a run that ended by an error has left
        smoothing=0.05,
        dynamic_ncols=is_console,
        mininterval=0.5 if is_console else 10.0,
        file=sys.stderr if is_console else _FullLines(),
    )


class _FullLines:
    """Stream of a bar in a log file: each drawing is a line of its own, erasing is nothing."""

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _LineAboveBar:
    """Stream of a log handler: clears the bar, writes the line, draws the bar again."""

    def write(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def lines_above_bar() -> Callable[[], None]:
    """Let log lines of the console appear above the progress bar; the result undoes it."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__)
    ]
    streams = [handler.setStream(_LineAboveBar()) for handler in handlers]

    def restore() -> None:
        for handler, stream in zip(handlers, streams):
            handler.setStream(stream)

    return restore
