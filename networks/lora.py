"""LoRA: low-rank changes of Linear and Conv2d layers, for every model family that has a target table.

`delta W = scale * up @ down`. The functions below are the only place where a change is computed; forward, merging,
saving and the tools build on them. The two functions at the end are what a trainer calls (`--network_module
networks.lora`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.lazy_names import homes, lazy_names
from library.core.options import parse_bool
from networks.files.layer_tensors import alpha_of, scale_of
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.fused_pairs import fuse_pairs, split_pair
from networks.kinds.ggpo import Ggpo, row_norms_squared
from networks.kinds.network_args import RANK_STABILIZED, WEIGHT_DECOMPOSITION, NetworkSettings, positive_number
from networks.kinds.network_base import AdditionalNetwork, NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import Layer, NetworkTargets

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.networks", "LoRANetwork"))

_PART = re.compile(r"lora_(down|up)\.\d+\.weight")
"""a matrix of a layer that is split"""


def lora_delta(
    down: torch.Tensor, up: torch.Tensor, scale: float, mid: torch.Tensor | None = None
) -> torch.Tensor:
    """Weight change of a LoRA layer: scale * up @ down.

    Shapes: Linear down [rank, in], up [out, rank] -> [out, in]; convolution down [rank, in, kh, kw], up [out, rank, 1, 1]
    -> [out, in, kh, kw]; with `mid` [rank, rank, kh, kw] (Tucker) down is [rank, in, 1, 1] and
    delta[p, q, ..] = scale * sum_ij mid[i, j, ..] * up[p, i] * down[j, q].
    `scale` is alpha / rank and is applied here only. Source: LoRA, arXiv 2106.09685, section 4.1; Tucker form: LyCORIS,
    arXiv 2309.14859. Raises ValueError when the ranks differ.
    """
    rank = up.shape[1]
    if (mid.shape[0] if mid is not None else down.shape[0]) != rank:
        raise ValueError(f"down {list(down.shape)} and up {list(up.shape)} have different ranks")
    if mid is not None:
        return scale * torch.einsum("ij...,pi,jq->pq...", mid, up.flatten(1), down.flatten(1))
    product = up.flatten(1) @ down.flatten(1)  # [out, in * kh * kw]
    return scale * product.view(up.shape[0], *down.shape[1:])


def _scaled(hidden: torch.Tensor, scale: float) -> torch.Tensor:
    """Inner values times the scale: they are the smallest tensor that it can be applied to."""
    return hidden if scale == 1 else hidden * scale


class LoRAModule(AdapterModule):
    """LoRA of one Linear or Conv2d. `split` gives the rows of independently trained parts of a fused Linear; `tucker`
    builds the three-tensor form of a convolution."""

    weight_keys = ("lora_down.weight", "lora_up.weight")
    optional_keys = ("lora_mid.weight",)
    plus_names = ("lora_up",)
    drops = ("dropout", "rank_dropout", "module_dropout")

    def build(self, *, split: tuple[int, ...] | None = None, tucker: bool = False) -> None:
        self.split = split
        self.ggpo: Ggpo | None = None
        self.is_conv = type(self.org_module).__name__ == "Conv2d"
        if self.is_conv:
            self._build_conv(self.org_module, tucker)
        elif self.split:
            in_features = self.org_module.in_features
            self.lora_down = nn.ModuleList(nn.Linear(in_features, self.lora_dim, bias=False) for _ in self.split)
            self.lora_up = nn.ModuleList(nn.Linear(self.lora_dim, rows, bias=False) for rows in self.split)
        else:
            self.lora_down = nn.Linear(self.org_module.in_features, self.lora_dim, bias=False)
            self.lora_up = nn.Linear(self.lora_dim, self.org_module.out_features, bias=False)

    def _build_conv(self, org_module: nn.Conv2d, tucker: bool) -> None:
        if org_module.groups != 1:
            raise ConfigError(
                f"{self.lora_name} is a grouped convolution, for which LoRA is not defined; exclude this layer"
            )
        geometry = {
            "stride": org_module.stride, "padding": org_module.padding, "dilation": org_module.dilation,
            "padding_mode": org_module.padding_mode, "bias": False,
        }
        rank, kernel = self.lora_dim, org_module.kernel_size
        if tucker:
            self.lora_down = nn.Conv2d(org_module.in_channels, rank, 1, bias=False)
            self.lora_mid = nn.Conv2d(rank, rank, kernel, **geometry)
        else:
            self.lora_down = nn.Conv2d(org_module.in_channels, rank, kernel, **geometry)
        self.lora_up = nn.Conv2d(rank, org_module.out_channels, 1, bias=False)

    @staticmethod
    def change_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        if "lora_down.0.weight" in tensors:
            ups = [tensor for name, tensor in tensors.items() if name.startswith("lora_up.")]
            return (sum(up.shape[0] for up in ups), tensors["lora_down.0.weight"].shape[1])
        kernel = tensors.get("lora_mid.weight", tensors["lora_down.weight"]).shape[2:]
        return (tensors["lora_up.weight"].shape[0], tensors["lora_down.weight"].shape[1], *kernel)

    @classmethod
    def missing_keys(cls, names: Iterable[str]) -> list[str]:
        """A layer that is split may stand in parts, lora_down.0.weight and so on."""
        names = set(names)
        numbers = sorted(name.split(".")[1] for name in names if _PART.fullmatch(name))
        keys = [f"{name}.{i}.weight" for i in numbers for name in ("lora_down", "lora_up")] or cls.weight_keys
        return [key for key in keys if key not in names]

    @classmethod
    def unknown_keys(cls, names: Iterable[str]) -> list[str]:
        return [name for name in super().unknown_keys(names) if not _PART.fullmatch(name)]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """down (and mid) kaiming-uniform as nn.Linear starts, up zero."""
        for name, parameter in self.named_parameters():
            if name.startswith("lora_up"):
                parameter.zero_()
            elif name.startswith("lora_"):  # a dora_scale keeps the norms of the layer
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(down, up) of every part; one pair unless the layer is split."""
        return zip(self.lora_down, self.lora_up, strict=True) if self.split else iter([(self.lora_down, self.lora_up)])

    @property
    def compute_dtype(self) -> torch.dtype:
        return (self.lora_up[0] if self.split else self.lora_up).weight.dtype

    def apply_to(self) -> None:
        super().apply_to()
        self._is_one_pair = not (self.is_conv or self.split) and type(self).output_change is LoRAModule.output_change
        is_plain = getattr(self.org_forward, "__func__", None) is nn.Linear.forward
        self._adds_in_place = self._is_one_pair and is_plain and type(self.org_module.weight) is nn.Parameter

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As of every adapter. The output of a plain Linear is kept by nobody, so that the change is added to it where
        it lies in memory. Inputs with gaps between their rows have another kernel than rows without, with other last
        digits; they go the way of every adapter, as without a change the output is that of the layer."""
        is_whole = not self.enabled or self.multiplier == 0 or (self.module_dropout and self.training)
        has_type = torch.is_autocast_enabled(x.device.type) or x.dtype == self.compute_dtype
        adds_in_place = self._adds_in_place and has_type and x.is_contiguous()
        if is_whole or not adds_in_place or self._has_more(x):
            return super().forward(x, *args, **kwargs)
        rows = x.flatten(0, -2)  # [N, in]
        output, hidden, up = self.org_forward(rows), self._hidden_rows(x, rows), self.lora_up.weight
        output.addmm_(hidden, up.to(hidden.dtype).t(), alpha=self.multiplier * self.scale)  # [N, out]
        return output.view(*x.shape[:-1], len(up))

    def changed_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """With one pair of a Linear, the product with up, its scale and the sum are one kernel."""
        if not self._is_one_pair or self._has_more(x) or x.device != output.device:
            return super().changed_output(x, output)
        hidden, scale = self._hidden_rows(x, x.flatten(0, -2)), self.multiplier * self.scale
        if hidden.dtype != output.dtype:  # the sum has the wider of both
            return output + F.linear(_scaled(hidden, scale), self.lora_up.weight).view(output.shape)
        return torch.addmm(output.flatten(0, -2), hidden, self.lora_up.weight.t(), alpha=scale).view(output.shape)

    def _has_more(self, x: torch.Tensor) -> bool:
        """Whether something else than up @ down belongs to the change of this input."""
        has_noise = self.ggpo is not None and self.training
        return has_noise or self.dora_scale is not None or self.diff_b is not None or x.ndim < 2

    def _hidden_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Inner values [N, rank] of a Linear for x [B, ..., in], whose rows are `rows` [N, in]."""
        hidden = F.linear(rows, self.lora_down.weight)
        if not (self.training and self._drops_values):
            return hidden
        return self._dropped(hidden.view(*x.shape[:-1], self.lora_dim), 0).flatten(0, -2)

    @property
    def _drops_values(self) -> bool:
        """Whether `_dropped` does something in training."""
        return bool(self.dropout or self.rank_dropout)

    def output_change(self, x: torch.Tensor, multiplier: float | None = None) -> torch.Tensor:
        scale = (self.multiplier if multiplier is None else multiplier) * self.scale
        parts = []
        for number, (down, up) in enumerate(self.pairs()):
            hidden = down(x)  # [B, ..., rank] or [B, rank, H, W]
            if self.is_conv and hasattr(self, "lora_mid"):
                hidden = self.lora_mid(hidden)
            parts.append(up(_scaled(self._dropped(hidden, number), scale)))
        change = torch.cat(parts, dim=-1) if self.split else parts[0]
        if self.ggpo is not None and self.training:
            change = change + self.ggpo.perturbation(x, self)
        return change

    def _dropped(self, hidden: torch.Tensor, part: int) -> torch.Tensor:
        if not self.training:
            return hidden
        if self.dropout:
            hidden = self.drop(hidden, self.dropout, tuple(hidden.shape[1:]), f"network dropout {part}")
        if self.rank_dropout:
            ranks = self.lora_dim
            shape = (ranks, *[1] * (hidden.ndim - 2)) if self.is_conv else (*[1] * (hidden.ndim - 2), ranks)
            hidden = self.drop(hidden, self.rank_dropout, shape, f"network rank dropout {part}")
        return hidden

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """Source of the formula: lora_delta. Parts of a split layer stand below one another."""
        if "lora_down.0.weight" in tensors:
            count = sum(name.startswith("lora_down.") for name in tensors)
            pairs = [
                (tensors[f"lora_down.{i}.weight"].float(), tensors[f"lora_up.{i}.weight"].float()) for i in range(count)
            ]
            scale = multiplier * scale_of(tensors)
            return torch.cat([lora_delta(down, up, scale) for down, up in pairs])
        down, up = tensors["lora_down.weight"].float(), tensors["lora_up.weight"].float()
        mid = tensors["lora_mid.weight"].float() if "lora_mid.weight" in tensors else None
        scale = multiplier * scale_of(tensors)
        return lora_delta(down, up, scale, mid).view(weight.shape)  # files differ in kernel axes of size one

    @classmethod
    def rows_of(cls, tensors: Mapping[str, torch.Tensor], rows: slice, total: int) -> Mapping[str, torch.Tensor] | None:
        """A row of the change is a row of up times down; a magnitude (DoRA) per row is that row's alone."""
        up, magnitude = tensors.get("lora_up.weight"), tensors.get("dora_scale")
        if up is None or up.shape[0] != total or "lora_mid.weight" in tensors:
            return None
        if magnitude is None:
            return {**tensors, "lora_up.weight": up[rows]}
        if magnitude.ndim == 0 or magnitude.shape[0] != total or magnitude.numel() != total:
            return None
        return {**tensors, "lora_up.weight": up[rows], "dora_scale": magnitude[rows]}

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """Split layers are written fused, with alpha * parts: alpha / rank of the file is the scale that was
        trained."""
        if not self.split:
            return super().file_tensors()
        down, up = fuse_pairs([(down.weight.detach(), up.weight.detach()) for down, up in self.pairs()])
        bias = {name: tensor.detach() for name, tensor in self.bias_tensors().items()}
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": self.alpha * len(self.split), **bias}

    def load_file_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if not self.split or any(name not in tensors for name in self.weight_keys):
            return super().load_file_tensors(tensors)
        down, up = (tensors[name] for name in self.weight_keys)
        pairs = split_pair(down, up, self.split)
        if pairs is None:
            raise CheckpointError(
                f"{self.lora_name}: up {list(up.shape)} of the file is one pair for all parts; it was trained without "
                "split_qkv."
                " Leave split_qkv out"
            )
        parts = {f"lora_down.{i}.weight": pair[0] for i, pair in enumerate(pairs)}
        parts.update({f"lora_up.{i}.weight": pair[1] for i, pair in enumerate(pairs)})
        alpha = alpha_of(tensors) or float(down.shape[0])
        bias = {name: tensor for name, tensor in tensors.items() if name == "diff_b"}
        super().load_file_tensors({**parts, **bias, "alpha": torch.tensor(alpha / len(pairs))})

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        if hasattr(self, "lora_mid") or self.dora_scale is not None:
            return super().weight_norm()
        squares = [row_norms_squared(up.weight, down.weight).sum() for down, up in self.pairs()]
        return abs(self.scale) * torch.stack(squares).sum().sqrt()

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for down, up in self.pairs():
            down.weight.mul_(ratio.sqrt())
            up.weight.mul_(ratio.sqrt())


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    """(rank, alpha, further arguments of LoRAModule) of one layer's tensors in a file."""
    parts = len(split) if split else 1
    rank = tensors["lora_down.weight"].shape[0]
    alpha = alpha_of(tensors) or float(rank)
    if split and "dora_scale" in tensors:
        raise CheckpointError(
            "the file has dora_scale (DoRA), lengths that belong to the whole layer; leave split_qkv out"
        )
    if rank % parts:
        raise CheckpointError(f"rank {rank} of the file does not divide into {parts} parts; leave split_qkv out")
    return rank // parts, alpha / parts, {"tucker": True} if "lora_mid.weight" in tensors else {}


def shape_from_settings(settings: NetworkSettings, layer: Layer, split: Sequence[int] | None) -> dict[str, Any]:
    return {"tucker": True} if settings.get("use_tucker") and layer.is_kxk_conv else {}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    """Network arguments of LoRA beside those that every adapter has."""
    parsers = {
        "ggpo_sigma": positive_number,
        "ggpo_beta": positive_number,
        "use_tucker": parse_bool,
        **WEIGHT_DECOMPOSITION,
        **RANK_STABILIZED,
    }
    if targets.splits:
        parsers["split_qkv"] = parse_bool
    return parsers


def check(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for arguments that contradict each other."""
    problems = Problems()
    if (values.get("ggpo_sigma") is None) != (values.get("ggpo_beta") is None):
        problems.add("--network_args ggpo_sigma and ggpo_beta belong together; one of them is missing")
    if values.get("dora_wd"):
        for name in ("ggpo_sigma", "split_qkv"):
            if values.get(name):
                problems.add(f"--network_args {name} and dora_wd cannot be used together; leave one of them out")
    problems.raise_if_any()


def prepare(network: AdditionalNetwork) -> None:
    """Switch GGPO on where it is asked for."""
    sigma, beta = network.settings.get("ggpo_sigma"), network.settings.get("ggpo_beta")
    if sigma is None:
        return
    own = [
        module
        for module in network.loras
        if type(module) is LoRAModule and not module.is_conv and module.dora_scale is None
    ]
    if not own:
        logger.warning(
            "--network_args ggpo_sigma has no effect: no layer of this network is a linear LoRA without DoRA"
        )
    for module in own:
        module.ggpo = Ggpo(sigma, beta)


KIND = NetworkKind(
    "LoRA", LoRAModule, shape_from_file, shape_from_settings, arguments, check=check, prepare=prepare, splits=True
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
