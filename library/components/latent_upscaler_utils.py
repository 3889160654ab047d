"""Loading the network that sharpens latents, and images through it: the object of `--highres_fix_upscaler`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.components.latent_upscaler_models import LatentUpscaler
from library.core.errors import CheckpointError
from library.safetensors_utils import is_pickled, load_pickled_tensors, load_safetensors

STRIDE = 8
"""px per latent"""


class ImageUpscaler(LatentUpscaler):
    """The network with the two steps around it: enlarging by a filter, and the autoencoder's encoder."""

    @torch.no_grad()
    def upscale(
        self, vae: Any, lowreso_images: Sequence[Image.Image], lowreso_latents: Tensor | None,
        dtype: torch.dtype | None,
        width: int, height: int, batch_size: int = 1, vae_batch_size: int = 1,
    ) -> Tensor:
        """Scaled latents [B, 4, height / 8, width / 8], in `dtype` (None: float32), of pictures enlarged to width x
        height.

        The scale is that of the autoencoder, whichever it is. `lowreso_latents` are not needed: pictures say as much.
        """  # fmt: skip
        pixels = [enlarged(image, (width, height)) for image in lowreso_images]
        encoded = [
            vae.encode(torch.stack(pixels[at : at + vae_batch_size])).float()
            for at in range(0, len(pixels), vae_batch_size)
        ]
        weight = self.conv1.weight
        latents = torch.cat(encoded).to(weight.device, weight.dtype)  # [B, 4, h, w]
        result = torch.cat([self(part) for part in latents.split(max(batch_size, 1))])
        return result.to(dtype or torch.float32)


def enlarged(image: Image.Image, size_wh: tuple[int, int]) -> Tensor:
    """[3, H, W] in -1..1 of a picture resized by Lanczos."""
    resized = image.convert("RGB").resize(size_wh, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32).copy()).permute(2, 0, 1) / 127.5 - 1


def load_upscaler(path: str | os.PathLike[str]) -> ImageUpscaler:
    """The network with the weights of a file. CheckpointError when they are not its weights."""
    if not os.path.isfile(path):
        raise CheckpointError(f"the upscaler's weights {path} do not exist; needed: a file of a latent upscaler")
    state = load_pickled_tensors(path) if is_pickled(path) else load_safetensors(str(path))
    model = ImageUpscaler()
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    if missing or unknown or wrong:
        first = (missing or unknown or wrong)[0]
        counts = (
            f"{len(missing)} tensors are missing, {len(unknown)} unknown, {len(wrong)} of another size, e.g. {first}"
        )
        raise CheckpointError(f"{path} is not a latent upscaler: {counts}")
    model.load_state_dict(state, strict=False)
    return model.eval()
