"""The ordinary way: all gradients of a step are gathered, then the optimizer moves all weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.training.updaters.base import Updater, trained_parameters

if TYPE_CHECKING:
    import torch

    from library.training.run import Run


class OrdinaryUpdater(Updater):
    """Sum gradients over ranks, clip, step the optimizer and, unless fp16 skipped it, the schedule."""

    def backward(self, run: Run, loss: torch.Tensor) -> None:
        run.runtime.backward(loss)

    def update(self, run: Run) -> None:
        parameters = trained_parameters(run.optimizer)
        self.reduce(run, parameters)
        if run.max_grad_norm:
            run.runtime.clip_gradients(parameters, run.max_grad_norm)
        else:
            run.runtime.unscale_gradients()
        run.hooks.on_gradients_ready(run)
        self.step(run)
        if not getattr(run.optimizer, "step_was_skipped", False):
            run.lr_scheduler.step()
        run.optimizer.zero_grad(set_to_none=True)

    def step(self, run: Run) -> None:
        """Move the weights by their gradients."""
        run.optimizer.step()

    def reduce(self, run: Run, parameters: list[torch.nn.Parameter]) -> None:
        """Sum the gradients over ranks."""
        run.runtime.reduce_gradients(parameters)
