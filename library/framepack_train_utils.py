"""Numerics that only FramePack has: the forward that training and sampling share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.components.clip_tokens import needed_text, times_of_tokens
from library.device_utils import to_device, to_like
from library.framepack_models import CleanFrames
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from library.framepack_models import HunyuanVideoTransformer3DModelPacked

LATENT_INDICES, IMAGE_EMBEDDINGS = "latent_indices", "image_embeddings"
CLEAN = {
    "near": ("latents_clean", "clean_latent_indices"),
    "middle": ("latents_clean_2x", "clean_latent_2x_indices"),
    "far": ("latents_clean_4x", "clean_latent_4x_indices"),
}
"""frames that a section is made in view of -> the conditions that hold their latents and places in time, as caches of
known trainers call them"""


def predict_velocity(
    denoiser: HunyuanVideoTransformer3DModelPacked,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Tensor],
    conditions: Mapping[str, Tensor],
    *,
    guidance: float,
    **inputs: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, F, h, w] of noisy latents of a section, or of a single frame.

    `timesteps` [B], [B, F] for a time per frame or [B, L] per token, on the 0..1000 scale, float32. `conditioning` has
    the keys of the family; `conditions`: places in time of the latents, the frames that are seen (`CLEAN`) and states
    of the image encoder. `guidance`: the embedded scale, which models without it ignore. With `feature_layer` among
    `inputs` the result is (velocity, tokens [B, L, D] after that block).
    """
    device = noisy_latents.device
    states, mask = needed_text(conditioning["llama_vec"], conditioning["llama_attention_mask"].bool())
    scales = torch.full((len(noisy_latents),), guidance * NUM_TRAIN_TIMESTEPS, device=device, dtype=torch.float32)
    tokens = noisy_latents[0, 0].numel() // (denoiser.params.patch[1] * denoiser.params.patch[2])
    return denoiser(
        noisy_latents, times_of_tokens(timesteps.float(), noisy_latents.shape[2], tokens), to_device(states, device),
        None if mask is None else to_device(mask, device), to_device(conditioning["clip_l_pooler"], device),
        to_device(conditions[IMAGE_EMBEDDINGS], device), conditions[LATENT_INDICES],
        clean_frames(conditions, noisy_latents), guidance=scales, **inputs,
    )  # fmt: skip


def clean_frames(conditions: Mapping[str, Tensor], noisy_latents: Tensor) -> CleanFrames:
    """The frames that are seen. Frames that have places in time and no latents are zeros: caches leave those out."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part, (latents, indices) in CLEAN.items():
        if indices not in conditions or not conditions[indices].shape[1]:
            continue
        places = conditions[indices]
        frames = conditions.get(latents)
        if frames is None:
            batch, channels, _, height, width = noisy_latents.shape
            frames = noisy_latents.new_zeros(batch, channels, places.shape[1], height, width)
        parts[part] = (to_like(frames, noisy_latents), places)
    return CleanFrames(**parts)
