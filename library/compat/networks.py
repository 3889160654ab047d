"""LoRA networks made by their classes' constructors, as other code makes them, and merged as tensors in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.checkpoints.loading import Transform
from library.lora_utils import Adapter, MergeOnLoad
from networks.files.network_files import by_module, to_kohya_names
from networks.kinds.additional_network import AdditionalNetwork
from networks.kinds.network_base import build_module, build_network, encoder_list, read_settings
from networks.kinds.selection import plan_network
from networks.kinds.targets import NetworkTargets, targets_of_denoiser
from networks.lora import KIND, LoRAModule


class KnownNetwork(AdditionalNetwork):
    """What the networks of all families build themselves with, from ranks or from the ranks of single layers."""

    LORA_PREFIX_UNET = "lora_unet"
    LORA_PREFIX_TEXT_ENCODER = "lora_te"

    def build(
        self, text_encoder: Any, unet: nn.Module, multiplier: float, rank: int, alpha: float | None,
        dropout: float | None, pairs: Mapping[str, Any],
        module_class: type, modules_dim: Mapping[str, int] | None, modules_alpha: Mapping[str, float] | None,
    ) -> None:
        kind = KIND if module_class is LoRAModule else dataclasses.replace(KIND, module_class=module_class)
        given = {name: value for name, value in pairs.items() if value is not None}
        if modules_dim is None:
            made = build_network(kind, multiplier, rank, alpha, text_encoder, unet, dropout, given)
            super().__init__(made.targets, made.settings, made.loras, multiplier)
            return
        targets = kind.targets(targets_of_denoiser(unet))
        settings = read_settings(
            kind, targets, 1, alpha, dropout, {**given, "conv_dim": 1}
        )  # every layer; the ranks are given
        modules = []
        for plan in plan_network(targets, unet, encoder_list(text_encoder), settings):
            name = plan.layer.lora_name
            if modules_dim.get(name):
                own_alpha = (modules_alpha or {}).get(name, modules_dim[name])
                modules.append(
                    build_module(
                        kind, dataclasses.replace(plan, rank=modules_dim[name], alpha=own_alpha), multiplier, settings
                    )
                )
        super().__init__(targets, settings, modules, multiplier)


class LoRANetwork(KnownNetwork):
    """LoRA of Stable Diffusion 1, 2 and SDXL; which of them, the denoiser tells."""

    def __init__(
        self, text_encoder: Any, unet: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: float | None = 1,
        dropout: float | None = None, rank_dropout: float | None = None, module_dropout: float | None = None,
        conv_lora_dim: int | None = None,
        conv_alpha: float | None = None, block_dims: Sequence[int] | None = None,
        block_alphas: Sequence[float] | None = None,
        conv_block_dims: Sequence[int] | None = None, conv_block_alphas: Sequence[float] | None = None,
        modules_dim: Mapping[str, int] | None = None, modules_alpha: Mapping[str, float] | None = None,
        module_class: type = LoRAModule,
        varbose: bool = False, is_sdxl: bool = False,
    ) -> None:
        pairs = {
            "rank_dropout": rank_dropout, "module_dropout": module_dropout, "conv_dim": conv_lora_dim,
            "conv_alpha": conv_alpha if conv_lora_dim or conv_block_dims else None, "block_dims": row(block_dims),
            "block_alphas": row(block_alphas), "conv_block_dims": row(conv_block_dims),
            "conv_block_alphas": row(conv_block_alphas),
            "verbose": varbose or None,
        }
        self.build(
            text_encoder, unet, multiplier, lora_dim, alpha, dropout, pairs, module_class, modules_dim, modules_alpha
        )


def merging(
    targets: NetworkTargets, weights: Sequence[Mapping[str, Tensor]] | None, multipliers: Sequence[float] | None
) -> Transform | None:
    """Adapters as tensors under the names of a file, merged while the model is read; 1 where a multiplier is
    missing."""
    if not weights:
        return None
    strengths = [*(multipliers or ()), *[1.0] * len(weights)]
    adapters = [
        Adapter(
            f"adapter {number}",
            by_module(to_kohya_names(tensors, targets, f"adapter {number}")),
            lambda name, strength=strength: float(strength),
        )
        for number, (tensors, strength) in enumerate(zip(weights, strengths), 1)
    ]
    return MergeOnLoad(targets, adapters)


def shared_pairs(
    rank_dropout: float | None, module_dropout: float | None, conv_lora_dim: int | None, conv_alpha: float | None,
    verbose: bool,
) -> dict[str, Any]:
    """The arguments that networks of all families have."""
    return {
        "rank_dropout": rank_dropout, "module_dropout": module_dropout, "conv_dim": conv_lora_dim,
        "conv_alpha": conv_alpha if conv_lora_dim else None, "verbose": verbose or None,
    }  # fmt: skip


def row(values: Sequence[Any] | None) -> str | None:
    return None if values is None else ",".join(map(str, values))


def numbers(trained: Sequence[bool] | None) -> str | None:
    """The numbers of the blocks that are trained."""
    if trained is None:
        return None
    return ",".join(str(number) for number, is_trained in enumerate(trained) if is_trained) or "none"
