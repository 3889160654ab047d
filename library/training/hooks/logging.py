"""The curves of a run, and what it shows of itself while it trains."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from library.training.hooks.base import Hook
from library.training.hooks.loss_curve import LossCurveHook
from library.training.hooks.losses import LossReader, StepLoss
from library.training.hooks.trackers import MetricsFile, Point, Tracker, metrics_path, open_trackers
from library.training.option_groups import LoggingOptions, ProgressOptions, SavingOptions
from library.training.progress_display import open_display
from library.training.progress_facts import Display, Length, Meter, Status

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

    from library.training.protocols import StateValue
    from library.training.run import Run

logger = logging.getLogger(__name__)

SHOWN_TEXTS = {"max_norm/keys_scaled": "Keys Scaled", "norm/avg_key_norm": "Average key norm"}


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
    of epochs. Trackers and the display exist on the main process; the window is kept by every rank.
    """

    def __init__(self, show_progress: bool = True) -> None:
        self.show_progress = show_progress
        self.window = LossWindow()
        self._trackers: list[Tracker] = []
        self._display: Display | None = None
        self._meter: Meter | None = None
        self._run: Run | None = None

    def on_train_start(self, run: Run) -> None:
        self._run = run
        self._reader = run.hooks.find(LossReader)
        self._reader.listen(self.on_losses)
        self.window = self.window.at(run.progress.global_step, run.progress.steps_per_epoch)
        if not run.runtime.is_main_process:
            return
        progress = run.progress
        self._meter = Meter(run.runtime.device, progress.global_step)
        try:
            self._trackers = open_trackers(run.config[LoggingOptions], run.config)
            if run.config[ProgressOptions].log_metrics:
                path = metrics_path(run.config[SavingOptions])
                self._trackers.append(MetricsFile(path, progress.global_step, self._meter))
        except OSError as error:
            logger.warning("the curves cannot be written (%s); training goes on without them", error.strerror or error)
        if self.show_progress:
            self._open_display(run, self._meter)

    def _open_display(self, run: Run, meter: Meter) -> None:
        progress, curve = run.progress, run.hooks.find(LossCurveHook)
        length = Length(
            progress.max_train_steps, progress.global_step, progress.num_epochs,
            run.config[SavingOptions].output_name or "", curve.losses_up_to(progress.global_step) if curve else (),
        )  # fmt: skip
        self._display = open_display(run.config[ProgressOptions], length, meter)
        if self._display is not None:
            run.stop.tell = self._display.telling(run.stop.tell)

    def on_losses(self, losses: list[StepLoss]) -> None:
        if self._meter is not None:
            self._meter.put(losses[-1].step)
        for entry in losses:
            self.window.put(entry.step, entry.loss)
            self.log(
                {"loss/current": entry.loss, "loss/average": self.window.average, **entry.logs},
                axis="step", step=entry.step, epoch=entry.epoch,
            )
        newest = losses[-1]
        if self._display is not None:
            self.show(**{text: f"{newest.logs[k]:.4g}" for k, text in SHOWN_TEXTS.items() if k in newest.logs})
            read = [entry.loss for entry in losses]
            self._display.update(Status(newest.step, newest.epoch, read, self.window.average, newest.logs))

    def log(
        self,
        values: Mapping[str, float | None],
        *,
        axis: str = "step",
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Send values to every tracker; None values are left out. `axis` is "step" or "epoch"."""
        if not self._trackers:
            return
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
        """Add short texts to the display."""
        if self._display is not None and texts:
            self._display.show(texts)

    def on_before_sample_images(self, run: Run) -> None:
        if self._meter is not None:
            self._meter.pause()

    def on_after_sample_images(self, run: Run) -> None:
        if self._meter is not None:
            self._meter.go_on()

    def on_epoch_start(self, run: Run) -> None:
        if run.runtime.is_main_process:
            logger.info("epoch %d of %d", run.progress.epoch, run.progress.num_epochs)

    def on_epoch_end(self, run: Run) -> None:
        self._reader.read()
        self.log({"loss/epoch_average": self.window.average}, axis="epoch")

    def on_train_end(self, run: Run) -> None:
        self._reader.read()
        self._end_display()

    def _end_display(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def planned_files(self, run: Run) -> list[str]:
        folder, progress = run.config[LoggingOptions].logging_dir, run.config[ProgressOptions]
        lines = [f"curves of this run in {folder}"] if folder else []
        return [*lines, metrics_path(run.config[SavingOptions]).name] if progress.log_metrics else lines

    def written_files(self) -> list[str]:
        return [str(tracker.folder) for tracker in self._trackers if tracker.folder is not None]

    def close(self, run: Run, error: BaseException | None) -> None:
        """End of the display and of the trackers, after the last hook that logs."""
        self._end_display()
        self._to_trackers(lambda tracker: tracker.close())

    def state_dict(self) -> dict[str, StateValue]:
        """The window as of the last reading; a save reads first (NonFiniteGuard.check_before_save)."""
        return self.window.state()

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        self.window = LossWindow.of_state(state)
