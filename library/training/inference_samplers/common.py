"""What the samplers share: the contract of a denoiser, noise in a fixed order, and levels of ancestral steps.

Two spaces. Variance exploding ("VE"): latents = data + sigma * noise; SD models run here, `discrete.py` scales for the
network. Flow: latents = (1 - sigma) * data + sigma * noise. In both, `denoise` gives the derivative of the latents with
respect to sigma, and data = latents - sigma * derivative; solvers that need more take `alpha`, the factor of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from library.device_utils import to_like

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents [B, C, ...], sigma [] on the CPU) -> derivative of the latents' shape: noise (VE) or noise - data (flow)"""
NextNoise = Callable[[], torch.Tensor]
"""the next standard normal tensor of the latents' shape; samplers draw in the order of their steps"""
Alpha = Callable[[float], float]
"""sigma -> factor of the data in the latents"""


def alpha_ve(sigma: float) -> float:
    """1: VE latents hold the data unscaled."""
    return 1.0


def alpha_flow(sigma: float) -> float:
    """1 - sigma."""
    return 1.0 - sigma


def log_snr(sigma: float, alpha: Alpha) -> float:
    """log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at sigma 0."""
    return math.log(alpha(sigma) / sigma) if sigma > 0 else math.inf


def noise_of(generators: Sequence[torch.Generator], latents: torch.Tensor) -> NextNoise:
    """Noise for latents [B, C, ...], sample i from generator i: a picture does not depend on the others of its batch.

    Drawn on the CPU in float32, so that device and dtype do not change a picture. Raises ValueError when the counts
    differ.
    """
    if len(generators) != len(latents):
        raise ValueError(f"there are {len(generators)} generators for {len(latents)} samples; one per sample is needed")

    def draw() -> torch.Tensor:
        rows = [torch.randn(latents.shape[1:], generator=generator) for generator in generators]
        return to_like(torch.stack(rows), latents)  # [B, C, ...]

    return draw


def needed(noise: NextNoise | None, sampler: str) -> NextNoise:
    """The noise of a sampler that cannot do without; ValueError when there is none."""
    if noise is None:
        raise ValueError(f"the sampler {sampler} adds noise; a noise function is needed")
    return noise


def steps_of(sigmas: torch.Tensor) -> Iterator[tuple[int, float, float]]:
    """(index, sigma, next sigma) of every step of sigmas [n + 1]."""
    levels = sigmas.tolist()
    for index, (sigma, following) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        yield index, sigma, following


def ancestral_levels(sigma: float, following: float) -> tuple[float, float]:
    """(down, up): go to sigma `down` without noise, then add `up` * noise to arrive at `following`; VE.

    up^2 = t^2 (s^2 - t^2) / s^2, down^2 = t^2 - up^2 = t^4 / s^2. It is the posterior of DDPM (arXiv 2006.11239, eq.
    7).
    """
    up = math.sqrt(max(following**2 * (sigma**2 - following**2) / sigma**2, 0.0))
    return following**2 / sigma, up
