"""A complete SD3.5 medium type checkpoint set with random weights: denoiser with autoencoder, three text encoders and
their tokenizers.

It goes through the loaders of real checkpoints; what its shapes do not tell stands in the files' `model_config`
metadata.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.components.ldm_models import AutoEncoder, AutoEncoderParams
from library.safetensors_utils import load_safetensors
from library.sd3_models import MMDiT, SD3Params, get_2d_sincos_pos_embed
from library.tiny_models.vocabularies import T5_ROWS, sentencepiece_model, write_clip_tokenizer, write_t5_tokenizer
from library.tiny_models.weights import clip_state, prefixed, random_state, save_part, t5_state

CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 16, 24, 48
VAE = AutoEncoderParams(
    ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4, scaling_factor=1.5305, shift_factor=0.0609
)
VARIANTS: dict[str, dict[str, Any]] = {
    "medium": {}, "5-medium": {"qk_norm": "rms", "x_block_self_attn_layers": (0,)}, "5-large": {"qk_norm": "rms"},
}  # fmt: skip


@dataclass(frozen=True)
class TinySd3:
    """Paths of the set. `model` holds denoiser and autoencoder, `whole` the text encoders too (None: not written);
    `t5xxl` carries its tokenizer as `spiece_model`; `t5xxl_tokenizer` is the same as a folder."""

    folder: Path
    model: Path
    clip_l: Path
    clip_g: Path
    t5xxl: Path
    tokenizer: Path
    t5xxl_tokenizer: Path
    params: SD3Params
    whole: Path | None = None

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--pretrained_model_name_or_path={self.model}", f"--clip_l={self.clip_l}", f"--clip_g={self.clip_g}",
            f"--t5xxl={self.t5xxl}", f"--clip_l_tokenizer={self.tokenizer}",
        ]  # fmt: skip


def build_tiny_sd3(
    folder: str | Path,
    *,
    variant: str = "5-medium",
    seed: int = 0,
    depth: int = 3,
    with_whole: bool = False,
    dtype: torch.dtype = torch.float32,
) -> TinySd3:
    """Write the set into `folder` (made when missing) and return its paths. `variant`: medium, 5-medium or 5-large."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    params = SD3Params(
        depth=depth, hidden_size=32, num_heads=2, pos_embed_max_size=24, context_in=T5_WIDTH,
        adm_in_channels=CLIP_L_WIDTH + CLIP_G_WIDTH, **VARIANTS[variant],
    )  # fmt: skip
    tiny = TinySd3(
        folder=folder,
        model=folder / "sd3.safetensors",
        clip_l=folder / "clip_l.safetensors",
        clip_g=folder / "clip_g.safetensors",
        t5xxl=folder / "t5xxl.safetensors",
        tokenizer=folder / "clip_tokenizer",
        t5xxl_tokenizer=folder / "t5xxl_tokenizer",
        params=params,
        whole=folder / "sd3_whole.safetensors" if with_whole else None,
    )
    denoiser = random_state(MMDiT(params), generator)
    denoiser["pos_embed"] = get_2d_sincos_pos_embed(params.hidden_size, params.pos_embed_max_size)[None]
    state = prefixed("model.diffusion_model.", denoiser) | prefixed(
        "first_stage_model.", random_state(AutoEncoder(VAE), generator)
    )
    config = {**asdict(params), "vae": {"norm_groups": VAE.norm_groups}}
    save_part(state, tiny.model, config, dtype)
    vocab = write_clip_tokenizer(tiny.tokenizer)
    text = {"heads": 2, "eos": vocab - 1}
    for path, width in ((tiny.clip_l, CLIP_L_WIDTH), (tiny.clip_g, CLIP_G_WIDTH)):
        save_part(_clip(generator, width, vocab), path, text, dtype)
    write_t5_tokenizer(tiny.t5xxl_tokenizer)
    t5xxl = t5_state(generator, d_model=T5_WIDTH, d_kv=8, heads=2, d_ff=40, layers=2, vocab=T5_ROWS)
    t5xxl["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_part(t5xxl, tiny.t5xxl, {}, dtype)
    if tiny.whole is not None:
        for name in ("clip_l", "clip_g", "t5xxl"):
            state |= prefixed(f"text_encoders.{name}.transformer.", load_safetensors(getattr(tiny, name), "cpu"))
        save_part(state, tiny.whole, {**config, "clip_l": text, "clip_g": text, "t5xxl": {}}, dtype)
    return tiny


def _clip(generator: torch.Generator, width: int, vocab: int) -> dict[str, Tensor]:
    state = clip_state(generator, width=width, layers=2, vocab=vocab)
    return {**state, "text_projection.weight": torch.randn(width, width, generator=generator) / width**0.5}
