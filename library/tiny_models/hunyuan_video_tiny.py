"""A complete HunyuanVideo set with random weights: denoiser, causal video autoencoder, LLaMA, CLIP-L, tokenizers.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.components.hunyuan_vae_models import CausalVideoVAE, VideoAutoEncoderParams
from library.hunyuan_video_models import HYVideoDiffusionTransformer, HYVideoParams
from library.tiny_models.vocabularies import write_clip_tokenizer, write_llama_tokenizer
from library.tiny_models.weights import clip_state, language_model_state, random_state, save_part

LLAMA_WIDTH, LLAMA_HEADS, LLAMA_KV_HEADS, LLAMA_HIDDEN, LLAMA_LAYERS = 24, 2, 1, 40, 4
CLIP_WIDTH, CLIP_HEADS, CLIP_LAYERS = 16, 2, 2
TEMPLATE_WORDS = (
    "system", "user", "Describe", *(f" {word}" for word in (
        "the video by detailing following aspects main content and theme of color shape size texture quantity text"
        " spatial relationships objects actions events behaviors temporal physical movement changes background"
        " environment light style atmosphere camera angles movements transitions used in"
    ).split()),
)  # fmt: skip
"""of the captions' template, which is short with them"""


@dataclass(frozen=True)
class TinyHunyuanVideo:
    """Paths of the set."""

    folder: Path
    denoiser: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path
    llama_tokenizer: Path
    clip_tokenizer: Path
    params: HYVideoParams
    vae_params: VideoAutoEncoderParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--dit={self.denoiser}", f"--vae={self.vae}", f"--text_encoder1={self.text_encoder1}",
            f"--text_encoder2={self.text_encoder2}", f"--text_encoder1_tokenizer={self.llama_tokenizer}",
            f"--text_encoder2_tokenizer={self.clip_tokenizer}",
        ]  # fmt: skip


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
    vae_params = VideoAutoEncoderParams(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)
    tiny = TinyHunyuanVideo(
        folder, folder / "hunyuan_video.safetensors", folder / "hunyuan_video_vae.safetensors",
        folder / "llava_llama3.safetensors", folder / "clip_l.safetensors", folder / "llama_tokenizer",
        folder / "clip_tokenizer", params, vae_params,
    )  # fmt: skip
    save_part(random_state(HYVideoDiffusionTransformer(params), generator), tiny.denoiser, asdict(params), dtype)
    save_part(_vae_state(vae_params, generator), tiny.vae, asdict(vae_params), dtype)
    rows = write_llama_tokenizer(tiny.llama_tokenizer, TEMPLATE_WORDS)
    llama = language_model_state(
        generator, vocab=rows, width=LLAMA_WIDTH, key_width=LLAMA_KV_HEADS * LLAMA_WIDTH // LLAMA_HEADS,
        hidden=LLAMA_HIDDEN, layers=LLAMA_LAYERS, has_biases=False,
    )  # fmt: skip
    save_part(llama, tiny.text_encoder1, {"num_attention_heads": LLAMA_HEADS}, dtype)
    rows = write_clip_tokenizer(tiny.clip_tokenizer)
    clip = clip_state(generator, width=CLIP_WIDTH, layers=CLIP_LAYERS, vocab=rows)
    save_part(clip, tiny.text_encoder2, {"heads": CLIP_HEADS, "act": "quick_gelu", "eos": rows - 1}, dtype)
    return tiny


def _vae_state(params: VideoAutoEncoderParams, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights with what trained ones have: latents of about 1 when scaled, and draws that stay near their
    mean."""
    state = random_state(CausalVideoVAE(params), generator)
    state["quant_conv.weight"][: params.latent_channels] *= 3
    state["quant_conv.weight"][params.latent_channels :] *= 0.1
    state["quant_conv.bias"][params.latent_channels :] -= 4
    return state
