"""Numerics that only Lumina-Image 2.0 has: the forward that training and sampling share, with the time turned round in
float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.core.courses import course
from library.device_utils import to_device
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from library.lumina_models import NextDiT


@course
def predict_velocity(
    denoiser: NextDiT, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], **inputs: object
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity towards data (data - noise) [B, C, H, W] of noisy latents [B, C, H, W]: the sign of this model, not of
    the others.

    `timesteps` [B], or [B, L] for a time per patch, are on the 0..1000 scale, float32, with 1000 = noise; the model's
    own time runs from 0 (noise) to 1 (data). `conditioning` has the keys of the family. With `feature_layer` among
    `inputs` the result is (velocity, tokens [B, L, dim] after that layer).
    """
    device = noisy_latents.device
    text = {
        "cap_feats": to_device(conditioning["hidden_state"], device),
        "cap_mask": to_device(conditioning["attention_mask"], device),
    }
    times = 1 - timesteps.float() / NUM_TRAIN_TIMESTEPS
    return (yield DenoiserCall(denoiser, (noisy_latents, times), {**text, **inputs}))
