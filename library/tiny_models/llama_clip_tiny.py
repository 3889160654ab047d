"""The random small encoders of families whose captions LLaMA and CLIP-L read: causal video autoencoder, LLaMA, CLIP-L,
tokenizers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.components.hunyuan_vae_models import CausalVideoVAE, VideoAutoEncoderParams
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
VAE_PARAMS = VideoAutoEncoderParams(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)


@dataclass(frozen=True)
class TinyLlamaClip:
    """Paths of a set of such a family."""

    folder: Path
    denoiser: Path
    vae: Path
    text_encoder1: Path
    text_encoder2: Path
    llama_tokenizer: Path
    clip_tokenizer: Path

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--pretrained_model_name_or_path={self.denoiser}", f"--vae={self.vae}",
            f"--text_encoder1={self.text_encoder1}", f"--text_encoder2={self.text_encoder2}",
            f"--text_encoder1_tokenizer={self.llama_tokenizer}", f"--text_encoder2_tokenizer={self.clip_tokenizer}",
        ]  # fmt: skip


def paths_in(folder: Path, name: str) -> tuple[Path, ...]:
    """The fields of TinyLlamaClip; `name` of the family begins the names of its files."""
    return (
        folder, folder / f"{name}.safetensors", folder / f"{name}_vae.safetensors",
        folder / "llava_llama3.safetensors", folder / "clip_l.safetensors", folder / "llama_tokenizer",
        folder / "clip_tokenizer",
    )  # fmt: skip


def write_encoders(tiny: TinyLlamaClip, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Write all but the denoiser."""
    save_part(_vae_state(VAE_PARAMS, generator), tiny.vae, asdict(VAE_PARAMS), dtype)
    rows = write_llama_tokenizer(tiny.llama_tokenizer, TEMPLATE_WORDS)
    llama = language_model_state(
        generator, vocab=rows, width=LLAMA_WIDTH, key_width=LLAMA_KV_HEADS * LLAMA_WIDTH // LLAMA_HEADS,
        hidden=LLAMA_HIDDEN, layers=LLAMA_LAYERS, has_biases=False,
    )  # fmt: skip
    save_part(llama, tiny.text_encoder1, {"num_attention_heads": LLAMA_HEADS}, dtype)
    rows = write_clip_tokenizer(tiny.clip_tokenizer)
    clip = clip_state(generator, width=CLIP_WIDTH, layers=CLIP_LAYERS, vocab=rows)
    save_part(clip, tiny.text_encoder2, {"heads": CLIP_HEADS, "act": "quick_gelu", "eos": rows - 1}, dtype)


def _vae_state(params: VideoAutoEncoderParams, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights with what trained ones have: latents of about 1 when scaled, and draws that stay near their
    mean."""
    state = random_state(CausalVideoVAE(params), generator)
    state["quant_conv.weight"][: params.latent_channels] *= 3
    state["quant_conv.weight"][params.latent_channels :] *= 0.1
    state["quant_conv.bias"][params.latent_channels :] -= 4
    return state
