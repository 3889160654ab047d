"""The forward of SDXL that training and sampling share, and its vector of pooled text and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.attention import timestep_embedding
from library.device_utils import to_device

if TYPE_CHECKING:
    from library.sdxl_models import SdxlUNet2DConditionModel

SIZE_WIDTH = 256
NUM_SIZES = 6


def get_size_embeddings(
    original_hw: Tensor, crop_top_left: Tensor, target_hw: Tensor, width: int = SIZE_WIDTH
) -> Tensor:
    """Sinusoids of the six numbers side by side, [B, 6 width] float32; each argument [B, 2] in pixels.

    Order: original height, width; crop top, left; target height, width. Source: SDXL, arXiv 2307.01952, section 2.2.
    """
    numbers = torch.cat((original_hw, crop_top_left, target_hw), dim=1)  # [B, 6]
    return timestep_embedding(numbers.flatten(), width, time_factor=1.0).view(len(numbers), -1)


def predict_noise(
    unet: SdxlUNet2DConditionModel, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor],
    sizes: tuple[Tensor, Tensor, Tensor], **inputs: object,
) -> Tensor:
    """Prediction (noise or v) [B, 4, H, W] at timesteps [B] 0..999.

    `conditioning` has the keys of the family; `sizes` are (original, crop, target), [B, 2] each. Small
    models have a narrower vector: what the pooled state leaves of it is shared by the six numbers.
    """
    device = noisy_latents.device
    names = ("hidden_state1", "hidden_state2", "pool2")
    first, second, pooled = (to_device(conditioning[name], device) for name in names)
    context = torch.cat((first, second), dim=2)  # [B, L, D1 + D2]
    width = (unet.params.adm_in_channels - pooled.shape[1]) // NUM_SIZES
    embedded = get_size_embeddings(*(to_device(size, device) for size in sizes), width=width)
    return unet(noisy_latents, timesteps, context, torch.cat((pooled, embedded.to(pooled.dtype)), dim=1), **inputs)
