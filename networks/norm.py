"""Changes of norm layers: `w_norm` is added to the weight, `b_norm` to the bias. A few kilobytes for a whole model.

Trained alone by --network_module networks.norm, or beside any other adapter by --network_args train_norm=True.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from library.core.options import parse_bool
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import NORM_CLASSES, NetworkTargets, weight_name


class _Original(nn.Module):
    """A norm layer with its own forward, not the one that an adapter has put into it."""

    def __init__(self, layer: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self._call = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x)


class NormModule(AdapterModule):
    """w' = w + w_norm, b' = b + b_norm. `bias`: whether there is a b_norm; default: whether the layer has a bias.

    A norm layer is n(x) * w + b, so the change of its output is the layer itself with the changes as weight and bias.
    """

    weight_keys = ("w_norm",)
    optional_keys = ("b_norm",)
    layer_classes = NORM_CLASSES
    has_alpha = False
    is_norm = True
    decomposable = False  # a norm's weight is a vector of lengths itself

    def build(self, *, bias: bool | None = None) -> None:
        if bias is None:
            bias = getattr(self.org_module, "bias", None) is not None
        self.weight_name = weight_name(self.org_module) or "weight"
        shape = getattr(self.org_module, self.weight_name).shape
        self.w_norm = nn.Parameter(torch.zeros(shape))
        self.b_norm = nn.Parameter(torch.zeros(shape)) if bias else None

    @classmethod
    def unknown_keys(cls, names: Iterable[str]) -> list[str]:
        """A norm's bias is changed by b_norm."""
        return sorted(set(names) - {*cls.weight_keys, *cls.optional_keys, "alpha"})

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Zero: nothing is changed."""
        for parameter in self.parameters():
            parameter.zero_()

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """multiplier * w_norm."""
        return multiplier * tensors["w_norm"].float().view(weight.shape)

    @staticmethod
    def change_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        return tuple(tensors["w_norm"].shape)

    @staticmethod
    def bias_change(tensors: Mapping[str, torch.Tensor], multiplier: float) -> torch.Tensor | None:
        """multiplier * b_norm."""
        return multiplier * tensors["b_norm"].float() if "b_norm" in tensors else None

    def output_change(self, x: torch.Tensor, multiplier: float | None = None) -> torch.Tensor:
        multiplier = self.multiplier if multiplier is None else multiplier
        bias = self.bias_change(self.tensors(), multiplier)
        parts = {self.weight_name: self._dropped_rows(self.get_weight(multiplier))}
        if getattr(self.org_module, "bias", None) is not None:
            parts["bias"] = torch.zeros_like(parts[self.weight_name]) if bias is None else bias
        values = {f"layer.{name}": part.to(x.device, x.dtype) for name, part in parts.items()}
        return functional_call(_Original(self.org_module, self.org_forward), values, (x,))

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    return 1, None, {"bias": "b_norm" in tensors}


def norm_targets(targets: NetworkTargets) -> NetworkTargets:
    """The norm layers inside the blocks that other adapters train."""
    return replace(targets, leaf_classes=NORM_CLASSES)


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    return {"use_tucker": parse_bool, "rs_lora": parse_bool, "dora_wd": parse_bool, "split_qkv": parse_bool}


NO_RANK = "weights of norms are trained as they are, without matrices of a rank"
REFUSED: Mapping[str, str] = {
    "dropout": "there are no inner values; use rank_dropout (channels) or module_dropout in --network_args",
    "use_tucker": NO_RANK,
    "rs_lora": NO_RANK,
    "dora_wd": NO_RANK,
    "split_qkv": NO_RANK,
    "train_norm": "norm layers are all that it trains; leave it out",
    "network_dim": NO_RANK,
    "network_alpha": NO_RANK,
}

KIND = NetworkKind("norm", NormModule, shape_from_file, arguments=arguments, refused=REFUSED, targets=norm_targets)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
