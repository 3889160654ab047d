"""Files of latents, which image scripts write beside or instead of pictures, and decode."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from library.core.errors import CheckpointError
from library.families.latents import LatentSpec
from library.safetensors_utils import MemoryEfficientSafeOpen, save_file_atomic

LATENT_KEY = "latent"


def save_latents(latents: Tensor, path: Path, texts: Mapping[str, str]) -> Path:
    """Write latents [1, C, h, w] of a picture or [1, C, F, h, w] of a clip, as the denoiser has them, as `latent`
    [C, F, h, w] float32, F = 1 of a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = latents[0][:, None] if latents.ndim == 4 else latents[0]
    save_file_atomic({LATENT_KEY: made.float().cpu().contiguous()}, path, dict(texts) or None)
    return path


def read_latents(path: str | os.PathLike[str], spec: LatentSpec) -> tuple[Tensor, dict[str, str]]:
    """(latents, texts) of a file of `save_latents`: [1, C, h, w] of a picture, where the family makes clips [1, C, F,
    h, w] of several frames. CheckpointError when it holds none of this shape."""
    with MemoryEfficientSafeOpen(path) as file:
        if LATENT_KEY not in file.keys():
            raise CheckpointError(
                f"{path} holds no latents ('{LATENT_KEY}' is not there); needed: a file of --output_type latent"
            )
        latents, texts = file.get_tensor(LATENT_KEY), file.metadata()
    shape = list(latents.shape)
    if latents.ndim == 5 and shape[0] == 1:
        latents = latents[0]
    if latents.ndim == 4:  # one frame, or one picture
        latents = latents[:, 0] if latents.shape[1] == 1 else latents[0] if latents.shape[0] == 1 else latents
    if latents.ndim != 3 + (spec.clips and latents.ndim == 4) or latents.shape[0] != spec.channels:
        sides = f"height / {spec.spatial_stride}, width / {spec.spatial_stride}"
        needed = f"[{spec.channels}, frames, {sides}]" if spec.clips else f"[{spec.channels}, 1, {sides}] of one picture"
        raise CheckpointError(f"{path} has latents {shape}; needed: {needed}")
    return latents[None].float(), texts
