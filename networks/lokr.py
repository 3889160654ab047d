"""LoKr: the change of a layer is a Kronecker product of a small and a larger matrix (KronA, arXiv 2212.10650).

The functions below are the only place where sizes are chosen and a change is computed. `--network_module
networks.lokr`, for every family. Files say everything by the shapes of their tensors, so that `factor` need not be
repeated when one is loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from library.core.errors import ConfigError
from library.core.options import parse_bool
from networks.files.layer_tensors import alpha_of, rank_of, scale_of
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.factorization import factorization
from networks.kinds.network_args import RANK_STABILIZED, WEIGHT_DECOMPOSITION, NetworkSettings
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NO_INNER_VALUES, NetworkKind
from networks.kinds.targets import Layer, NetworkTargets

if TYPE_CHECKING:
    from networks.kinds.network_base import AdditionalNetwork

logger = logging.getLogger(__name__)

HALVES = ("lokr_w1", "lokr_w2")


def lokr_shapes(
    weight_shape: Sequence[int], rank: int, factor: int = -1, *,
    decompose_both: bool = False, full_matrix: bool = False, unbalanced: bool = False, tucker: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape for a weight [out, in] or [out, in, kh, kw].

    With out = l * k and in = m * n: lokr_w1 [l, m], lokr_w2 [k, n, kh, kw]. A half becomes a product of two matrices of
    this rank where that is smaller: the second always, the first with `decompose_both`; never with `full_matrix`.
    `unbalanced` exchanges l and k; `tucker` keeps the kernel of a convolution in a core lokr_t2 [rank, rank, kh, kw].
    """
    rows, columns, *kernel = weight_shape
    (out_l, out_k), (in_m, in_n) = factorization(rows, factor), factorization(columns, factor)
    if unbalanced:
        out_l, out_k = out_k, out_l
    if decompose_both and not full_matrix and rank < max(out_l, in_m) / 2:
        shapes: dict[str, tuple[int, ...]] = {"lokr_w1_a": (out_l, rank), "lokr_w1_b": (rank, in_m)}
    else:
        shapes = {"lokr_w1": (out_l, in_m)}
    if full_matrix or rank >= max(out_k, in_n) / 2:
        shapes["lokr_w2"] = (out_k, in_n, *kernel)
    elif tucker:
        shapes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, out_k), "lokr_w2_b": (rank, in_n)}
    else:
        shapes |= {"lokr_w2_a": (out_k, rank), "lokr_w2_b": (rank, in_n * math.prod(kernel))}
    return shapes


def lokr_halves(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """w1 [l, m] and w2 [k, n], of a convolution [k, n, kh, kw] or [k, n * kh * kw], multiplied out."""
    w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        return w1, tensors["lokr_w2"]
    w2_a, w2_b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    if "lokr_t2" in tensors:
        return w1, torch.einsum("ij...,ip,jq->pq...", tensors["lokr_t2"], w2_a, w2_b)
    return w1, w2_a @ w2_b.flatten(1)


def lokr_delta(w1: torch.Tensor, w2: torch.Tensor, scale: float) -> torch.Tensor:
    """Weight change of a LoKr layer: scale * w1 (x) w2, element [a * k + p, c * n + q, ..] = w1[a, c] * w2[p, q, ..].

    Shapes: w1 [l, m], w2 [k, n, ..] -> [l * k, m * n, ..]. `scale` is alpha / rank and is applied here only.
    """
    product = torch.einsum("ac,pq...->apcq...", w1 * scale, w2)
    return product.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])


def is_full(names: Iterable[str]) -> bool:
    """Whether both halves are plain matrices: no rank is involved, and the scale is 1 whatever alpha says."""
    return set(HALVES) <= set(names)


def lokr_rank(tensors: Mapping[str, torch.Tensor]) -> int:
    """Rank of a layer's tensors; for plain halves, which have none, the larger side of the second."""
    return rank_of(tensors) or max(tensors["lokr_w2"].shape[:2])


class LoKrModule(AdapterModule):
    """LoKr of one layer with a weight of two or more axes. `shapes` are those of a file; otherwise `sizing` holds the
    keyword arguments of lokr_shapes."""

    weight_keys = HALVES
    optional_keys = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    plus_names = ("lokr_w1",)
    recomputes = True

    def build(self, *, shapes: Mapping[str, tuple[int, ...]] | None = None, **sizing: Any) -> None:
        for name, shape in (shapes or lokr_shapes(self.weight_shape, self.lora_dim, **sizing)).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.is_full = is_full(dict(self.named_parameters()))
        if self.is_full:
            self.set_alpha(None)

    @property
    def scale(self) -> float:
        return 1.0 if self.is_full else super().scale

    @classmethod
    def missing_keys(cls, names: Iterable[str]) -> list[str]:
        """Each half stands as one tensor or as two."""
        names = set(names)
        keys = [key for half in HALVES for key in ((half,) if f"{half}_a" not in names else (f"{half}_a", f"{half}_b"))]
        return [key for key in keys if key not in names]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """kaiming-uniform as nn.Linear starts; the second half, or its b, is zero, so that the change is."""
        for name, parameter in self.named_parameters():
            if name in ("lokr_w2", "lokr_w2_b"):
                parameter.zero_()
            elif name.startswith("lokr_"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def output_change(self, x: torch.Tensor, multiplier: float | None = None) -> torch.Tensor:
        """For a Linear the two halves are applied one after the other; their product is never built."""
        multiplier = self.multiplier if multiplier is None else multiplier
        if type(self.org_module).__name__ != "Linear":
            return super().output_change(x, multiplier)
        tensors = dict(self.named_parameters())
        w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        hidden = x.unflatten(-1, (w1.shape[1], -1))  # [..., m, n]
        for name in ("lokr_w2",) if "lokr_w2" in tensors else ("lokr_w2_b", "lokr_w2_a"):
            hidden = F.linear(hidden, tensors[name])  # [..., m, k]
        change = F.linear(hidden.transpose(-1, -2), w1)  # [..., k, l]
        change = change.transpose(-1, -2).flatten(-2) * (multiplier * self.scale)  # [..., out]
        return self._dropped_rows(change.transpose(0, -1)).transpose(
            0, -1
        )  # rows of the weight are places of the output

    @staticmethod
    def change_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        w1, w2 = (
            half.shape
            for half in lokr_halves({name: tensor.to("meta", torch.float32) for name, tensor in tensors.items()})
        )
        return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """Source of the formula: lokr_delta."""
        floats = {name: tensor.float() for name, tensor in tensors.items()}
        return lokr_delta(*lokr_halves(floats), multiplier * scale_of(tensors)).reshape(weight.shape)

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        if self.dora_scale is not None:
            return super().weight_norm()
        w1, w2 = lokr_halves(dict(self.named_parameters()))
        return abs(self.scale) * w1.norm() * w2.norm()  # norms of Kronecker products multiply

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        parameters = dict(self.named_parameters())
        for half in HALVES:
            (parameters[half] if half in parameters else parameters[f"{half}_a"]).mul_(ratio.sqrt())


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    """(rank, alpha, further arguments of LoKrModule) of one layer's tensors in a file."""
    rank = lokr_rank(tensors)
    alpha = alpha_of(tensors) or float(rank)
    return (
        rank,
        alpha,
        {"shapes": {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("lokr_")}},
    )


def shape_from_settings(settings: NetworkSettings, layer: Layer, split: Sequence[int] | None) -> dict[str, Any]:
    return {
        "factor": settings.get("factor", -1),
        "decompose_both": settings.get("decompose_both", False),
        "full_matrix": settings.get("full_matrix", False),
        "unbalanced": settings.get("unbalanced_factorization", False),
        "tucker": settings.get("use_tucker", False) and layer.is_kxk_conv,
    }


def factor_value(value: Any) -> int:
    try:
        factor = int(str(value))
    except ValueError:
        factor = 0
    if factor != -1 and factor < 1:
        raise ValueError("a whole number of 1 or more is needed, or -1 for the divisor nearest to the square root")
    return factor


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    """Network arguments of LoKr beside those that every adapter has."""
    switches = ("use_tucker", "decompose_both", "full_matrix", "unbalanced_factorization")
    return {"factor": factor_value, **dict.fromkeys(switches, parse_bool), **WEIGHT_DECOMPOSITION, **RANK_STABILIZED}


def check(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments that contradict each other."""
    if values.get("full_matrix"):
        idle = [name for name in ("decompose_both", "use_tucker", "rs_lora") if values.get(name)]
        if idle:
            raise ConfigError(
                f"--network_args full_matrix leaves nothing for {', '.join(idle)} to do; leave one side out"
            )


def prepare(network: AdditionalNetwork) -> None:
    """Tell where the rank is so large that a plain matrix is smaller."""
    if network.settings.get("full_matrix"):
        return
    full = [module for module in network.loras if isinstance(module, LoKrModule) and hasattr(module, "lokr_w2")]
    if full:
        logger.warning(
            "LoKr: %d of %d layers train their second half as a plain matrix, as rank %d is no saving there (first: "
            "%s);"
            " where the first half is plain too, alpha has no effect",
            len(full),
            len(network.loras),
            full[0].lora_dim,
            full[0].lora_name,
        )


KIND = NetworkKind(
    "LoKr", LoKrModule, shape_from_file, shape_from_settings, arguments, {"dropout": NO_INNER_VALUES}, check,
    prepare=prepare
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
