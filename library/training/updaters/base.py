"""Updater: what happens between the loss of a micro-batch and the changed weights of an optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from library.training.run import Run


class Updater(ABC):
    """The contract, for whoever updates at the end of a step, inside the backward pass, block by block or in shards:

    `begin` once, when the Run is complete and resumed: registers what it needs on the parameters. `backward` for the
    loss of every micro-batch that has samples. `update` after the last micro-batch of an optimizer step, on every rank,
    also on one that had no samples: afterwards the weights are those of the next step on all ranks, no gradient is
    left, and the schedule has moved unless the step was skipped (fp16). Hooks get `on_gradients_ready` there if
    `gathers_gradients`. `end` when training is over or broke off: takes back what `begin` did.
    """

    gathers_gradients: bool = True
    """whether all gradients of a step exist at once, as clipping by their common norm and `on_gradients_ready` need
    them"""

    def begin(self, run: Run) -> None: ...

    @abstractmethod
    def backward(self, run: Run, loss: torch.Tensor) -> None: ...

    @abstractmethod
    def update(self, run: Run) -> None: ...

    def end(self, run: Run) -> None: ...


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
