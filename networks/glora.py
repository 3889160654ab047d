"""GLoRA: a low-rank change of the layer's own weight beside a plain one (arXiv 2306.07967), as LyCORIS writes it.

`delta W = scale * (W @ a1 @ a2 + b1 @ b2)`. The change depends on the weight that it is put on. `--network_module
networks.glora`, for every family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from networks.files.layer_tensors import alpha_of, scale_of
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.network_args import RANK_STABILIZED
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NO_INNER_VALUES, NetworkKind
from networks.kinds.targets import NetworkTargets
from networks.lora import lora_delta


def glora_delta(
    weight: torch.Tensor, first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    mid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight change of a GLoRA layer: scale * (W @ a1 @ a2 + b1 @ b2).

    Shapes: W [out, in, ..]; a1 [in, rank], a2 [rank, in] work on the inputs at every place of a kernel; b1 [out, rank],
    b2 [rank, in, ..] and `mid` are up, down and mid of a LoRA. `scale` is alpha / rank and is applied here only.
    """
    a1, a2 = (part.flatten(1) for part in first)
    own = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    return scale * own + lora_delta(second[1], second[0], scale, mid).reshape(weight.shape)


class GLoRAModule(AdapterModule):
    """GLoRA of one Linear or convolution. `mid_shape`: that of a Tucker core, which some files have."""

    weight_keys = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    optional_keys = ("bm.weight",)
    recomputes = True

    def build(self, *, mid_shape: Sequence[int] | None = None) -> None:
        rows, columns, *kernel = self.weight_shape
        ones = [1] * len(kernel)
        shapes = {
            "a1": (columns, self.lora_dim, *ones),
            "a2": (self.lora_dim, columns, *ones),
            "b1": (rows, self.lora_dim, *ones),
        }
        shapes["b2"] = (self.lora_dim, columns, *(ones if mid_shape else kernel))
        if mid_shape:
            shapes["bm"] = tuple(mid_shape)
        for name, shape in shapes.items():
            part = nn.Module()  # the file's names end in .weight
            part.register_parameter("weight", nn.Parameter(torch.empty(shape)))
            self.add_module(name, part)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """a1 and b1 (and the core) kaiming-uniform as nn.Linear starts, a2 and b2 zero."""
        for name, parameter in self.named_parameters():
            if name in ("a2.weight", "b2.weight"):
                parameter.zero_()
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """Source of the formula: glora_delta."""
        a1, a2, b1, b2 = (tensors[name].float() for name in GLoRAModule.weight_keys)
        mid = tensors["bm.weight"].float() if "bm.weight" in tensors else None
        return glora_delta(weight.float(), (a1, a2), (b1, b2), multiplier * scale_of(tensors), mid)

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for name in ("a1", "a2", "b1", "b2"):
            getattr(self, name).weight.mul_(ratio.sqrt())


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    """(rank, alpha, further arguments of GLoRAModule) of one layer's tensors in a file."""
    rank = tensors["a2.weight"].shape[0]
    alpha = alpha_of(tensors) or float(rank)
    mid = tensors.get("bm.weight")
    return rank, alpha, {"mid_shape": None if mid is None else tuple(mid.shape)}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    """Network arguments of GLoRA beside those that every adapter has."""
    return dict(RANK_STABILIZED)


KIND = NetworkKind("GLoRA", GLoRAModule, shape_from_file, arguments=arguments, refused={"dropout": NO_INNER_VALUES})
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
