"""A complete SDXL checkpoint with random weights: U-Net, autoencoder and both text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.components.unet_models import UNetParams
from library.sdxl_models import SdxlUNet2DConditionModel
from library.tiny_models.unet_tiny import SIZES, TinyUNet, open_clip_state, write_checkpoint
from library.tiny_models.weights import clip_state, prefixed

CLIP_L_WIDTH, CLIP_G_WIDTH, SIZE_EMBEDDING = 16, 32, 8


def build_tiny_sdxl(
    folder: str | Path, *, seed: int = 0, num_res_blocks: int = 1, dtype: torch.dtype = torch.float32
) -> TinyUNet:
    """Write the model into `folder` (made when missing). Real models have two residual blocks a level."""
    folder = Path(folder)
    params = unet_params(num_res_blocks)
    tiny = TinyUNet(folder, folder / "sdxl.safetensors", folder / "tokenizer", "sdxl", params)
    return write_checkpoint(tiny, SdxlUNet2DConditionModel(params), _text, seed=seed, dtype=dtype)


def unet_params(num_res_blocks: int = 1) -> UNetParams:
    return UNetParams(
        attention_levels=(False, True, True), transformer_depth=(0, 1, 2), middle_depth=2, heads=(2, 2, 4),
        context_dim=CLIP_L_WIDTH + CLIP_G_WIDTH, use_linear_projection=True,
        adm_in_channels=CLIP_G_WIDTH + 6 * SIZE_EMBEDDING,
        num_res_blocks=num_res_blocks, **SIZES,
    )  # fmt: skip


def _text(generator: torch.Generator, vocab: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    clip_l = clip_state(generator, width=CLIP_L_WIDTH, layers=2, vocab=vocab)
    clip_g = open_clip_state(generator, width=CLIP_G_WIDTH, layers=3, vocab=vocab)
    state = prefixed("conditioner.embedders.0.transformer.", clip_l) | prefixed(
        "conditioner.embedders.1.model.", clip_g
    )
    text = {"heads": 2, "eos": vocab - 1}
    return state, {"clip_l": text, "clip_g": text}
