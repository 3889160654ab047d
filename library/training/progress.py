"""Counters of a run: where training is, where it ends, what a resumed run needs to go on at the same sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Epochs count from 1, steps are optimizer steps done.

    `step_in_epoch`: optimizer steps of the current epoch that are done.
    """

    max_train_steps: int
    num_epochs: int
    steps_per_epoch: int
    batches_per_epoch: int
    global_step: int = 0
    epoch: int = 1
    step_in_epoch: int = 0

    @property
    def is_finished(self) -> bool:
        return self.global_step >= self.max_train_steps

    def advance(self) -> None:
        """Count an optimizer step."""
        self.global_step += 1
        self.step_in_epoch += 1

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0

    @property
    def finished_epochs(self) -> int:
        return self.global_step // self.steps_per_epoch
