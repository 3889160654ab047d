"""Adapter files of XLabs for FLUX: attention layers only, named after the attention's processor, without alpha.

| key | layer |
|---|---|
| double_blocks.N.processor.qkv_lora1, proj_lora1 | image attention: qkv, proj |
| double_blocks.N.processor.qkv_lora2, proj_lora2 | text attention: qkv, proj |
| single_blocks.N.processor.qkv_lora | the q, k and v rows of linear1 |
| single_blocks.N.processor.proj_lora | linear2 |

A parameter is `down.weight` or `up.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from library.core.errors import CheckpointError

_KEY = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
_KOHYA = re.compile(
    r"lora_unet_(double|single)_blocks_(\d+)_(img_attn_qkv|img_attn_proj|txt_attn_qkv|txt_attn_proj|linear1|linear2)"
)
_SIDES = {"img": "1", "txt": "2"}
_LETTERS = {number: side for side, number in _SIDES.items()}
_PARAMETERS = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}


def is_xlabs(key: str) -> bool:
    return _KEY.fullmatch(key) is not None


def from_xlabs(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same file under dotted names; q, k and v of a single block, which share their down matrix, under those of
    diffusers."""
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            result[key] = tensor
            continue
        kind, block, what, number, side = match.groups()
        ending = "lora_A.weight" if side == "down" else "lora_B.weight"
        if kind == "double":
            result[f"diffusion_model.double_blocks.{block}.{_LETTERS.get(number, 'img')}_attn.{what}.{ending}"] = tensor
        elif what == "proj":
            result[f"diffusion_model.single_blocks.{block}.linear2.{ending}"] = tensor
        else:
            parts = [tensor] * 3 if side == "down" else tensor.chunk(3)
            names = (f"transformer.single_transformer_blocks.{block}.attn.to_{letter}.{ending}" for letter in "qkv")
            result.update(zip(names, parts, strict=True))
    return result


def to_xlabs(modules: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Modules under kohya names, without alpha -> the keys of XLabs. CheckpointError for what that layout cannot
    hold."""
    result: dict[str, torch.Tensor] = {}
    foreign = [name for name in modules if _KOHYA.fullmatch(name) is None]
    if foreign:
        raise CheckpointError(
            f"the layout of XLabs has places for attention layers of FLUX only; {len(foreign)} modules have none: "
            f"{', '.join(foreign[:5])}"
        )
    for name, module in modules.items():
        if set(module) != set(_PARAMETERS):
            raise CheckpointError(f"{name} has {', '.join(sorted(module))}; the layout of XLabs holds plain LoRA only")
        kind, block, layer = _KOHYA.fullmatch(name).groups()
        place = f"{kind}_blocks.{block}.processor."
        down, up = module["lora_down.weight"], module["lora_up.weight"]
        if layer == "linear1":
            rows = 3 * down.shape[1]
            if bool(up[rows:].any()):
                raise CheckpointError(
                    f"{name} changes the feed-forward rows of linear1 too; the layout of XLabs has q, k and v only"
                )
            up = up[:rows]
        side, _, what = layer.partition("_attn_")
        lora = (
            f"{what}_lora{_SIDES[side]}" if kind == "double" else {"linear1": "qkv_lora", "linear2": "proj_lora"}[layer]
        )
        result[f"{place}{lora}.down.weight"] = down.contiguous()
        result[f"{place}{lora}.up.weight"] = up.contiguous()
    return result
