"""A complete Run around one linear layer: real optimizer, schedule, counters and hooks, a step of microseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from library.core.options import Config
from library.dataset.plan import BatchRequest
from library.training.accelerator_setup import Runtime, prepare_runtime
from library.training.hooks.base import Hook, HookList
from library.training.option_groups import SHARED_GROUPS
from library.training.progress import Progress
from library.training.run import Models, Run, StepOutput
from library.training.trainables.base import Trainable


class LinearTrainable(Trainable):
    """Trains the layer itself."""

    name = "linear"

    def __init__(self, layer: torch.nn.Linear) -> None:
        self.layer = layer

    def check(self, family: Any) -> None: ...

    def attach(self, family: Any, models: Models, runtime: Runtime) -> None: ...

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.layer.weight], "lr": 0.1, "name": "weight"}, {"params": [self.layer.bias], "lr": 0.01}]

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"linear": self.layer}

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        torch.save(self.layer.state_dict(), path)

    def load(self, path: str) -> None:
        self.layer.load_state_dict(torch.load(path, weights_only=True))

    def metadata(self) -> dict[str, Any]:
        return {}


@dataclass
class PointBatch:
    """Points on a line: inputs and targets [B, 1]."""

    request: BatchRequest
    inputs: torch.Tensor
    targets: torch.Tensor
    image_keys: list[str]

    def __len__(self) -> int:
        return len(self.image_keys)

    def to(self, device: Any) -> PointBatch:
        return self


class LineObjective:
    def validation_times(self) -> list[float]:
        return [0.2, 0.4, 0.6, 0.8]


class LineStep:
    """Squared error of the layer; `times` are added to the target, so that every noise level gives another loss."""

    seed = 1
    trained_text_encoders: list[bool] = []
    objective = LineObjective()

    def __init__(self, layer: torch.nn.Linear) -> None:
        self.layer = layer

    def __call__(self, batch: PointBatch, times: torch.Tensor | None = None) -> StepOutput:
        targets = batch.targets if times is None else batch.targets + times[:, None]
        losses = (self.layer(batch.inputs) - targets).square().flatten()  # [B]
        return StepOutput(losses.sum() / batch.request.group_size, losses.detach().sum(), len(batch))


@dataclass
class LineData:
    """`per_epoch` batches of two points each; point i is (i / 10, 0)."""

    per_epoch: int = 4
    bad_batch: int | None = None
    validation: list[PointBatch] = field(default_factory=list)

    def batches(self, epoch: int, start: int = 0) -> list[PointBatch]:
        return [self.batch(epoch, index) for index in range(start, self.per_epoch)]

    def batch(self, epoch: int, index: int) -> PointBatch:
        request = BatchRequest(
            dataset=0, items=(2 * index, 2 * index + 1), positions=(0, 1), epoch=epoch,
            step=(epoch - 1) * self.per_epoch + index, index=index, group_size=2,
            is_last_of_group=True, is_last_of_epoch=index == self.per_epoch - 1,
        )
        inputs = torch.tensor([[2.0 * index], [2.0 * index + 1]]) / 10
        if index == self.bad_batch:
            inputs = inputs * float("nan")
        return PointBatch(request, inputs, torch.zeros(2, 1), [f"{2 * index}.png", f"{2 * index + 1}.png"])

    @property
    def holds_out(self) -> bool:
        return bool(self.validation)

    def validation_batches(self, limit: int | None = None) -> list[PointBatch]:
        return self.validation[:limit]


def small_run(hooks: list[Hook], *, steps: int = 8, data: LineData | None = None, **options: Any) -> Run:
    """A run over `steps` steps; `options` are those of the shared groups, by name."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1, 1)
    data = data or LineData()
    config = Config.read(options, SHARED_GROUPS)
    trainable = LinearTrainable(layer)
    optimizer = torch.optim.SGD(trainable.param_groups())
    per_epoch = data.per_epoch
    return Run(
        config=config, runtime=prepare_runtime(config), family=None, trainable=trainable,
        models=Models(denoiser=layer), strategies=None, step=LineStep(layer), data=data, optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        progress=Progress(steps, -(-steps // per_epoch), per_epoch, per_epoch), hooks=HookList(hooks),
    )
