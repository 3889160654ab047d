"""ER-SDE (arXiv 2309.06169): the extended reverse-time equation with up to three stages."""

from __future__ import annotations

import math

import torch

from library.training.inference_samplers.common import Alpha, Denoise, NextNoise, alpha_ve, needed, steps_of

INTEGRATION_POINTS = 200
MAX_STAGE = 3


def noise_scale(level: float) -> float:
    """f(l) = l (exp(l^0.3) + 10), the paper's choice; l = sigma / alpha."""
    return level * (math.exp(level**0.3) + 10)


def er_sde(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None,
    *, alpha: Alpha = alpha_ve, max_stage: int = MAX_STAGE, s_noise: float = 1.0,
) -> torch.Tensor:
    """Step s -> t with l = sigma / alpha, r = f(l_t) / f(l_s): x = (a_t / a_s) r x + a_t (1 - r) D, plus terms of the
    change of D (stage 2) and its change (stage 3), plus noise a_t s_noise sqrt(l_t^2 - l_s^2 r^2).

    One noise tensor per step but the last, which gives D. Raises ValueError for a stage that is not 1, 2 or 3.
    """
    if max_stage not in range(1, MAX_STAGE + 1):
        raise ValueError(f"max_stage is {max_stage}; 1, 2 or 3 is needed")
    noise = needed(noise, "er_sde") if s_noise else None
    history: list[tuple[float, torch.Tensor]] = []  # (l, D), newest first
    older_change: torch.Tensor | None = None
    for index, sigma, following in steps_of(sigmas):
        clean = latents - sigma * denoise(latents, sigmas[index])
        if following <= 0:
            return clean
        level, target = sigma / alpha(sigma), following / alpha(following)
        ratio = noise_scale(target) / noise_scale(level)
        latents = alpha(following) / alpha(sigma) * ratio * latents + alpha(following) * (1 - ratio) * clean
        if max_stage >= 2 and history:
            flat, rising = _integrals(level, target)
            change = (clean - history[0][1]) / (level - history[0][0])
            latents = latents + alpha(following) * (target - level + flat * noise_scale(target)) * change
            if max_stage >= 3 and older_change is not None:
                bend = (change - older_change) / ((level - history[1][0]) / 2)
                weight = (target - level) ** 2 / 2 + rising * noise_scale(target)
                latents = latents + alpha(following) * weight * bend
            older_change = change
        if noise is not None:
            variance = max(target**2 - level**2 * ratio**2, 0.0)
            latents = latents + alpha(following) * s_noise * math.sqrt(variance) * noise()
        history = [(level, clean), *history][:2]
    return latents


def _integrals(level: float, target: float) -> tuple[float, float]:
    """Integrals of 1 / f(p) and (p - level) / f(p) for p from target to level, as sums over 200 points from target
    on."""
    width = (level - target) / INTEGRATION_POINTS
    points = [target + k * width for k in range(INTEGRATION_POINTS)]
    flat = sum(1 / noise_scale(point) for point in points) * width
    rising = sum((point - level) / noise_scale(point) for point in points) * width
    return flat, rising
