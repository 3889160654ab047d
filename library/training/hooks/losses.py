"""The losses of the steps, collected on the device and read now and then in one transfer.

Reading a number from an accelerator waits for all work that was queued before it. So the losses stay where they are
until `every` steps have gathered; then all of them are summed over the ranks and copied at once, and whoever wants them
(log, curve, test for finite values) is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.training.hooks.base import Hook

if TYPE_CHECKING:
    from library.dataset.batch import Batch
    from library.training.accelerator_setup import Runtime
    from library.training.run import Run, StepOutput

STEPS_BETWEEN_READINGS = 10


@dataclass(frozen=True)
class StepLoss:
    """One optimizer step as it is logged. `step` counts from 1, `epoch` too; `loss` is the mean over all samples of the
    global batch, `local_loss` over those of this rank (NaN when it had none). `logs` are further values of this
    rank."""

    step: int
    epoch: int
    loss: float
    local_loss: float
    files: tuple[str, ...] = ()
    logs: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Pending:
    step: int
    epoch: int
    loss_sum: torch.Tensor  # one number on the device
    count: int
    files: tuple[str, ...]
    logs: dict[str, torch.Tensor | float]


Listener = Callable[[list[StepLoss]], None]


class LossReader(Hook):
    """Keeps what the steps give until it is read. All ranks read after the same steps, because reading sums over ranks.

    `on_step_end` expects an output whose `loss_sum` and `count` cover every micro-batch of the optimizer step.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self._pending: list[_Pending] = []
        self._files: list[str] = []
        self._rates: dict[str, Any] = {}
        self._listeners: list[Listener] = []
        self._runtime: Runtime | None = None

    def listen(self, listener: Listener) -> None:
        """Call `listener` with the losses of every reading, in the order of the steps."""
        self._listeners.append(listener)

    def on_train_start(self, run: Run) -> None:
        self._runtime = run.runtime
        if self.every is None:  # on the CPU a reading waits for nothing
            self.every = 1 if torch.device(run.runtime.device).type == "cpu" else STEPS_BETWEEN_READINGS

    def on_step_start(self, run: Run, batch: Batch) -> None:
        self._files.extend(batch.image_keys)
        self._rates = learning_rates(run)  # the scheduler has moved on when the step is over

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        logs = {**self._rates, **output.logs}
        for values in run.hooks.extra_step_logs(run):
            logs.update(values)
        loss_sum, progress = output.loss_sum.detach(), run.progress
        self._pending.append(
            _Pending(progress.global_step, progress.epoch, loss_sum, output.count, tuple(self._files), logs)
        )
        self._files = []
        if len(self._pending) >= (self.every or 1):
            self.read()

    def on_train_end(self, run: Run) -> None:
        self.read()

    def read(self) -> None:
        """Copy the pending losses and tell the listeners. Every rank has to call this after the same step."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        losses = _losses_of(pending, self._runtime)
        for listener in self._listeners:
            listener(losses)


def _losses_of(pending: list[_Pending], runtime: Runtime) -> list[StepLoss]:
    """Mean losses over the ranks, and the other logged values, with one copy from the device for all steps."""
    device = pending[0].loss_sum.device
    if device.type == "cpu" and runtime.num_processes == 1:  # nothing to copy and nothing to add
        return [_alone(p) for p in pending]
    counts = torch.tensor([float(p.count) for p in pending], device=device)
    local = torch.stack([torch.stack([p.loss_sum.float().reshape(()) for p in pending]), counts], dim=1)  # [steps, 2]
    together = runtime.sum_over_ranks(local)  # [steps, 2]
    tensors = [(i, name, v) for i, p in enumerate(pending) for name, v in p.logs.items() if isinstance(v, torch.Tensor)]
    extra = [v.detach().to(device, torch.float32).reshape(()) for _, _, v in tensors]
    numbers = torch.cat([together.flatten(), local.flatten(), *([torch.stack(extra)] if extra else [])]).tolist()
    size = 2 * len(pending)
    logs: list[dict[str, float]] = [
        {name: float(v) for name, v in p.logs.items() if not isinstance(v, torch.Tensor)} for p in pending
    ]
    for (i, name, _), value in zip(tensors, numbers[2 * size :]):
        logs[i][name] = value
    return [
        StepLoss(
            p.step,
            p.epoch,
            _ratio(numbers[2 * i], numbers[2 * i + 1]),
            _ratio(numbers[size + 2 * i], numbers[size + 2 * i + 1]),
            p.files,
            logs[i],
        )
        for i, p in enumerate(pending)
    ]


def _alone(pending: _Pending) -> StepLoss:
    """A step of one process on the CPU."""
    loss = _ratio(float(pending.loss_sum), pending.count)
    logs = {name: float(value) for name, value in pending.logs.items()}
    return StepLoss(pending.step, pending.epoch, loss, loss, pending.files, logs)


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def learning_rates(run: Run) -> dict[str, float | torch.Tensor]:
    """`lr/<group>` of every group of the run's optimizer."""
    return learning_rates_of(run.optimizer.param_groups)


def learning_rates_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, float | torch.Tensor]:
    """`lr/<group>` per optimizer group and, where the optimizer estimates a step size `d`, `lr/d*lr/<group>`.

    A group without a name is called by its number; a rate that lives on the device is copied there.
    """
    logs: dict[str, float | torch.Tensor] = {}
    for number, group in enumerate(groups):
        name = group.get("name") or f"group{number}"
        rate = group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else float(group["lr"] or 0.0)
        logs[f"lr/{name}"] = rate
        if "d" in group:
            effective = group.get("effective_lr")  # schedule-free Prodigy keeps the product itself
            logs[f"lr/d*lr/{name}"] = group["d"] * (rate if effective is None else effective)
    return logs


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of the ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
