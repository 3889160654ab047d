"""Solvers with two network calls per step: Heun, and the midpoint rule of k-diffusion (DPM-Solver-2, arXiv
2206.00927)."""

from __future__ import annotations

import math

import torch

from library.training.inference_samplers.common import Denoise, NextNoise, ancestral_levels, needed, steps_of


def heun(denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None) -> torch.Tensor:
    """x += (t - s) (d(x, s) + d(x', t)) / 2 with the Euler trial x' at t; one Euler step to sigma 0. `noise` is not
    used."""
    for index, sigma, following in steps_of(sigmas):
        slope = denoise(latents, sigmas[index])
        trial = latents + (following - sigma) * slope
        if following > 0:
            trial = latents + (following - sigma) * (slope + denoise(trial, sigmas[index + 1])) / 2
        latents = trial
    return latents


def dpm_2(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None
) -> torch.Tensor:
    """x += (t - s) d(x', m) with the Euler trial x' at the geometric mean m of s and t; VE. `noise` is not used."""
    for index, sigma, following in steps_of(sigmas):
        latents = _midpoint_step(denoise, latents, sigmas[index], following)
    return latents


def dpm_2_ancestral(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None
) -> torch.Tensor:
    """dpm_2 to the ancestral level below t, then noise up to t. One noise tensor per step but the last; VE."""
    noise = needed(noise, "dpm_2_a")
    for index, sigma, following in steps_of(sigmas):
        down, up = ancestral_levels(sigma, following)
        latents = _midpoint_step(denoise, latents, sigmas[index], down)
        if up > 0:
            latents = latents + up * noise()
    return latents


def _midpoint_step(denoise: Denoise, latents: torch.Tensor, sigma: torch.Tensor, target: float) -> torch.Tensor:
    """From `sigma` [] to `target` over their geometric mean; an Euler step to sigma 0, where there is no such mean."""
    start = float(sigma)
    slope = denoise(latents, sigma)
    if target <= 0:
        return latents + (target - start) * slope
    middle = math.sqrt(start * target)
    trial = latents + (middle - start) * slope
    return latents + (target - start) * denoise(trial, sigma.new_tensor(middle))
