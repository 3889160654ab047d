"""Factors of the loss [B] from signal-to-noise ratios [B] and the value of their option.

The ratio is 0 at the last step of a zero-terminal schedule; where it is divided by, SMALLEST_SNR takes its place.
"""

from __future__ import annotations

import torch

SMALLEST_SNR = 1e-7
"""below every other ratio of the zero-terminal schedule, whose last but one is 1.97e-7"""
LARGEST_SNR = 1000.0


def min_snr_factor(snr: torch.Tensor, gamma: float, is_v: bool) -> torch.Tensor:
    """min(snr, gamma) / snr for noise prediction (1 at snr 0), / (snr + 1) for v. Source: arXiv 2303.09556."""
    if is_v:
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr.clamp(min=SMALLEST_SNR)).clamp(max=1)


def v_to_noise_ratio(snr: torch.Tensor) -> torch.Tensor:
    """snr / (snr + 1), snr capped: what a v loss is multiplied by to be like a noise loss."""
    capped = snr.clamp(max=LARGEST_SNR)
    return capped / (capped + 1)


def scale_v_factor(snr: torch.Tensor, enabled: bool, is_v: bool) -> torch.Tensor:
    """snr / (snr + 1)."""
    return v_to_noise_ratio(snr)


def v_pred_like_factor(snr: torch.Tensor, weight: float, is_v: bool) -> torch.Tensor:
    """1 + weight * (snr + 1) / snr: the noise loss plus `weight` times the like of a v loss."""
    return 1 + weight / v_to_noise_ratio(snr.clamp(min=SMALLEST_SNR))


def debiased_factor(snr: torch.Tensor, enabled: bool, is_v: bool) -> torch.Tensor:
    """1 / sqrt(snr) for noise prediction, 1 / (snr + 1) for v, snr capped. Source: arXiv 2310.08442."""
    capped = snr.clamp(max=LARGEST_SNR)
    return 1 / (capped + 1) if is_v else capped.clamp(min=SMALLEST_SNR).rsqrt()
