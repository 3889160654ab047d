"""Complete Stable Diffusion 1 and 2 checkpoints with random weights.

Real models have two residual blocks a level, on which the names of their layers in diffusers depend; one is enough
elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.components.unet_models import UNetParams
from library.sd_models import UNet2DConditionModel
from library.tiny_models.unet_tiny import SIZES, TinyUNet, open_clip_state, write_checkpoint
from library.tiny_models.weights import clip_state, prefixed


def build_tiny_sd1(
    folder: str | Path, *, seed: int = 0, num_res_blocks: int = 1, dtype: torch.dtype = torch.float32
) -> TinyUNet:
    """Write a model with CLIP-L into `folder` (made when missing)."""

    def text(generator: torch.Generator, vocab: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = clip_state(generator, width=32, layers=2, vocab=vocab)
        return prefixed("cond_stage_model.transformer.", state), {"clip_l": {"heads": 2, "eos": vocab - 1}}

    folder, params = Path(folder), unet_params(num_res_blocks, is_v2=False)
    tiny = TinyUNet(folder, folder / "sd1.safetensors", folder / "tokenizer", "sd1", params)
    return write_checkpoint(tiny, UNet2DConditionModel(params), text, seed=seed, dtype=dtype)


def build_tiny_sd2(
    folder: str | Path, *, seed: int = 0, num_res_blocks: int = 1, dtype: torch.dtype = torch.float32
) -> TinyUNet:
    """Write a model with OpenCLIP ViT-H, whose last layer is not used, into `folder` (made when missing)."""

    def text(generator: torch.Generator, vocab: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = open_clip_state(generator, width=32, layers=3, vocab=vocab)
        config = {"use_linear_projection": True, "clip_h": {"heads": 2, "eos": vocab - 1, "layers": 2}}
        return prefixed("cond_stage_model.model.", state), config

    folder, params = Path(folder), unet_params(num_res_blocks, is_v2=True)
    tiny = TinyUNet(folder, folder / "sd2.safetensors", folder / "tokenizer", "sd2", params)
    return write_checkpoint(tiny, UNet2DConditionModel(params), text, seed=seed, dtype=dtype)


def unet_params(num_res_blocks: int = 1, *, is_v2: bool) -> UNetParams:
    return UNetParams(
        attention_levels=(True, True, False), transformer_depth=(1, 1, 0), heads=2, context_dim=32,
        use_linear_projection=is_v2,
        upcast_attention=is_v2, num_res_blocks=num_res_blocks, **SIZES,
    )  # fmt: skip
