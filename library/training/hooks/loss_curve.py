"""The loss curve as a picture and as a table, beside the trained file."""

from __future__ import annotations

import csv
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.atomic_file import atomic_path
from library.core.write_errors import WriteError
from library.training.checkpoint import CheckpointNames
from library.training.hooks.base import Hook
from library.training.hooks.losses import LossReader, StepLoss
from library.training.option_groups import SavingOptions

if TYPE_CHECKING:
    from library.training.protocols import StateValue
    from library.training.run import Run

logger = logging.getLogger(__name__)


class LossCurveHook(Hook):
    """Writes `{output_name}-loss.png` and `{output_name}-loss.csv` after every save and at the end of the run."""

    reads_saved_files = False

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        """(optimizer steps done, loss)"""
        self.levels: dict[int, dict[str, float]] = {}
        """optimizer steps done -> noise level -> validation loss at it"""
        self._drawn: tuple[Any, ...] | None = None
        self._is_restored = False
        self._paths: tuple[Path, ...] = ()

    def on_train_start(self, run: Run) -> None:
        self._reader = run.hooks.find(LossReader)
        self._reader.listen(self.on_losses)
        if self._is_restored:
            self._forget_after(run.progress.global_step)

    def _forget_after(self, done: int) -> None:
        """A run may go on at an earlier step than that of its state."""
        self.losses = self.losses_up_to(done)
        self.steps = [step for step in self.steps if step <= done]
        self.validation = [point for point in self.validation if point[0] <= done]
        self.levels = {step: losses for step, losses in self.levels.items() if step <= done}

    def losses_up_to(self, step: int) -> list[float]:
        return [loss for of_step, loss in zip(self.steps, self.losses) if of_step <= step]

    def on_losses(self, losses: list[StepLoss]) -> None:
        self.steps.extend(entry.step for entry in losses)
        self.losses.extend(entry.loss for entry in losses)

    def add_validation(self, step: int, loss: float, levels: Mapping[str, float] | None = None) -> None:
        """A validation loss, and those of its noise levels; of two at the same step the later one stays."""
        self.validation = [point for point in self.validation if point[0] != step] + [(step, loss)]
        self.levels[step] = dict(levels or {})

    def on_post_save(self, run: Run, path: str, metadata: dict[str, str]) -> None:
        self.write(run)

    def on_train_end(self, run: Run) -> None:
        self._reader.read()
        if run.runtime.is_main_process:
            self.write(run)

    def write(self, run: Run) -> None:
        """Write both files; nothing before the first step, without an output folder, or when nothing was added."""
        options, content = run.config[SavingOptions], (len(self.steps), tuple(self.validation))
        if not self.steps or not options.output_dir or content == self._drawn:
            return
        self._drawn = content
        stem = Path(options.output_dir) / f"{CheckpointNames(options.output_name).last()}-loss"
        averages = trailing_mean(self.losses, run.progress.steps_per_epoch)
        for ending, draw in ((".png", plot_losses), (".csv", functools.partial(write_table, levels=self.levels))):
            path = stem.with_name(stem.name + ending)
            try:
                draw(path, self.steps, self.losses, averages, self.validation)
                self._paths = (*(known for known in self._paths if known != path), path)
            except WriteError as error:
                logger.warning("%s; training goes on", error)

    def planned_files(self, run: Run) -> list[str]:
        stem = CheckpointNames(run.config[SavingOptions].output_name).last()
        return [f"{stem}-loss.png and {stem}-loss.csv"]

    def written_files(self) -> list[str]:
        return [str(path) for path in self._paths]

    def state_dict(self) -> dict[str, StateValue]:
        return {
            "steps": list(self.steps),
            "losses": list(self.losses),
            "validation": [list(point) for point in self.validation],
            "levels": [[step, losses] for step, losses in self.levels.items()],
        }

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        self._is_restored = True
        self.steps = [int(step) for step in state.get("steps", [])]
        self.losses = [float(loss) for loss in state.get("losses", [])]
        self.validation = [(int(step), float(loss)) for step, loss in state.get("validation", [])]
        self.levels = {
            int(step): {level: float(loss) for level, loss in losses.items()}
            for step, losses in state.get("levels", [])
        }


def trailing_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    window, total, means = max(1, window), 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def write_table(
    path: Path, steps: list[int], losses: list[float], averages: list[float], validation: list[tuple[int, float]],
    levels: Mapping[int, Mapping[str, float]] = {},
) -> None:
    """CSV with one row per step: step, loss, average, validation and that of each noise level (empty where there was
    none)."""
    names = sorted({level for of_step in levels.values() for level in of_step}, key=float)
    empty = ["", "", "", *[""] * len(names)]
    rows: dict[int, list[Any]] = {
        step: [step, loss, average, *empty[2:]] for step, loss, average in zip(steps, losses, averages)
    }
    for step, loss in validation:
        of_step = levels.get(step, {})
        rows.setdefault(step, [step, *empty])[3:] = [loss, *(of_step.get(level, "") for level in names)]
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "average", "validation", *(f"validation_{level}" for level in names)])
        writer.writerows(rows[step] for step in sorted(rows))


def plot_losses(
    path: Path, steps: list[int], losses: list[float], averages: list[float], validation: list[tuple[int, float]]
) -> None:
    """The curves as a PNG. Drawn on a figure of its own: the program's matplotlib settings are not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="step")
    axes.plot(steps, averages, color="#1f4e8c", linewidth=1.8, label="mean over an epoch")
    if validation:
        places, values = zip(*sorted(validation))
        axes.plot(places, values, color="#c8501e", marker="o", markersize=4, linewidth=1.5, label="validation")
        lowest = min(range(len(values)), key=lambda index: values[index])
        axes.plot(
            places[lowest],
            values[lowest],
            color="#c8501e",
            marker="*",
            markersize=14,
            linestyle="none",
            label=f"lowest, step {places[lowest]}",
        )
        for index, side in {lowest: "center", 0: "left", len(values) - 1: "right"}.items():
            axes.annotate(
                f"{values[index]:.4f}", (places[index], values[index]), textcoords="offset points", xytext=(0, 7),
                ha=side, fontsize=9
            )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    shown = [*averages, *(loss for _, loss in validation)]
    if min(shown) < max(shown) / 2:  # a curve that falls by less is not pressed flat by an axis from 0
        axes.set_ylim(bottom=0)
    axes.margins(y=0.1)  # room for the labels
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
