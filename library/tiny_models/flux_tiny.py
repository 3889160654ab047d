"""A complete FLUX.1 checkpoint set with random weights: denoiser, autoencoder, CLIP-L, T5 and their tokenizers.

A few hundred kilobytes, made in a fraction of a second, the same bytes for the same arguments. It goes through the
loaders of real checkpoints; what its shapes do not tell stands in the files' `model_config` metadata.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.flux_models import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from library.tiny_models.vocabularies import T5_ROWS, sentencepiece_model, write_clip_tokenizer, write_t5_tokenizer
from library.tiny_models.weights import clip_state, random_state, save_part, t5_state

T5_WIDTH = 24
AE_PARAMS = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4)


@dataclass(frozen=True)
class TinyFlux:
    """Paths of the set. `t5xxl` carries its tokenizer as `spiece_model`; `t5xxl_tokenizer` is the same as a folder."""

    folder: Path
    flux: Path
    ae: Path
    clip_l: Path
    t5xxl: Path
    clip_l_tokenizer: Path
    t5xxl_tokenizer: Path
    params: FluxParams
    ae_params: AutoEncoderParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [
            f"--pretrained_model_name_or_path={self.flux}", f"--ae={self.ae}", f"--clip_l={self.clip_l}",
            f"--t5xxl={self.t5xxl}", f"--clip_l_tokenizer={self.clip_l_tokenizer}",
        ]  # fmt: skip


def build_tiny_flux(
    folder: str | Path,
    *,
    guidance: bool = True,
    seed: int = 0,
    hidden: int = 32,
    depth: int = 1,
    depth_single_blocks: int = 2,
    dtype: torch.dtype = torch.float32,
) -> TinyFlux:
    """Write the set into `folder` (made when missing) and return its paths. `hidden` is a multiple of 32 (2 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    head_dim = hidden // 2
    params = FluxParams(
        in_channels=64, vec_in_dim=32, context_in_dim=T5_WIDTH, hidden_size=hidden, mlp_ratio=4.0, num_heads=2,
        depth=depth,
        depth_single_blocks=depth_single_blocks, axes_dim=(head_dim - 12, 6, 6), guidance_embed=guidance,
    )  # fmt: skip
    tiny = TinyFlux(
        folder=folder,
        flux=folder / "flux1.safetensors",
        ae=folder / "ae.safetensors",
        clip_l=folder / "clip_l.safetensors",
        t5xxl=folder / "t5xxl.safetensors",
        clip_l_tokenizer=folder / "clip_l_tokenizer",
        t5xxl_tokenizer=folder / "t5xxl_tokenizer",
        params=params,
        ae_params=AE_PARAMS,
    )
    save_part(random_state(Flux(params), generator), tiny.flux, asdict(params), dtype)
    write_autoencoder(tiny.ae, generator, dtype)
    vocab_size = write_clip_tokenizer(tiny.clip_l_tokenizer)
    clip_l = clip_state(generator, width=32, layers=2, vocab=vocab_size)
    save_part(clip_l, tiny.clip_l, {"heads": 2, "act": "quick_gelu", "eos": vocab_size - 1}, dtype)
    write_t5(tiny.t5xxl, tiny.t5xxl_tokenizer, generator, dtype)
    return tiny


def write_autoencoder(file: Path, generator: torch.Generator, dtype: torch.dtype) -> None:
    save_part(random_state(AutoEncoder(AE_PARAMS), generator), file, asdict(AE_PARAMS), dtype)


def write_t5(file: Path, tokenizer: Path, generator: torch.Generator, dtype: torch.dtype) -> None:
    """A text encoder of width T5_WIDTH with its tokenizer inside, and beside it as a folder."""
    write_t5_tokenizer(tokenizer)
    state = t5_state(generator, d_model=T5_WIDTH, d_kv=8, heads=2, d_ff=40, layers=2, vocab=T5_ROWS)
    state["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_part(state, file, {}, dtype)
