"""Full change of a layer: as many numbers as the weight has, kept as the difference to the model (LyCORIS "full",
`diff`).

The strongest and largest adapter: what fine-tuning of these layers would learn, in a file that can be switched on and
off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from library.core.options import parse_bool
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import NetworkTargets


class FullModule(AdapterModule):
    """W' = W + diff, b' = b + diff_b. `bias`: whether there is a diff_b; default: whether the layer has a bias."""

    weight_keys = ("diff",)
    optional_keys = ("diff_b",)
    has_alpha = False

    def build(self, *, bias: bool | None = None) -> None:
        layer = self.org_module
        if bias is None:
            bias = layer.bias is not None
        self.diff = nn.Parameter(torch.zeros(self.weight_shape))
        self.diff_b = nn.Parameter(torch.zeros(self.weight_shape[0])) if bias else None

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Zero: nothing is changed."""
        for parameter in self.parameters():
            parameter.zero_()

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """multiplier * diff."""
        return multiplier * tensors["diff"].float().view(weight.shape)

    @staticmethod
    def change_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        return tuple(tensors["diff"].shape)

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio)


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    return 1, None, {"bias": "diff_b" in tensors}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    return {"use_tucker": parse_bool, "rs_lora": parse_bool, "dora_wd": parse_bool, "split_qkv": parse_bool}


NO_RANK = "the whole weight is trained, without matrices of a rank"
REFUSED: Mapping[str, str] = {
    "dropout": "there are no inner values; use rank_dropout (rows) or module_dropout in --network_args",
    "use_tucker": NO_RANK,
    "rs_lora": NO_RANK,
    "dora_wd": "norms are trained with the weight",
    "split_qkv": NO_RANK,
    "network_dim": NO_RANK,
    "network_alpha": NO_RANK,
}

KIND = NetworkKind("full", FullModule, shape_from_file, arguments=arguments, refused=REFUSED)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
