"""The moving average of the trained weights, kept while training (exponential moving average, EMA)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from library.core.errors import CheckpointError
from library.training.hooks.base import Hook
from library.training.option_groups import EmaOptions

if TYPE_CHECKING:
    from library.training.run import Run
    from library.training.trainables.base import Trainable

logger = logging.getLogger(__name__)


def decay_at(options: EmaOptions, update: int) -> float:
    """Share of the average that update number 0, 1, 2 ... leaves: --ema_decay, or with --ema_power p the smaller of it and
    1 - (update + 1)^-p, so that a young average does not hang on the start weights."""
    if options.ema_power is None:
        return options.ema_decay
    return min(options.ema_decay, 1 - (update + 1) ** -options.ema_power)


class EmaHook(Hook):
    """`--ema`: average = average * decay + weights * (1 - decay) after optimizer steps, float32.

    Samples and validation use the average, and every file gets a companion `<name>-ema` of it. Training does not see it: the
    weights are put back as they were. It is part of the state, so that a resumed run goes on exactly.
    """

    def __init__(self, trainable: Trainable, options: EmaOptions) -> None:
        self.trainable = trainable
        self.options = options
        self.updates = 0
        self._average: dict[str, torch.Tensor] = {}

    def on_train_start(self, run: Run) -> None:
        if not self._average:
            if run.progress.global_step:
                logger.warning("the state that is resumed holds no average; --ema begins with the weights of step %d", run.progress.global_step)
            self._average = {name: self._kept(parameter) for name, parameter in self._parameters().items()}

    @torch.no_grad()
    def on_post_optimizer_step(self, run: Run) -> None:
        step = run.progress.global_step
        if step <= self.options.ema_start_step:
            self._average = {name: self._kept(parameter) for name, parameter in self._parameters().items()}
        elif (step - self.options.ema_start_step) % self.options.ema_every_n_steps == 0:
            share = 1 - decay_at(self.options, self.updates)
            for name, parameter in self._parameters().items():
                own = self._average[name]
                own.lerp_(parameter.detach().to(own), share)
            self.updates += 1

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, module in self.trainable.modules().items()
            for name, parameter in module.named_parameters()  # frozen ones too: some kinds choose per step what learns
        }

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu" if self.options.ema_on_cpu else tensor.device, torch.float32, copy=True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the trained weights are the average."""
        parameters = self._parameters()
        kept = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, average in self._average.items():
                parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

    def extra_metadata(self, run: Run) -> dict[str, Any]:
        return {"ss_ema_decay": self.options.ema_decay, "ss_ema_power": self.options.ema_power, "ss_ema_updates": self.updates}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": {name: tensor.cpu() for name, tensor in self._average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters, average = self._parameters(), state["average"]
        wrong = [name for name in parameters.keys() | average.keys() if name not in parameters or name not in average]
        wrong += [name for name in parameters.keys() & average.keys() if parameters[name].shape != average[name].shape]
        if wrong:
            raise CheckpointError(
                f"the average (--ema) in the state does not fit this run: {len(wrong)} weights differ (first: {min(wrong)}); resume with the"
                " network options of the interrupted run"
            )
        self.updates = int(state["updates"])
        self._average = {name: average[name].to("cpu" if self.options.ema_on_cpu else p.device, torch.float32) for name, p in parameters.items()}
