"""A complete HunyuanVideo set with random weights: denoiser, causal video autoencoder, LLaMA, CLIP-L, tokenizers.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.components.hunyuan_vae_models import VideoAutoEncoderParams
from library.hunyuan_video_models import HYVideoDiffusionTransformer, HYVideoParams
from library.tiny_models.llama_clip_tiny import (
    CLIP_WIDTH,
    LLAMA_WIDTH,
    VAE_PARAMS,
    TinyLlamaClip,
    paths_in,
    write_encoders,
)
from library.tiny_models.weights import random_state, save_part


@dataclass(frozen=True)
class TinyHunyuanVideo(TinyLlamaClip):
    """Paths of the set."""

    params: HYVideoParams
    vae_params: VideoAutoEncoderParams


def build_tiny_hunyuan_video(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    depth: int = 1,
    depth_single: int = 2,
    guidance: bool = True,
    shown: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TinyHunyuanVideo:
    """Write the set into `folder` (made when missing) and return its paths. `hidden` is a multiple of 16 (2 heads);
    `guidance`: a distilled model, `shown`: one from image to video."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    head_dim = hidden // 2
    params = HYVideoParams(
        in_channels=32 if shown else 16, hidden_size=hidden, num_heads=2, depth=depth, depth_single=depth_single,
        refiner_depth=1, mlp_ratio=2.0, text_dim=LLAMA_WIDTH, vec_dim=CLIP_WIDTH,
        rope_dim_list=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8), guidance_embed=guidance,
    )  # fmt: skip
    tiny = TinyHunyuanVideo(*paths_in(folder, "hunyuan_video"), params, VAE_PARAMS)
    save_part(random_state(HYVideoDiffusionTransformer(params), generator), tiny.denoiser, asdict(params), dtype)
    write_encoders(tiny, generator, dtype)
    return tiny
