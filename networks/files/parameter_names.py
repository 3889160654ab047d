"""Tensors of one layer of an adapter under other programs' names, renamed to those that our modules have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from library.checkpoints.adapter_tensors import OUTSIDE

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"

RENAMED: dict[str, str] = {
    **dict.fromkeys(
        ("lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_linear_layer.down.weight"), DOWN
    ),
    **dict.fromkeys(("lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_linear_layer.up.weight"), UP),
    **dict.fromkeys(
        ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"), "dora_scale"
    ),
}
"""PEFT (with and without the name of an adapter) and old diffusers -> the names of kohya files"""

PARAMETERS: dict[str, str] = {
    **RENAMED,
    **{
        name: name
        for name in (
            DOWN,
            UP,
            MID,
            "alpha",
            "dora_scale",
            "diff",
            "diff_b",
            "w_norm",
            "b_norm",
            "oft_blocks",
            "rescale",
        )
    },
    **{
        name: name
        for name in ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "on_input", "oft_diag", "scalar")
    },
    **{f"hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
"""ending of a key of any layout -> parameter in kohya files; those of kinds from outside keep their names"""


def ending_of(key: str) -> str | None:
    """The longest ending of a dotted key that is a parameter's name; None when there is none."""
    parts = key.split(".")
    endings = (".".join(parts[number:]) for number in range(1, len(parts)))
    return next((ending for ending in endings if ending in PARAMETERS or ending in OUTSIDE), None)


def layer_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One layer's tensors under kohya names. PEFT's magnitude [out] becomes a dora_scale [out, 1, ..] of the layer's
    rank."""
    renamed = {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    magnitude = renamed.get("dora_scale")
    if magnitude is not None and magnitude.ndim == 1:
        down = renamed.get("lora_down.weight")
        axes = 1 if down is None else down.ndim - 1
        renamed["dora_scale"] = magnitude.view(-1, *[1] * axes)
    return renamed
