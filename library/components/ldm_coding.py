"""Making images with a noise schedule of 1000 steps (Stable Diffusion 1, 2 and SDXL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.generation.sampling_utils import start_noise
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.discrete import sample_latents

SPATIAL_STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How one image is made; `cfg_scale` 1 means one forward per step."""

    height: int
    width: int
    num_steps: int
    seed: int
    cfg_scale: float = 7.5
    sampler: str = "ddim"
    """a name of the sampler registry"""


@torch.no_grad()
def generate_unet_latents(
    predict: Callable[[Tensor, Tensor], Tensor], settings: SampleSettings, *, prediction_type: str, zero_terminal_snr: bool,
    device: torch.device | str, channels: int = 4,
) -> Tensor:
    """Scaled latents [1, C, height / 8, width / 8] of one image, with the schedule of the training.

    `predict(latents, timestep)` is the network on its own scale.
    """
    start = start_noise(settings.seed, channels, settings.height // SPATIAL_STRIDE, settings.width // SPATIAL_STRIDE).to(device)
    generator = torch.Generator("cpu").manual_seed(settings.seed + 1)  # samplers with noise of their own draw from here
    return sample_latents(
        settings.sampler, predict, start, settings.num_steps, prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr, noise=noise_of([generator], start),
    )


def sampling_passes(conditioning: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None) -> list[Mapping[str, Tensor]]:
    """What the network is run with at each step: both prompts as one batch, negative first, or one after the other where their
    texts take different numbers of tokens. Without a negative prompt there is one pass for the one prompt."""
    if negative is None:
        return [conditioning]
    if any(negative[name].shape != tensor.shape for name, tensor in conditioning.items()):
        return [negative, conditioning]
    return [{name: torch.cat((negative[name], tensor)) for name, tensor in conditioning.items()}]


def guided(positive: Tensor, negative: Tensor, cfg_scale: float) -> Tensor:
    """negative + cfg_scale * (positive - negative)."""
    return negative + cfg_scale * (positive - negative)
