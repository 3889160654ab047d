"""The loss on held-out images, at fixed noise levels and with fixed noise: comparable from start to end of a run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from library.core.keyed_random import isolated_rng
from library.training.hooks.base import Hook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.loss_curve import LossCurveHook
from library.training.hooks.losses import LossReader
from library.training.option_groups import ValidationOptions

if TYPE_CHECKING:
    from library.training.protocols import StateValue
    from library.training.run import Run, StepOutput

logger = logging.getLogger(__name__)


class ValidationHook(Hook):
    """Runs after every n steps and n epochs (each epoch when not given), before the first step, so that curves begin at
    the base model, and after the last one.

    Nothing of a pass depends on the state of the training but the weights: the batches come in file order with plain
    captions, their noise is keyed by (seed, sample), the noise levels are the four of the objective, and the mean
    starts anew in every pass. `seed` guards draws of code that reads the global generators.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.last_loss: float | None = None
        self.level_losses: dict[str, float] = {}
        """noise level (in the unit of the objective's times) -> loss of the last pass at it"""
        self.lowest: tuple[float, int] | None = None
        """lowest loss after training began, and the optimizer steps done then"""
        self._measured_at: int | None = None

    def on_train_start(self, run: Run) -> None:
        if run.progress.global_step == 0:
            loss = self.validate(run)
            if loss is not None:
                self._report(run, loss, "epoch", divergence=None)

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        every, progress = run.config[ValidationOptions].validate_every_n_steps, run.progress
        # a run that stops inside an epoch ends with a measurement too; at the border the epoch's own follows
        is_cut_off = progress.is_finished and progress.global_step % progress.steps_per_epoch != 0
        if is_cut_off or (every and progress.global_step % every == 0):
            self._validate_and_report(run, "step")

    def on_epoch_end(self, run: Run) -> None:
        every = run.config[ValidationOptions].validate_every_n_epochs or 1
        if run.progress.finished_epochs % every == 0:
            self._validate_and_report(run, "epoch")

    def on_train_end(self, run: Run) -> None:
        if self.lowest is not None and run.runtime.is_main_process:
            logger.info("lowest held-out loss: %s", self._lowest_text(run))

    def _lowest_text(self, run: Run) -> str:
        loss, step = self.lowest
        epoch = (step - 1) // run.progress.steps_per_epoch + 1
        return f"{loss:.5f} in epoch {epoch} (after step {step})"

    def state_dict(self) -> dict[str, StateValue]:
        return {} if self.lowest is None else {"lowest": list(self.lowest)}

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        if "lowest" in state:
            loss, step = state["lowest"]
            self.lowest = float(loss), int(step)

    def validate(self, run: Run) -> float | None:
        """Mean loss over all held-out samples and the four noise levels, and in `level_losses` that of each level; None
        without held-out images."""
        if not run.data.holds_out:  # nor are weights put in place for evaluation, which can mean copies of all of them
            return None
        limit = run.config[ValidationOptions].max_validation_steps
        times = run.step.objective.validation_times()
        device = torch.device(run.runtime.device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(
            1 + len(times), 2, dtype=dtype, device=device
        )  # loss sum and count, of all and of each level
        with run.weights_for_eval(), isolated_rng(self.seed), torch.no_grad():
            for batch in run.data.validation_batches(limit):
                if len(batch) == 0:  # this rank's slice of a short batch
                    continue
                batch = batch.to(device)
                for level, time in enumerate(times, start=1):
                    # on the CPU, because the key of the draws is read from it: a time on the device would be waited for
                    output = run.step(batch, times=torch.full((len(batch),), time))
                    for row in (0, level):
                        sums[row, 0] += output.loss_sum.detach().to(dtype)
                        sums[row, 1] += output.count
        means = [loss_sum / count if count else None for loss_sum, count in run.runtime.sum_over_ranks(sums).tolist()]
        self.level_losses = {f"{time:g}": mean for time, mean in zip(times, means[1:]) if mean is not None}
        return means[0]

    def _validate_and_report(self, run: Run, axis: str) -> None:
        if run.stop.agreed is not None:
            return
        is_known = self._measured_at == run.progress.global_step  # an epoch's end is a step's end too
        loss = self.last_loss if is_known else self.validate(run)
        if loss is None:
            return
        run.hooks.find(LossReader).read()  # the training average up to this step; also on ranks that do not log
        training = run.hooks.find(LoggingHook).window.average
        self._report(run, loss, axis, None if training is None else loss - training)

    def _report(self, run: Run, loss: float, axis: str, divergence: float | None) -> None:
        """Names of the known tools: loss/validation/{step,epoch}_average and _divergence; and _level_{noise level}."""
        is_new = self._measured_at != run.progress.global_step
        self.last_loss, self._measured_at = loss, run.progress.global_step
        log = run.hooks.find(LoggingHook)
        levels = {f"loss/validation/{axis}_level_{level}": mean for level, mean in self.level_losses.items()}
        log.log(
            {f"loss/validation/{axis}_average": loss, f"loss/validation/{axis}_divergence": divergence, **levels},
            axis=axis,
        )
        log.show(**{"val_avg_loss" if axis == "step" else "val_epoch_avg_loss": f"{loss:.4g}"})
        curve = run.hooks.find(LossCurveHook)
        if curve is not None:
            curve.add_validation(run.progress.global_step, loss, self.level_losses)
        is_lowest = self.lowest is None or loss < self.lowest[0]
        if is_lowest and run.progress.global_step > 0:
            self.lowest = loss, run.progress.global_step
        if is_new and run.runtime.is_main_process:
            mark = ", the lowest so far" if is_lowest and run.progress.global_step > 0 else ""
            logger.info("validation loss after %d steps: %.5f%s", run.progress.global_step, loss, mark)
