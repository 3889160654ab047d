"""The curves and the progress bar of a run."""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.training.hooks.base import Hook
from library.training.hooks.losses import LossReader, StepLoss
from library.training.hooks.trackers import Point, Tracker, open_trackers
from library.training.option_groups import LoggingOptions

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from library.training.protocols import StateValue
    from library.training.run import Run

logger = logging.getLogger(__name__)

SHOWN_IN_BAR = {"max_norm/keys_scaled": "Keys Scaled", "norm/avg_key_norm": "Average key norm"}


class LossWindow:
    """Mean over the last `size` steps, which is an epoch. Its sum runs along and is made anew once an epoch, so that
    rounding does not add up; a state carries it, so that a resumed log equals that of a run that was never stopped."""

    def __init__(
        self, size: int = 1, values: Sequence[float] = (), total: float | None = None, step: int | None = None
    ) -> None:
        self.size = size
        self.values = deque(values, maxlen=size)
        self.total = math.fsum(self.values) if total is None else total
        self.step = step
        """that of the newest loss"""

    def put(self, step: int, loss: float) -> None:
        """`step` counts from 1."""
        self.total += loss - (self.values[0] if len(self.values) == self.size else 0.0)
        self.values.append(loss)
        self.step = step
        if step % self.size == 0:
            self.total = math.fsum(self.values)

    @property
    def average(self) -> float | None:
        return self.total / len(self.values) if self.values else None

    def at(self, step: int, size: int) -> LossWindow:
        """This window where a run goes on after `step`, with epochs of `size` steps; empty when its losses are of other
        steps."""
        if self.step not in (None, step):
            return LossWindow(size)
        if self.step is None and self.values:  # of an earlier version, by place in the epoch
            newest = (step - 1) % self.size + 1
            return LossWindow(size, [*list(self.values)[newest:], *list(self.values)[:newest]], step=step)
        return LossWindow(size, self.values, self.total if size == self.size else None, self.step)

    def state(self) -> dict[str, Any]:
        return {"window": list(self.values), "size": self.size, "sum": self.total, "step": self.step}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LossWindow:
        values = state.get("window", [])
        return cls(state.get("size", max(1, len(values))), values, state.get("sum"), state.get("step"))


class LoggingHook(Hook):
    """Logs each optimizer step once, with the mean loss over ranks and micro-batches, when the LossReader reads it.

    Keys: loss/current, loss/average, lr/<group>, lr/d*lr/<group>, what other hooks add; loss/epoch_average on the axis
    of epochs. Trackers and the bar exist on the main process; the window is kept by every rank.
    """

    def __init__(self, show_progress: bool = True) -> None:
        self.show_progress = show_progress
        self.window = LossWindow()
        self._trackers: list[Tracker] = []
        self._bar: Any = None
        self._run: Run | None = None
        self._postfix: dict[str, str] = {}
        self._restore_console: Callable[[], None] | None = None

    def on_train_start(self, run: Run) -> None:
        self._run = run
        self._reader = run.hooks.find(LossReader)
        self._reader.listen(self.on_losses)
        self.window = self.window.at(run.progress.global_step, run.progress.steps_per_epoch)
        if not run.runtime.is_main_process:
            return
        try:
            self._trackers = open_trackers(run.config[LoggingOptions], run.config)
        except OSError as error:
            logger.warning("the curves cannot be written (%s); training goes on without them", error.strerror or error)
        if self.show_progress:
            self._bar = _progress_bar(run.progress.max_train_steps, run.progress.global_step)
            self._restore_console = lines_above_bar() if sys.stderr.isatty() else None

    def on_losses(self, losses: list[StepLoss]) -> None:
        for entry in losses:
            self.window.put(entry.step, entry.loss)
            self.log(
                {"loss/current": entry.loss, "loss/average": self.window.average, **entry.logs},
                axis="step", step=entry.step, epoch=entry.epoch,
            )
        newest = losses[-1]
        self._postfix["avr_loss"] = f"{self.window.average:.4g}"
        self._postfix.update({text: f"{newest.logs[k]:.4g}" for k, text in SHOWN_IN_BAR.items() if k in newest.logs})
        self._refresh_bar(newest.step)

    def log(
        self,
        values: Mapping[str, float | None],
        *,
        axis: str = "step",
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Send values to every tracker; None values are left out. `axis` is "step" or "epoch"."""
        progress = self._run.progress
        step = progress.global_step if step is None else step
        epoch = progress.finished_epochs if epoch is None else epoch
        kept = {name: float(value) for name, value in values.items() if value is not None}
        point = Point(kept, axis, epoch if axis == "epoch" else step, step, epoch)
        self._to_trackers(lambda tracker: tracker.log(point))

    def log_image(self, name: str, picture: Image.Image, caption: str) -> None:
        """A picture for every tracker."""
        self._to_trackers(lambda tracker: tracker.log_image(name, picture, caption, self._point()))

    def log_video(self, name: str, path: Path, fps: float, caption: str) -> None:
        """A video file for every tracker."""
        self._to_trackers(lambda tracker: tracker.log_video(name, path, fps, caption, self._point()))

    def _point(self) -> Point:
        progress = self._run.progress
        return Point({}, "step", progress.global_step, progress.global_step, progress.finished_epochs)

    def _to_trackers(self, action: Callable[[Tracker], None]) -> None:
        """A tracker whose disk is full is told once and left out from then on; curves are not worth a run."""
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except OSError as error:
                self._trackers.remove(tracker)
                place = "" if tracker.folder is None else f" in {tracker.folder}"
                logger.warning(
                    "the curves%s cannot be written (%s); training goes on without them", place, error.strerror or error
                )

    def show(self, **texts: str) -> None:
        """Add short texts to the progress bar."""
        self._postfix.update(texts)
        self._refresh_bar(None)

    def on_epoch_start(self, run: Run) -> None:
        if run.runtime.is_main_process:
            logger.info("epoch %d of %d", run.progress.epoch, run.progress.num_epochs)

    def on_epoch_end(self, run: Run) -> None:
        self._reader.read()
        self.log({"loss/epoch_average": self.window.average}, axis="epoch")

    def on_train_end(self, run: Run) -> None:
        self._reader.read()
        self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._restore_console is not None:
            self._restore_console()
        self._bar = self._restore_console = None

    def planned_files(self, run: Run) -> list[str]:
        folder = run.config[LoggingOptions].logging_dir
        return [f"curves of this run in {folder}"] if folder else []

    def written_files(self) -> list[str]:
        return [str(tracker.folder) for tracker in self._trackers if tracker.folder is not None]

    def close(self, run: Run, error: BaseException | None) -> None:
        """End of the bar and of the trackers, after the last hook that logs."""
        self._end_bar()
        self._to_trackers(lambda tracker: tracker.close())

    def state_dict(self) -> dict[str, StateValue]:
        """The window as of the last reading; a save reads first (NonFiniteGuard.check_before_save)."""
        return self.window.state()

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        self.window = LossWindow.of_state(state)

    def _refresh_bar(self, step: int | None) -> None:
        if self._bar is None:
            return
        self._bar.set_postfix(self._postfix, refresh=False)
        if step is not None:
            self._bar.update(step - self._bar.n)


def _progress_bar(total: int, done: int) -> Any:
    """A bar with rate and remaining time; on a console it moves twice a second, in a log file it is a line every ten
    seconds. Without tqdm there is no bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    is_console = sys.stderr.isatty()
    return tqdm(
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
