"""DyLoRA (arXiv 2210.07558): LoRA that is trained at a drawn rank in every step, so that it may be cut to a lower rank
later.

Every optimizer step draws one of the pieces of `unit` ranks for each layer. The layer then works with the ranks up to
the end of this piece and only the piece is trained. Files are those of LoRA, with the whole rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from library.core.errors import CheckpointError, ConfigError
from library.core.options import parse_bool
from networks.kinds.adapter_module import AdapterModule, linear_output
from networks.kinds.network_args import RANK_STABILIZED, NetworkSettings
from networks.kinds.network_base import AdditionalNetwork, NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import NetworkTargets
from networks.lora import LoRAModule, shape_from_file


class DyLoRAModule(AdapterModule):
    """DyLoRA of one Linear or Conv2d: down [rank, in, ..] and up [out, rank, ..] in pieces of `unit` ranks.

    Training: change = scale * sqrt(rank / used) * up[:, :used] @ down[:used], the change of fewer ranks scaled to the
    size of all. Otherwise, and in files, it is LoRA of the whole rank.
    """

    weight_keys = LoRAModule.weight_keys
    plus_names = ("lora_up",)
    decomposable = False
    drops = ("dropout", "module_dropout")
    weight_change = staticmethod(LoRAModule.weight_change)

    def build(self, *, unit: int = 1) -> None:
        if getattr(self.org_module, "groups", 1) != 1:
            raise ConfigError(
                f"{self.lora_name} is a grouped convolution, for which DyLoRA is not defined; exclude this layer"
            )
        self.piece: int | None = None
        """the piece that is trained in this step; None = all of them"""
        self.cut(unit)

    def cut(self, unit: int) -> None:
        """Make pieces of `unit` ranks. ConfigError when the rank is no multiple of it."""
        if self.lora_dim % unit:
            raise ConfigError(
                f"{self.lora_name} has rank {self.lora_dim}, which is no multiple of unit={unit} (--network_args); "
                "change one of them"
            )
        rows, columns, *kernel = self.weight_shape
        count, ones = self.lora_dim // unit, [1] * len(kernel)
        self.unit = unit
        self.lora_down = nn.ParameterList(
            nn.Parameter(torch.zeros(unit, columns, *kernel)) for _ in range(count)
        )
        self.lora_up = nn.ParameterList(nn.Parameter(torch.zeros(rows, unit, *ones)) for _ in range(count))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """down kaiming-uniform as nn.Linear starts, up zero."""
        for down, up in zip(self.lora_down, self.lora_up, strict=True):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(up)

    def on_step_draws(self) -> None:
        """Choose the piece of this optimizer step, the same in all its micro-batches and ranks, and train it alone."""
        draws = self.step_state.draws
        if draws is None or not any(parameter.requires_grad for parameter in self.parameters()):
            return
        count = len(self.lora_down)
        self.piece = min(int(draws.batch_uniform("network dylora rank", self.lora_name) * count), count - 1)
        for number, (down, up) in enumerate(zip(self.lora_down, self.lora_up, strict=True)):
            down.requires_grad_(number == self.piece)
            up.requires_grad_(number == self.piece)

    def tensors(self) -> dict[str, torch.Tensor]:
        down, up = self._joined(len(self.lora_down))
        return {
            "lora_down.weight": down,
            "lora_up.weight": up,
            "alpha": torch.tensor(self._alpha),
            **self.bias_tensors(),
        }

    def _joined(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """down and up of the first `count` pieces."""
        return torch.cat(list(self.lora_down)[:count]), torch.cat(list(self.lora_up)[:count], dim=1)

    def output_change(self, x: torch.Tensor, multiplier: float | None = None) -> torch.Tensor:
        multiplier = self.multiplier if multiplier is None else multiplier
        count = len(self.lora_down)
        used = count if self.piece is None or not self.training else self.piece + 1
        down, up = self._joined(used)
        hidden = linear_output(self.org_module, x, down.to(x.dtype))  # [B, ..., ranks] or [B, ranks, H, W]
        if self.training and self.dropout:
            hidden = self.drop(hidden, self.dropout, tuple(hidden.shape[1:]), "network dropout")
        up = up.to(hidden.dtype)
        output = nn.functional.conv2d(hidden, up) if up.ndim == 4 else nn.functional.linear(hidden, up)
        return output * (multiplier * self.scale * math.sqrt(count / used))

    def file_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        return {**tensors, "alpha": self.alpha}

    def load_file_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if any(name not in tensors for name in self.weight_keys):
            raise CheckpointError(
                f"{self.lora_name}: the file has {', '.join(sorted(tensors))}; this network needs "
                f"{', '.join(self.weight_keys)}"
            )
        down, up = (tensors[name] for name in self.weight_keys)
        if down.shape[0] != self.lora_dim or up.ndim < 2 or up.shape[1] != self.lora_dim:
            raise CheckpointError(
                f"{self.lora_name}: the file has down {list(down.shape)} and up {list(up.shape)}; this network needs "
                f"rank {self.lora_dim}"
            )
        others = {name: tensor for name, tensor in tensors.items() if name not in self.weight_keys}
        downs, ups = down.split(self.unit), up.split(self.unit, dim=1)
        pieces = {
            f"lora_{name}.{i}": part for name, parts in (("down", downs), ("up", ups)) for i, part in enumerate(parts)
        }
        super().load_file_tensors({**pieces, **others})

    @torch.no_grad()
    def scale_weight(self, ratio: torch.Tensor) -> None:
        for parameter in self.parameters():
            parameter.mul_(ratio.sqrt())


def unit(value: Any) -> int:
    number = int(str(value)) if str(value).strip().isdigit() else 0
    if number < 1:
        raise ValueError("a whole number of 1 or more is needed: the ranks that are trained at a time")
    return number


def shape_from_settings(settings: NetworkSettings, layer: Any, split: Any) -> dict[str, Any]:
    return {"unit": settings.get("unit", 1)}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    return {"unit": unit, **RANK_STABILIZED, "use_tucker": parse_bool, "dora_wd": parse_bool, "split_qkv": parse_bool}


REFUSED: Mapping[str, str] = {
    "use_tucker": "a middle matrix joins all ranks, so that they cannot be cut off",
    "dora_wd": "norms belong to one rank; use networks.lora",
    "split_qkv": "use networks.lora",
    "rank_dropout": "ranks are left out by the drawn rank already",
}


def prepare(network: AdditionalNetwork) -> None:
    """Networks made from a file learn the unit here; those of new settings have it already."""
    for module in network.loras:
        if isinstance(module, DyLoRAModule) and module.unit != network.settings.get("unit", 1):
            module.cut(network.settings.get("unit", 1))


KIND = NetworkKind(
    "DyLoRA", DyLoRAModule, shape_from_file, shape_from_settings, arguments, refused=REFUSED, prepare=prepare
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
