"""UniPC of order two (arXiv 2302.04867, B(h) = e^-h - 1): a multistep predictor and a corrector without a call of its
own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from library.training.inference_samplers.common import Alpha, Denoise, NextNoise, alpha_ve, log_snr, steps_of


@dataclass(frozen=True)
class _Step:
    """A step that was predicted: from `start` (with its data estimate) over the level `h`; `older` is the estimate
    before."""

    start: torch.Tensor  # [B, C, ...]
    clean: torch.Tensor
    older: torch.Tensor | None
    ratio: float
    alpha: float
    h: float
    older_position: float
    """place of `older` on the axis of log SNR, in units of h from the start (negative)"""

    def base(self) -> torch.Tensor:
        """The step of order one."""
        return self.ratio * self.start - self.alpha * math.expm1(-self.h) * self.clean

    def slope(self) -> torch.Tensor:
        """Change of the data estimate per h, from the estimate before."""
        return (self.older - self.clean) / self.older_position

    def predicted(self) -> torch.Tensor:
        if self.older is None:
            return self.base()
        return self.base() - self.alpha * math.expm1(-self.h) * self.slope() / 2

    def corrected(self, arrived: torch.Tensor) -> torch.Tensor:
        """The end again, now that the data estimate there is known too."""
        growth = math.expm1(-self.h)
        if self.older is None:
            return self.base() - self.alpha * growth * (arrived - self.clean) / 2
        phi_1 = growth / -self.h - 1
        phi_2 = phi_1 / -self.h - 1 / 2
        b_1, b_2 = phi_1 / growth, 2 * phi_2 / growth
        weight = (b_1 - b_2) / (1 - self.older_position)
        return self.base() - self.alpha * growth * (weight * self.slope() + (b_1 - weight) * (arrived - self.clean))


def unipc(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None, *,
    alpha: Alpha = alpha_ve
) -> torch.Tensor:
    """Order two, order one in the first and the last step. `noise` is not used."""
    step: _Step | None = None
    last = len(sigmas) - 2
    for index, sigma, following in steps_of(sigmas):
        clean = latents - sigma * denoise(latents, sigmas[index])
        older, older_h = (None, 0.0) if step is None else (step.clean, step.h)
        if step is not None:
            latents = step.corrected(clean)
        h = log_snr(following, alpha) - log_snr(sigma, alpha)
        step = _Step(
            start=latents, clean=clean, older=None if index == last else older, ratio=following / sigma,
            alpha=alpha(following), h=h, older_position=-older_h / h,
        )
        latents = step.predicted()
    return latents
