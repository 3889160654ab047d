"""Euler with noise at each step: euler_a on evenly spaced times, DDPM (DDIM with eta 1) on DDIM's times."""

from __future__ import annotations

import torch

from library.training.inference_samplers.common import Denoise, NextNoise, ancestral_levels, needed, steps_of


def euler_ancestral(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None
) -> torch.Tensor:
    """x += (down - s) d + up * noise. One noise tensor per step but the last, which ends at sigma 0; VE."""
    noise = needed(noise, "euler_a")
    for index, sigma, following in steps_of(sigmas):
        down, up = ancestral_levels(sigma, following)
        latents = latents + (down - sigma) * denoise(latents, sigmas[index])
        if up > 0:
            latents = latents + up * noise()
    return latents
