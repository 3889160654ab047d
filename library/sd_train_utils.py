"""The forward of Stable Diffusion 1 and 2 that training and sampling share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from library.device_utils import to_device

if TYPE_CHECKING:
    from library.sd_models import UNet2DConditionModel


def predict_noise(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Tensor],
    **inputs: object,
) -> Tensor:
    """Prediction (noise or v) [B, 4, H, W] at timesteps [B] 0..999; `conditioning` has the keys of the family."""
    return unet(noisy_latents, timesteps, to_device(conditioning["hidden_state"], noisy_latents.device), **inputs)
