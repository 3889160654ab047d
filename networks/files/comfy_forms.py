"""Tensors of a layer in the form in which ComfyUI computes the same change from them.

It reads the kinds of LyCORIS under dotted names, with formulas of its own in three places:

| kind | here | ComfyUI |
|---|---|---|
| OFT, BOFT | alpha * rows is the limit of the rotation | alpha itself is |
| OFT | parts of a fused layer apart; `rescale` counts | one tensor of blocks; `rescale` is not looked at |
| DoRA | lengths of the rows belong to the changed weight | those of rows to the original weight, those of columns to the changed one |

The limit is worked into the blocks, and parts become one tensor with blocks of the size of the largest: the rotation is
the same. What cannot be brought into a form with the same result is told by `difference`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from library.core.errors import CheckpointError
from networks.kinds.rotation_blocks import block_names, limit_factor
from networks.kinds.weight_decomposition import on_outputs

Tensors = Mapping[str, torch.Tensor]


def for_comfy(name: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """One layer's tensors. CheckpointError when blocks of different sizes cannot be one tensor."""
    blocks = block_names(tensors)
    if blocks[0] not in tensors:
        return dict(tensors)
    alpha = float(tensors.get("alpha", 0.0))
    limited = [_limited(tensors[key], alpha) for key in blocks]
    rest = {key: tensor for key, tensor in tensors.items() if key not in blocks and key != "alpha"}
    return {**rest, "oft_blocks": limited[0] if len(limited) == 1 else _joined(name, limited)}


def _limited(blocks: torch.Tensor, alpha: float) -> torch.Tensor:
    """Free matrices whose rotation needs no limit."""
    if alpha <= 0:
        return blocks
    rows = blocks.shape[-3] * blocks.shape[-1]
    factor = limit_factor(blocks.float() - blocks.float().mT, alpha * rows)
    return blocks if float(factor) == 1 else (blocks.float() * factor).to(blocks.dtype)


def _joined(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts [k, n_i, n_i] as one tensor [k', n, n]: neighbours of small blocks become one larger block with zeros
    between them."""
    size = math.lcm(*(part.shape[-1] for part in parts))
    wrong = [part for part in parts if part.shape[0] * part.shape[1] % size]
    if wrong:
        sizes = ", ".join(f"{part.shape[0]} x {part.shape[1]}" for part in parts)
        raise CheckpointError(
            f"{name} is rotated in parts with blocks of {sizes} rows, which cannot be one tensor of equal blocks as "
            "ComfyUI reads it; train with a"
            " --network_dim that is a multiple of 4, or merge the file into the model (tools/merge_lora.py --model)"
        )
    grouped = []
    for part in parts:
        together = size // part.shape[-1]
        grouped += [torch.block_diag(*part[start : start + together]) for start in range(0, part.shape[0], together)]
    return torch.stack(grouped)


def difference(tensors: Tensors) -> str | None:
    """Why ComfyUI gives another result for these tensors; None where it gives the same."""
    if "dora_scale" in tensors and on_outputs(tensors["dora_scale"]) and tensors["dora_scale"].numel() > 1:
        return "DoRA with lengths of rows, which it compares with the original weight (train with wd_on_output=False)"
    if "rescale" in tensors and tensors["oft_blocks"].ndim == 3:
        return "Diag-OFT with rescale, which it does not look at (train without rescaled, or BOFT)"
    if "on_input" in tensors:
        return "IA3, which it does not read (merge the file into the model)"
    return None
