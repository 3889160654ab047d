"""Numerics that only Anima has: the forward that training and sampling share, and making one image.

Times are float32 up to the sinusoid of the model, and latents are float32 between the steps of a sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS, Sampler, guided_velocity, start_noise
from library.training.inference_samplers.common import noise_of

if TYPE_CHECKING:
    from library.anima_models import Anima

SPATIAL_STRIDE = 8


def predict_velocity(
    denoiser: Anima, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], **inputs: Any
) -> Tensor:
    """Velocity (noise - data) [B, C, H, W] of noisy latents [B, C, H, W]; H and W must be even.

    `timesteps` [B] are on the 0..1000 scale, float32; the model gets them divided by 1000. `conditioning` has
    the keys of the family; the LLM adapter runs inside the forward, so that its gradients take the same way.
    A model without an adapter attends to the states themselves.
    """
    given = {name: tensor.to(noisy_latents.device) for name, tensor in conditioning.items()}
    velocity = denoiser(
        noisy_latents[:, :, None],  # an image is one frame: [B, C, 1, H, W]
        timesteps.float() / NUM_TRAIN_TIMESTEPS,
        given["prompt_embeds"],
        target_ids=given["t5_input_ids"].long(),
        target_mask=given["t5_attn_mask"],
        source_mask=given["attn_mask"],
        **inputs,
    )
    return velocity[:, :, 0]


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How one image is made. `cfg_scale` 1 (or no negative prompt) means one forward per step."""

    height: int
    width: int
    seed: int
    cfg_scale: float = 7.5


@torch.no_grad()
def generate_latents(
    denoiser: Anima,
    settings: SampleSettings,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None,
    *,
    sampler: Sampler,
    sigmas: Tensor,
) -> Tensor:
    """Latents [1, C, height/8, width/8] of one image, float32: CPU noise of the seed, then the sampler along `sigmas`."""

    def predict(latents: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return predict_velocity(denoiser, latents, times, given)

    height, width = settings.height // SPATIAL_STRIDE, settings.width // SPATIAL_STRIDE
    noise = start_noise(settings.seed, denoiser.params.in_channels, height, width)
    velocity = guided_velocity(predict, conditioning, negative if settings.cfg_scale != 1.0 else None, settings.cfg_scale)
    generator = torch.Generator("cpu").manual_seed(settings.seed + 1)  # samplers with noise of their own draw from here
    latents = noise.to(denoiser.device)
    return sampler(velocity, latents, sigmas.to(denoiser.device), noise_of([generator], latents))
