"""Samplers of flow models: from noise at sigma 1 to data at sigma 0."""

from __future__ import annotations

from collections.abc import Callable

import torch

from library.training.timesteps import shift_sigmas

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [B, C, ...], sigma []) -> velocity = noise - data, of the latents' shape"""


def flow_schedule(num_steps: int, shift: float = 1.0) -> torch.Tensor:
    """Sigmas [num_steps + 1] float32 from 1 to 0, evenly spaced and then shifted (exp(mu) for resolution-dependent ones)."""
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def euler(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """x += (s_next - s) v at each step. `generator` is not used: no noise is added."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        latents = latents + (following - sigma) * denoise(latents, sigma)
    return latents
