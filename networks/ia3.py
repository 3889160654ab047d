"""IA3 (arXiv 2205.05638): one factor per row or column of a layer's weight, W' = W * (1 + weight). Hundreds of times
smaller than LoRA.

Trained layers: keys and values, whose outputs are scaled, and the second layer of every feed-forward, whose inputs are.
`include_patterns` adds others, which are scaled at their output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from library.core.options import parse_bool
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.network_args import NetworkSettings
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import Layer, NetworkTargets

KEYS_AND_VALUES = r"(to_k|to_v|k_proj|v_proj|qkv|linear1|SelfAttention\.[kv])"
"""layers that make keys and values; fused layers make queries and more besides"""
FEED_FORWARD_INPUTS = r"(ff\.net\.2|fc2|mlp\.2|(img|txt)_mlp\.2|mlp\.layer2|down_proj|linear2|DenseReluDense\.wo)"
"""second layers of feed-forwards"""
_ON_INPUT = re.compile(rf"(.*\.)?{FEED_FORWARD_INPUTS}")
OTHERS = rf"(?!(.*\.)?({KEYS_AND_VALUES}|{FEED_FORWARD_INPUTS})$).*"


class IA3Module(AdapterModule):
    """`weight` [in] or [out] ([1, in or out, 1, 1] for a convolution); `on_input`: which of them, 1 or 0 in files."""

    weight_keys = ("weight", "on_input")
    has_alpha = False
    decomposable = False  # its factors are of the kind that DoRA adds
    drops = ("module_dropout",)

    def build(self, *, on_input: bool = False) -> None:
        rows, columns, *kernel = self.weight_shape
        size = columns if on_input else rows
        self.weight = nn.Parameter(torch.zeros((1, size, *[1] * len(kernel)) if kernel else size))
        self.trains_input = on_input
        self.register_buffer("on_input", torch.tensor(int(on_input)))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Zero: every factor is 1."""
        self.weight.zero_()

    def tensors(self) -> dict[str, torch.Tensor]:
        on_input = torch.tensor(int(self.trains_input))  # on the CPU: reading waits for no device
        return {"weight": self.weight, "on_input": on_input, **self.bias_tensors()}

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """multiplier * weight * factors, by input column or output row."""
        axis = 1 if bool(tensors["on_input"]) else 0
        shape = [-1 if number == axis else 1 for number in range(weight.ndim)]
        return multiplier * weight.float() * tensors["weight"].float().view(shape)

    def output_change(self, x: torch.Tensor, multiplier: float | None = None) -> torch.Tensor:
        multiplier = self.multiplier if multiplier is None else multiplier
        factors = multiplier * self.weight.to(x.dtype)  # last axis of a Linear, axis 1 of a convolution
        if self.trains_input:
            return self.product(x * factors)
        output = self.product(x)
        return output * factors.to(output.dtype)

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        self.weight.mul_(ratio)


def ia3_targets(targets: NetworkTargets) -> NetworkTargets:
    """Keys, values and second feed-forward layers among the layers of the family."""
    return replace(
        targets,
        default_excludes=(*targets.default_excludes, OTHERS),
        encoder_excludes=(*targets.encoder_excludes, OTHERS),
    )


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    return 1, None, {"on_input": bool(tensors["on_input"])}


def shape_from_settings(settings: NetworkSettings, layer: Layer, split: Sequence[int] | None) -> dict[str, Any]:
    return {"on_input": _ON_INPUT.fullmatch(layer.path) is not None}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    return {"use_tucker": parse_bool, "rs_lora": parse_bool, "dora_wd": parse_bool, "split_qkv": parse_bool}


NO_RANK = "it has one factor per row or column, without matrices of a rank"
REFUSED: Mapping[str, str] = {
    "dropout": "there are no inner values; use module_dropout in --network_args",
    "rank_dropout": "there are no inner values; use module_dropout",
    "use_tucker": NO_RANK,
    "rs_lora": NO_RANK,
    "dora_wd": "its factors are of the kind that DoRA adds",
    "split_qkv": NO_RANK,
    "network_dim": NO_RANK,
    "network_alpha": NO_RANK,
}

KIND = NetworkKind(
    "IA3", IA3Module, shape_from_file, shape_from_settings, arguments, refused=REFUSED, targets=ia3_targets
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
