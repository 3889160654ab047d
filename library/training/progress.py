"""Counters of a run: where training is, where it ends, what a resumed run needs to go on at the same sample."""

from __future__ import annotations

from dataclasses import dataclass

from library.dataset.plan import BatchRequest


@dataclass
class Progress:
    """Epochs count from 1, steps are optimizer steps done.

    `batch_in_epoch`: micro-batches of the current epoch that are done (a multiple of the accumulation except at the end).
    """

    max_train_steps: int
    num_epochs: int
    steps_per_epoch: int
    batches_per_epoch: int
    global_step: int = 0
    epoch: int = 1
    batch_in_epoch: int = 0

    @property
    def is_finished(self) -> bool:
        return self.global_step >= self.max_train_steps

    def advance(self, request: BatchRequest) -> None:
        """Count an optimizer step whose last micro-batch was `request`."""
        self.global_step += 1
        self.batch_in_epoch = request.index + 1

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch_in_epoch = 0

    @property
    def finished_epochs(self) -> int:
        return self.global_step // self.steps_per_epoch
