"""Two adapters on the same layers, of which one works at a time: for denoisers that hold one of two sets of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.core.errors import ConfigError
from library.training.checkpoint import side_name

if TYPE_CHECKING:
    from library.core.keyed_random import StepDraws
    from library.training.protocols import ParamGroup, TextEncoders
    from networks.kinds.additional_network import AdditionalNetwork
    from networks.kinds.adapter_module import AdapterModule


class NetworkPair(nn.Module):
    """What trains a network trains both; `use` says which one changes the model. `ending`: what stands behind the name
    of the file of the second one."""

    def __init__(self, first: AdditionalNetwork, second: AdditionalNetwork, ending: str) -> None:
        super().__init__()
        self.first, self.second, self.ending = first, second, ending
        if any(getattr(module, "ggpo", None) is not None for module in self.loras):
            raise ConfigError("--network_args with GGPO has no adapter for each expert; leave one of the two out")
        self.use(second=False)

    def use(self, *, second: bool) -> None:
        """The other one leaves the model as it is, and gets no gradient."""
        self.first.set_enabled(not second)
        self.second.set_enabled(second)

    @property
    def networks(self) -> tuple[AdditionalNetwork, AdditionalNetwork]:
        return self.first, self.second

    @property
    def loras(self) -> list[AdapterModule]:
        return [*self.first.loras, *self.second.loras]

    @property
    def multiplier(self) -> float:
        return self.first.multiplier

    # -- what happens to both ------------------------------------------------------------------------------------------

    def initialize(self, seed: int) -> None:
        """Both begin alike."""
        for network in self.networks:
            network.initialize(seed)

    def apply_to(
        self, text_encoder: TextEncoders, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        for network in self.networks:
            network.apply_to(text_encoder, unet, apply_text_encoder, apply_unet)

    def enable_gradient_checkpointing(self) -> None:
        for network in self.networks:
            network.enable_gradient_checkpointing()

    def prepare_grad_etc(self, text_encoder: TextEncoders = None, unet: nn.Module | None = None) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: TextEncoders = None, unet: nn.Module | None = None) -> None:
        self.train()

    def set_step_draws(self, draws: StepDraws | None) -> None:
        for network in self.networks:
            network.set_step_draws(draws)

    def set_step_times(self, times: torch.Tensor | None) -> None:
        for network in self.networks:
            network.set_step_times(times)

    def set_multiplier(self, multiplier: float) -> None:
        for network in self.networks:
            network.set_multiplier(multiplier)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: list[float] | None, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[ParamGroup], list[str]]:
        """The groups of the first, and then those of the second."""
        groups, names = [], []
        for network in self.networks:
            own, described = network.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)
            groups += own
            names += described
        return groups, names

    def apply_max_norm_regularization(self, max_norm_value: float, device: object = None) -> tuple[int, float, float]:
        """As that of a network, of the layers of both."""
        scaled, mean, largest = self.limit_norms(max_norm_value).tolist()
        return int(scaled), mean, largest

    def limit_norms(self, max_norm_value: float) -> torch.Tensor:
        """As that of a network [3], of the layers of both."""
        (few, mean, most), (more, other, largest) = (
            network.limit_norms(max_norm_value) for network in self.networks
        )
        return torch.stack([few + more, (mean + other) / 2, torch.maximum(most, largest)])

    # -- files ---------------------------------------------------------------------------------------------------------

    def side_path(self, path: str) -> str:
        """The file of the second beside that of the first."""
        return str(Path(path).with_name(side_name(Path(path).name, self.ending)))

    def file_state_dict(self) -> dict[str, torch.Tensor]:
        """Of the first; `save_weights` writes both."""
        return self.first.file_state_dict()

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        self.first.save_weights(file, dtype, metadata)
        self.second.save_weights(self.side_path(file), dtype, metadata)

    def load_weights(self, file: str) -> dict[str, list[str]]:
        """The second from the file beside it, or else from the same one."""
        report = self.first.load_weights(file)
        beside = self.side_path(file)
        self.second.load_weights(beside if Path(beside).is_file() else file)
        return report

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], label: str = "the file") -> dict[str, list[str]]:
        report = self.first.load_tensors(tensors, label)
        self.second.load_tensors(tensors, label)
        return report
