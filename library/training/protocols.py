"""The shapes that records and calls of a run promise where several classes have them and none is the base of all.
Annotations name them; nothing heavy is imported for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypedDict, Union, runtime_checkable

if TYPE_CHECKING:
    import torch

    from library.checkpoints.loading import CheckpointFiles
    from library.dataset.batch import Batch
    from library.dataset.captions import Replacements
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
TextEncoders = Union["torch.nn.Module", Sequence["torch.nn.Module | None"]]
"""as network modules take them: a family's only one bare, else a list"""
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

    def set_replacements(self, replacements: Replacements) -> None:
        """What takes the place of words of captions, or of whole ones (textual inversion)."""

    def metadata(self) -> list[dict[str, Plain]]:
        """A record of each dataset."""


class BaseInfo(Protocol):
    """What the headers of a denoiser's file tell: where its tensors are, and its hyper-parameters."""

    source: CheckpointFiles
    params: object


class AdapterNetwork(Protocol):
    """What a network module makes, the user's own too: a torch module that changes layers of a model. Further calls
    (rates of several text encoders, steps, norms) are made where a network has them."""

    multiplier: float

    def apply_to(
        self, text_encoder: TextEncoders, unet: torch.nn.Module, apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Change the layers of the sides that are applied."""

    def enable_gradient_checkpointing(self) -> None: ...

    def prepare_grad_etc(self, text_encoder: TextEncoders, unet: torch.nn.Module) -> None:
        """Its parameters learn from here on."""

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None
    ) -> list[ParamGroup] | tuple[list[ParamGroup], list[str]]:
        """Groups, or groups and their names; older modules take no `default_lr`."""

    def on_epoch_start(self, text_encoder: TextEncoders, unet: torch.nn.Module) -> None: ...

    def set_multiplier(self, multiplier: float) -> None: ...

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None: ...

    def load_weights(self, file: str) -> object:
        """Returns what it tells of the file, for the log."""

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def to(self, device: torch.device, dtype: torch.dtype) -> AdapterNetwork: ...

    def train(self, mode: bool = True) -> AdapterNetwork: ...


class NetworkModule(Protocol):
    """What --network_module names: a module that makes networks."""

    def create_network(
        self, multiplier: float, network_dim: int | None, network_alpha: float | None, vae: torch.nn.Module | None,
        text_encoder: TextEncoders, unet: torch.nn.Module, neuron_dropout: float | None = None, **kwargs: object,
    ) -> AdapterNetwork | None:
        """A new network; `kwargs` are the pairs of --network_args, as texts."""

    def create_network_from_weights(
        self, multiplier: float, file: str | None, vae: torch.nn.Module | None, text_encoder: TextEncoders,
        unet: torch.nn.Module, weights_sd: Mapping[str, torch.Tensor] | None = None, for_inference: bool = False,
        **kwargs: object,
    ) -> tuple[AdapterNetwork, Mapping[str, torch.Tensor]]:
        """A network with the layers of a file, and the file's tensors."""
