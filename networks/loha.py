"""LoHa: the change of a layer is the element-wise product of two low-rank matrices (FedPara, arXiv 2108.06098).

With rank r the change has a rank of up to r * r, for twice the parameters of a LoRA. The function below is the only
place where it is computed. `--network_module networks.loha`, for every family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from library.core.options import parse_bool
from networks.files.layer_tensors import alpha_of, scale_of
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.network_args import RANK_STABILIZED, WEIGHT_DECOMPOSITION, NetworkSettings
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NO_INNER_VALUES, NetworkKind
from networks.kinds.targets import Layer, NetworkTargets

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def loha_delta(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], scale: float,
    cores: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Weight change of a LoHa layer: scale * (a1 @ b1) * (a2 @ b2), the middle product element-wise.

    Shapes: a [out, rank], b [rank, in] -> [out, in]; for a convolution b [rank, in * kh * kw] -> [out, in * kh * kw].
    With `cores` t1, t2 [rank, rank, kh, kw] (Tucker) a is [rank, out], b [rank, in], and each half is T[p, q, ..] =
    sum_ij t[i, j, ..] * a[i, p] * b[j, q] -> [out, in, kh, kw]. `scale` is alpha / rank and is applied here only.
    Source: FedPara, Propositions 1 and 3; Tucker form: LyCORIS, arXiv 2309.14859.
    """
    if cores is None:
        return scale * (first[0] @ first[1]) * (second[0] @ second[1])
    halves = [
        torch.einsum("ij...,ip,jq->pq...", core, *pair) for core, pair in zip(cores, (first, second), strict=True)
    ]
    return scale * halves[0] * halves[1]


class LoHaModule(AdapterModule):
    """LoHa of one layer with a weight of two or more axes; `tucker` builds the six-tensor form of a convolution."""

    weight_keys = FACTORS
    optional_keys = ("hada_t1", "hada_t2")
    plus_names = ("hada_w2_a",)
    recomputes = True  # a step keeps two matrices of the weight's size otherwise

    def build(self, *, tucker: bool = False) -> None:
        rows, columns, *kernel = self.weight_shape
        self.is_tucker = tucker
        for number in (1, 2):
            if tucker:
                shapes = {f"hada_t{number}": (self.lora_dim, self.lora_dim, *kernel)}
                shapes |= {f"hada_w{number}_a": (self.lora_dim, rows), f"hada_w{number}_b": (self.lora_dim, columns)}
            else:
                inner = self.weight_shape[1:].numel()
                shapes = {f"hada_w{number}_a": (rows, self.lora_dim), f"hada_w{number}_b": (self.lora_dim, inner)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """b normal with deviation 1, a and t with 0.1; the a of the second half is zero, so that the change is."""
        for name, parameter in self.named_parameters():
            if name == "hada_w2_a":
                parameter.zero_()
            elif name.startswith("hada_"):
                parameter.normal_(0, 1.0 if name.endswith("_b") else 0.1, generator=generator)

    @staticmethod
    def change_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        a, b = tensors["hada_w1_a"].shape, tensors["hada_w1_b"].shape
        return (a[1], b[1], *tensors["hada_t1"].shape[2:]) if "hada_t1" in tensors else (a[0], math.prod(b[1:]))

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """Source of the formula: loha_delta."""
        w1_a, w1_b, w2_a, w2_b = (tensors[name].float() for name in FACTORS)
        cores = (tensors["hada_t1"].float(), tensors["hada_t2"].float()) if "hada_t1" in tensors else None
        scale = multiplier * scale_of(tensors)
        return loha_delta((w1_a, w1_b), (w2_a, w2_b), scale, cores).reshape(weight.shape)

    @classmethod
    def missing_keys(cls, names: Any) -> list[str]:
        """The two cores of the Tucker form belong together."""
        names = set(names)
        keys = [*cls.weight_keys, *(cls.optional_keys if names.intersection(cls.optional_keys) else ())]
        return [key for key in keys if key not in names]

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for name in FACTORS:
            getattr(self, name).mul_(ratio**0.25)


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    """(rank, alpha, further arguments of LoHaModule) of one layer's tensors in a file."""
    rank = tensors["hada_w1_b"].shape[0]
    alpha = alpha_of(tensors) or float(rank)
    return rank, alpha, {"tucker": "hada_t1" in tensors}


def shape_from_settings(settings: NetworkSettings, layer: Layer, split: Sequence[int] | None) -> dict[str, Any]:
    return {"tucker": bool(settings.get("use_tucker")) and layer.is_kxk_conv}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    """Network arguments of LoHa beside those that every adapter has."""
    return {"use_tucker": parse_bool, **WEIGHT_DECOMPOSITION, **RANK_STABILIZED}


KIND = NetworkKind("LoHa", LoHaModule, shape_from_file, shape_from_settings, arguments, {"dropout": NO_INNER_VALUES})
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
