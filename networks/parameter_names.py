"""Tensors of one layer of an adapter under other programs' names, renamed to those that our modules have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

RENAMED: dict[str, str] = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "lora_magnitude_vector.default.weight": "dora_scale",
}
"""PEFT (with and without the name of an adapter) and old diffusers -> the names of kohya files"""


def layer_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One layer's tensors under kohya names. PEFT's magnitude [out] becomes a dora_scale [out, 1, ..] of the layer's rank."""
    renamed = {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    magnitude = renamed.get("dora_scale")
    if magnitude is not None and magnitude.ndim == 1:
        down = renamed.get("lora_down.weight")
        axes = 1 if down is None else down.ndim - 1
        renamed["dora_scale"] = magnitude.view(-1, *[1] * axes)
    return renamed
