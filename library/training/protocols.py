"""The shapes that records and calls of a run promise where several classes have them and none is the base of all.
Annotations name them; nothing heavy is imported for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypedDict, Union, runtime_checkable

if TYPE_CHECKING:
    import torch

    from library.dataset.batch import Batch
    from library.dataset.items import ImageItem
    from library.dataset.plan import BatchRequest, StepPlan
    from library.dataset.strategies import StrategySet
    from library.training.objective import NoisyLatents
    from library.training.run import DiTOutput, StepOutput
    from library.training.step import TrainStep

Plain = Union[None, bool, int, float, str, Sequence["Plain"], Mapping[str, "Plain"]]
"""what metadata and recorded settings hold: values as JSON gives them back"""
StateValue = Union[Plain, "torch.Tensor", Sequence["StateValue"], Mapping[str, "StateValue"]]
"""what states hold"""
Logs = dict[str, Union[float, "torch.Tensor"]]
"""values of a step for the log, by name"""


class ParamGroup(TypedDict, total=False):
    """One group of the optimizer. Without `lr` it gets --learning_rate; `name` is for the log."""

    params: list[torch.nn.Parameter]
    lr: float
    name: str


@runtime_checkable
class LrSchedule(Protocol):
    """The schedule of a run. Those of torch have `state_dict` and `load_state_dict` too, others do not."""

    def step(self) -> None:
        """Once after each step of the optimizer."""

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The rate of each group of the optimizer."""


class SampleLoss(Protocol):
    """From the prediction to one weighted loss per sample."""

    def __call__(self, output: DiTOutput, sample: NoisyLatents, batch: Batch) -> torch.Tensor:
        """Losses [B]."""


class StepBody(Protocol):
    """What a hook puts in the place of `TrainStep.process_batch`."""

    def __call__(self, step: TrainStep, batch: Batch, times: torch.Tensor | None) -> StepOutput:
        """`times` [B], or one per frame or token, are given in validation; None: they are drawn."""


class LossBody(Protocol):
    """What a hook puts in the place of `TrainStep.compute_loss`."""

    def __call__(
        self, step: TrainStep, output: DiTOutput, sample: NoisyLatents, batch: Batch
    ) -> tuple[torch.Tensor, Logs]:
        """Losses per sample [B], and values for the log."""


class BatchSource(Protocol):
    """All images of a run, for training or for validation: a DatasetGroup, or a user's own dataset behind its calls."""

    is_training: bool
    items: list[ImageItem]
    """none of a user's own dataset"""
    batch_size: int
    num_train_images: int
    num_reg_images: int

    def __len__(self) -> int: ...

    def __getitem__(self, request: BatchRequest) -> Batch: ...

    def load(self, request: BatchRequest) -> Batch:
        """The batch of a request, a pure function of it."""

    def plan(self, epoch: int, seed: int, num_processes: int, accumulation: int = 1) -> list[StepPlan]:
        """The optimizer steps of an epoch, as numbers of samples."""

    def set_strategies(self, strategies: StrategySet) -> None: ...

    def set_max_train_steps(self, max_train_steps: int) -> None: ...

    def metadata(self) -> list[dict[str, Plain]]:
        """A record of each dataset."""
