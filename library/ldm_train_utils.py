"""Making images with a noise schedule of 1000 steps (Stable Diffusion 1, 2 and SDXL), and what all families need for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from library.ldm_models import AutoEncoder

SPATIAL_STRIDE = 8
SPACINGS = {"ddim": "leading", "euler": "linspace", "k_euler": "linspace"}
"""samplers -> how their steps lie in the schedule. In the space of sigmas deterministic DDIM is an Euler step"""
_SMALLEST_ALPHA = 2.0**-24
"""keeps the last sigma of a zero-terminal schedule finite; half precision cannot tell it from 0"""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How one image is made; `cfg_scale` 1 means one forward per step."""

    height: int
    width: int
    num_steps: int
    seed: int
    cfg_scale: float = 7.5
    spacing: str = "leading"


def start_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal latents [1, C, H, W]: drawn on the CPU in float32, so that a seed means one picture everywhere."""
    return torch.randn((1, channels, height, width), generator=torch.Generator("cpu").manual_seed(seed))


def schedule_steps(num_steps: int, spacing: str, total: int = 1000) -> list[int]:
    """Timesteps of a run, noisiest first: `leading` multiples of total // num_steps, `linspace` from the last to the first."""
    if spacing == "leading":
        return [number * (total // num_steps) for number in reversed(range(num_steps))]
    return torch.linspace(total - 1, 0, num_steps).round().int().tolist()


def sigmas_of(alphas_cumprod: Tensor) -> Tensor:
    """Noise against signal, sqrt((1 - ac) / ac), of every timestep [1000]."""
    alphas = alphas_cumprod.double().clamp(min=_SMALLEST_ALPHA)
    return ((1 - alphas) / alphas).sqrt()


def noise_direction(
    predict: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor, prediction_type: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """The derivative of x = x0 + sigma * noise with respect to sigma, which is the noise.

    `predict(latents, timestep)` is the network on its own scale, x / sqrt(1 + sigma^2); `sigmas` [1000] of all timesteps. With
    v prediction noise = (v + sigma * input) / sqrt(1 + sigma^2) for the scaled input.
    """

    def direction(x: Tensor, sigma: Tensor) -> Tensor:
        step = (sigmas - float(sigma)).abs().argmin()
        scaled = x / (1 + float(sigma) ** 2) ** 0.5
        predicted = predict(scaled, step).float()
        if prediction_type == "v":
            return (predicted + float(sigma) * scaled) / (1 + float(sigma) ** 2) ** 0.5
        return predicted

    return direction


@torch.no_grad()
def generate_unet_latents(
    predict: Callable[[Tensor, Tensor], Tensor], settings: SampleSettings, alphas_cumprod: Tensor, prediction_type: str, *,
    sampler: Callable[..., Tensor], device: torch.device | str, channels: int = 4,
) -> Tensor:
    """Scaled latents [1, C, height / 8, width / 8] of one image: noise of the seed, the steps, the sampler."""
    table = sigmas_of(alphas_cumprod)
    chosen = [table[step] for step in schedule_steps(settings.num_steps, settings.spacing)]
    sigmas = torch.tensor([*chosen, 0.0], dtype=torch.float32, device=device)
    noise = start_noise(settings.seed, channels, settings.height // SPATIAL_STRIDE, settings.width // SPATIAL_STRIDE)
    latents = noise.to(device) * (1 + sigmas[0] ** 2).sqrt()
    generator = torch.Generator("cpu").manual_seed(settings.seed + 1)  # samplers with noise of their own draw from here
    return sampler(noise_direction(predict, table, prediction_type), latents, sigmas, generator)


def guided(positive: Tensor, negative: Tensor, cfg_scale: float) -> Tensor:
    """negative + cfg_scale * (positive - negative)."""
    return negative + cfg_scale * (positive - negative)


@torch.no_grad()
def decode_to_image(vae: AutoEncoder, latents: Tensor) -> Image.Image:
    """PIL image of latents [1, C, h, w]. A VAE that waits on the CPU computes where the latents are and goes back."""
    from PIL import Image

    home = vae.device
    vae.to(latents.device)
    try:
        with torch.autocast(latents.device.type, enabled=False):  # the VAE computes in the type that was chosen for it
            pixels = vae.decode(latents)[0].float().clamp(-1, 1)  # [3, H, W]
    finally:
        vae.to(home)
    values = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
