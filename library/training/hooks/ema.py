"""The moving average of the trained weights, kept while training (exponential moving average, EMA)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from library.training.averaging import WeightAverage
from library.training.checkpoint import AVERAGED
from library.training.hooks.base import Hook
from library.training.option_groups import EmaOptions

if TYPE_CHECKING:
    import torch

    from library.training.protocols import Plain, StateValue
    from library.training.run import Run

logger = logging.getLogger(__name__)


def decay_at(options: EmaOptions, update: int) -> float:
    """Share of the average that update number 0, 1, 2 ... leaves: --ema_decay, or with --ema_power p the smaller of it
    and 1 - (update + 1)^-p, so that a young average does not hang on the start weights."""
    if options.ema_power is None:
        return options.ema_decay
    return min(options.ema_decay, 1 - (update + 1) ** -options.ema_power)


class EmaHook(Hook):
    """`--ema`: average = average * decay + weights * (1 - decay) after optimizer steps, float32.

    Samples and validation use the average, and every file gets a companion `<name>-ema` of it. Training does not see
    it: the weights are put back as they were. It is part of the state, so that a resumed run goes on exactly.

    `modules`: gives the trained modules by name.
    """

    companions = (AVERAGED,)
    reads_saved_files = False

    def __init__(self, modules: Callable[[], Mapping[str, torch.nn.Module]], options: EmaOptions) -> None:
        self.options = options
        self.updates = 0
        self.average = WeightAverage(modules, on_cpu=options.ema_on_cpu, what="the average (--ema)")

    def on_train_start(self, run: Run) -> None:
        if not self.average.tensors:
            if run.progress.global_step:
                logger.warning(
                    "the state that is resumed holds no average; --ema begins with the weights of step %d",
                    run.progress.global_step,
                )
            self.average.begin()

    def on_post_optimizer_step(self, run: Run) -> None:
        step = run.progress.global_step
        if step <= self.options.ema_start_step:
            self.average.begin()
        elif (step - self.options.ema_start_step) % self.options.ema_every_n_steps == 0:
            self.average.follow(1 - decay_at(self.options, self.updates))
            self.updates += 1

    def weights_for_eval(self, run: Run) -> AbstractContextManager[None]:
        return self.average.applied()

    def save_companion(
        self, run: Run, ending: str, path: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        with run.weights_for_eval():
            run.trainable.save(path, dtype, metadata)

    def extra_metadata(self, run: Run) -> dict[str, Plain]:
        return {
            "ss_ema_decay": self.options.ema_decay,
            "ss_ema_power": self.options.ema_power,
            "ss_ema_updates": self.updates,
        }

    def state_dict(self) -> dict[str, StateValue]:
        return {"updates": self.updates, "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        self.average.load_state_dict(state["average"])
        self.updates = int(state["updates"])
