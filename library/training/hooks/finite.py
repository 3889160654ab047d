"""Stops a run whose loss or weights are not finite, before anything of it is saved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from library.core.errors import TrainingError
from library.training.hooks.base import Hook
from library.training.hooks.losses import LossReader, StepLoss, gather_objects
from library.training.option_groups import SavingOptions

if TYPE_CHECKING:
    from library.training.run import Run

MAX_FILES_NAMED = 20
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""of --save_precision; None = as trained"""


class NonFiniteGuard(Hook):
    """Looks at every reading of the losses, and at the weights before a save.

    Whoever saves calls `check_before_save(run)` first, on all ranks. The files of a step are kept until its loss was
    read, so that the message names them even when the reading comes some steps late.
    """

    reads_saved_files = False

    def __init__(self) -> None:
        self.last_good_checkpoint: str | None = None
        self._reader: LossReader | None = None

    def on_train_start(self, run: Run) -> None:
        self._reader = run.hooks.find(LossReader)
        if self._reader is not None:
            self._reader.listen(self.check_losses)

    def on_post_save(self, run: Run, path: str, metadata: dict[str, str]) -> None:
        self.last_good_checkpoint = path

    def check_losses(self, losses: list[StepLoss]) -> None:
        """Raise TrainingError for the first step whose loss is NaN or infinite."""
        for entry in losses:
            if not math.isfinite(entry.loss):
                # the sum over ranks is not finite on all of them, so every rank comes here and can tell its files
                parts = gather_objects((entry.local_loss, entry.files))
                blamed = [name for loss, files in parts if files and not math.isfinite(loss) for name in files]
                files = blamed or [name for _, files in parts for name in files]
                raise TrainingError(
                    f"the loss of step {entry.step} is {entry.loss}; training stops and nothing of it is saved."
                    f" Images of that step: {_listed(files)}. {self._last_good()}"
                    " Usual causes are a learning rate that is too high, a damaged image or cache, and float16."
                )

    def check_before_save(self, run: Run) -> None:
        """Read what is pending and look at the trained weights: a finite loss may have had an infinite gradient."""
        if self._reader is not None:
            self._reader.read()
        bad = names_of_non_finite(run)
        if bad:
            raise TrainingError(
                f"after step {run.progress.global_step} these trained weights are not finite: {_listed(bad)};"
                f" nothing of them is saved. {self._last_good()}"
            )
        saving = run.config[SavingOptions]
        bad = [] if saving.clamp_overflow else names_of_non_finite(run, SAVE_DTYPES[saving.save_precision])
        if bad:
            raise TrainingError(
                f"after step {run.progress.global_step} these trained weights are too large for --save_precision "
                f"{saving.save_precision}:"
                f" {_listed(bad)}; nothing of them is saved. {self._last_good()} Use --save_precision bf16 or float, or"
                " --clamp_overflow to bound such numbers"
            )

    def _last_good(self) -> str:
        if self.last_good_checkpoint is None:
            return "No checkpoint was saved before."
        return f"Last good checkpoint: {self.last_good_checkpoint}."


def names_of_non_finite(run: Run, dtype: torch.dtype | None = None) -> list[str]:
    """Names of trained parameters with values that are NaN or infinite, or would be in `dtype`; found with one transfer
    when all is well.

    All ranks get a list that is empty on all or on none.
    """
    parameters = [
        (f"{part}.{name}", parameter)
        for part, module in run.trainable.modules().items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.numel()
    ]
    if not parameters:
        return []
    device = torch.device(run.runtime.device)
    bad = torch.stack(
        [(~torch.isfinite(p.detach().to(dtype or p.dtype))).any().to(device) for _, p in parameters]
    )  # [parameters]
    bad = run.runtime.sum_over_ranks(bad.to(torch.int32))
    if not bool(bad.any()):
        return []
    return [name for (name, _), is_bad in zip(parameters, bad.tolist()) if is_bad]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_FILES_NAMED]) or "unknown"
    return shown if len(names) <= MAX_FILES_NAMED else f"{shown} and {len(names) - MAX_FILES_NAMED} more"
