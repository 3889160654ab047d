"""The forward of Chroma that training and sampling share; schedules and packing are those of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from library.core.courses import course
from library.device_utils import to_device
from library.flux_train_utils import on_packed_latents

if TYPE_CHECKING:
    from library.chroma_models import Chroma


@course
def predict_velocity(
    denoiser: Chroma, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], **inputs: object
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, H, W] of noisy latents [B, C, H, W]; H and W must be even.

    `timesteps` [B] are on the 0..1000 scale, float32. `conditioning` has the keys of the family. With `feature_layer`
    among `inputs` the result is (velocity, tokens [B, L, hidden] after that block).
    """
    mask = to_device(conditioning["t5_attn_mask"], noisy_latents.device)
    text = conditioning["t5_out"]
    return (
        yield from on_packed_latents.course(
            denoiser, noisy_latents, timesteps, text, txt_attention_mask=mask, **inputs
        )
    )
