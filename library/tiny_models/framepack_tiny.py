"""A complete FramePack set with random weights: denoiser, causal video autoencoder, LLaMA, CLIP-L, tokenizers, SigLIP.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.components.hunyuan_vae_models import VideoAutoEncoderParams
from library.components.siglip_models import SiglipImageEncoder, SiglipParams
from library.framepack_models import FramePackParams, HunyuanVideoTransformer3DModelPacked
from library.tiny_models.llama_clip_tiny import (
    CLIP_WIDTH,
    LLAMA_WIDTH,
    VAE_PARAMS,
    TinyLlamaClip,
    paths_in,
    write_encoders,
)
from library.tiny_models.weights import random_state, save_part

SIGLIP = SiglipParams(
    hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, patch_size=14, image_size=28,
    positions=4,
)  # fmt: skip


@dataclass(frozen=True)
class TinyFramePack(TinyLlamaClip):
    """Paths of the set."""

    image_encoder: Path
    params: FramePackParams
    vae_params: VideoAutoEncoderParams

    def arguments(self) -> list[str]:
        return [*super().arguments(), f"--image_encoder={self.image_encoder}"]


def build_tiny_framepack(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    depth: int = 1,
    depth_single: int = 2,
    dtype: torch.dtype = torch.float32,
) -> TinyFramePack:
    """Write the set into `folder` (made when missing) and return its paths. `hidden` is a multiple of 32 (2 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    head_dim = hidden // 2
    params = FramePackParams(
        num_attention_heads=2, attention_head_dim=head_dim, num_layers=depth, num_single_layers=depth_single,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=LLAMA_WIDTH, pooled_projection_dim=CLIP_WIDTH,
        image_proj_dim=SIGLIP.hidden_size, rope_axes_dim=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
    )  # fmt: skip
    tiny = TinyFramePack(*paths_in(folder, "framepack"), folder / "siglip.safetensors", params, VAE_PARAMS)
    state = random_state(HunyuanVideoTransformer3DModelPacked(params), generator)
    save_part(state, tiny.denoiser, asdict(params), dtype)
    write_encoders(tiny, generator, dtype)
    siglip = {f"vision_model.{key}": value for key, value in random_state(SiglipImageEncoder(SIGLIP), generator).items()}
    siglip["vision_model.head.probe"] = torch.zeros(1, 1, SIGLIP.hidden_size)
    save_part(siglip, tiny.image_encoder, asdict(SIGLIP), dtype)
    return tiny
