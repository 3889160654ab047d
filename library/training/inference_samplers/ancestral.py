"""Euler with noise at each step: euler_a on evenly spaced times, DDPM (DDIM with eta 1) on DDIM's times."""

from __future__ import annotations

import torch

from library.training.inference_samplers.common import (
    Alpha,
    Denoise,
    NextNoise,
    alpha_ve,
    ancestral_levels,
    needed,
    steps_of,
)


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


def lcm(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None, *,
    alpha: Alpha = alpha_ve
) -> torch.Tensor:
    """x = alpha_t D + t * noise: the estimate of the data, noised anew; for models distilled to a few steps. One noise
    tensor per step but the last, which gives D. Source: arXiv 2310.04378, algorithm 3."""
    noise = needed(noise, "lcm")
    for index, sigma, following in steps_of(sigmas):
        clean = latents - sigma * denoise(latents, sigmas[index])
        latents = alpha(following) * clean + following * noise() if following > 0 else clean
    return latents
