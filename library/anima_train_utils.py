"""Numerics that only Anima has: the forward that training and sampling share, with times in float32 up to the
sinusoid of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.core.courses import course
from library.device_utils import to_device
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from library.anima_models import Anima


@course
def predict_velocity(
    denoiser: Anima, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], **inputs: object
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, H, W] of noisy latents [B, C, H, W]; H and W must be even.

    `timesteps` [B], or [B, (H/2)(W/2)] for a time per token, are on the 0..1000 scale, float32; the model gets them
    divided by 1000. `conditioning` has the keys of the family; the LLM adapter runs inside the forward, so that its
    gradients take the same way. A model without an adapter attends to the states themselves. With `feature_layer` among
    `inputs` the result is (velocity, tokens [B, L, D] after that block).
    """
    given = {name: to_device(tensor, noisy_latents.device) for name, tensor in conditioning.items()}
    clip = noisy_latents[:, :, None]  # an image is one frame: [B, C, 1, H, W]
    text = {
        "target_ids": given["t5_input_ids"].long(),
        "target_mask": given["t5_attn_mask"],
        "source_mask": given["attn_mask"],
    }
    velocity = yield DenoiserCall(
        denoiser, (clip, timesteps.float() / NUM_TRAIN_TIMESTEPS, given["prompt_embeds"]), {**text, **inputs}
    )
    if isinstance(velocity, tuple):
        return velocity[0][:, :, 0], velocity[1]
    return velocity[:, :, 0]
