"""Samplers of flow models: from noise at sigma 1 to data at sigma 0."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from library.training.inference_samplers import INFERENCE_SAMPLERS, check_flow_sampler
from library.training.inference_samplers.common import Denoise, NextNoise, alpha_flow
from library.training.timesteps import shift_sigmas

Observe = Callable[[int, int, torch.Tensor], None]
"""(number of the step from 1, number of steps, estimate of the clean latents [B, C, ...]) -> nothing"""
LARGEST_SIGMA = 0.9999666644442962
"""1 - 1e-4 shifted by 3: where log(alpha / sigma) is needed, sigma 1 would make it infinite"""


def flow_schedule(num_steps: int, shift: float = 1.0) -> torch.Tensor:
    """Sigmas [num_steps + 1] float32 from 1 to 0, evenly spaced and then shifted (exp(mu) for resolution-dependent
    ones)."""
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def euler(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None
) -> torch.Tensor:
    """x += (s_next - s) d at each step. `noise` is not used. DDIM (eta 0) is this step too: in
    VE on DDIM's times, and in flow, where (1 - s')(x - s v) + s'(x + (1 - s) v) = x + (s' - s) v."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        latents = latents + (following - sigma) * denoise(latents, sigma)
    return latents


def observed(denoise: Denoise, sigmas: torch.Tensor, observe: Observe) -> Denoise:
    """`denoise`, of which `observe` sees x - sigma v once in each step along `sigmas` [steps + 1]. Samplers that ask
    again in a step, between or at its end, are seen where it is first asked nearest to the step's beginning."""
    steps, seen = len(sigmas) - 1, 0

    def derivative(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        found = denoise(latents, sigma)
        step = int((sigmas[:-1] - float(sigma)).abs().argmin()) + 1
        if step > seen:
            seen = step
            observe(step, steps, latents - float(sigma) * found)
        return found

    return derivative


def flow_sampler(name: str) -> Callable[..., torch.Tensor]:
    """The sampler `(velocity, latents, sigmas, noise) -> latents` of this name for a flow model.

    ConfigError when the name is unknown, or is that of a sampler for SD models only.
    """
    kind = INFERENCE_SAMPLERS.entry(name).info.get("flow")
    check_flow_sampler(name, "the sampler")
    sampler = INFERENCE_SAMPLERS.resolve(name)
    return functools.partial(_below_one, sampler) if kind == "alpha" else sampler


def _below_one(
    sampler: Callable[..., torch.Tensor], denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor,
    noise: NextNoise | None = None,
) -> torch.Tensor:
    """A solver with the flow's alpha, on sigmas below 1."""
    return sampler(denoise, latents, sigmas.clamp_max(LARGEST_SIGMA), noise, alpha=alpha_flow)
