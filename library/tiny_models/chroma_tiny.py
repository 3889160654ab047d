"""A complete Chroma checkpoint set with random weights: denoiser, autoencoder and T5 with its tokenizer, made as the
set of FLUX.1 is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from library.chroma_models import Chroma, ChromaParams
from library.tiny_models.flux_tiny import T5_WIDTH, write_autoencoder, write_t5
from library.tiny_models.weights import random_state, save_part


@dataclass(frozen=True)
class TinyChroma:
    """Paths of the set. `t5xxl` carries its tokenizer as `spiece_model`; `t5xxl_tokenizer` is the same as a folder."""

    folder: Path
    chroma: Path
    ae: Path
    t5xxl: Path
    t5xxl_tokenizer: Path
    params: ChromaParams

    def arguments(self) -> list[str]:
        """Command-line options that name the set."""
        return [f"--pretrained_model_name_or_path={self.chroma}", f"--ae={self.ae}", f"--t5xxl={self.t5xxl}"]


def build_tiny_chroma(
    folder: str | Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    depth: int = 1,
    depth_single_blocks: int = 2,
    dtype: torch.dtype = torch.float32,
) -> TinyChroma:
    """Write the set into `folder` (made when missing) and return its paths. `hidden` is a multiple of 32 (2 heads)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    params = ChromaParams(
        in_channels=64, context_in_dim=T5_WIDTH, hidden_size=hidden, mlp_ratio=4.0, num_heads=2, depth=depth,
        depth_single_blocks=depth_single_blocks, axes_dim=(hidden // 2 - 12, 6, 6), approximator_in_dim=32,
        approximator_hidden_size=24, approximator_depth=2,
    )  # fmt: skip
    tiny = TinyChroma(
        folder=folder,
        chroma=folder / "chroma.safetensors",
        ae=folder / "ae.safetensors",
        t5xxl=folder / "t5xxl.safetensors",
        t5xxl_tokenizer=folder / "t5xxl_tokenizer",
        params=params,
    )
    save_part(random_state(Chroma(params), generator), tiny.chroma, asdict(params), dtype)
    write_autoencoder(tiny.ae, generator, dtype)
    write_t5(tiny.t5xxl, tiny.t5xxl_tokenizer, generator, dtype)
    return tiny
