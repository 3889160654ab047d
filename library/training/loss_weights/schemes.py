"""Schemes of --loss_weighting: factors of the loss [B] from signal-to-noise ratios [B] of any family.

They are written in the time t of flow matching, 0 = data and 1 = noise, at which the ratio is ((1 - t) / t)^2; of a
table of noise levels that is the time at which a flow model has the same ratio.
"""

from __future__ import annotations

import torch

from library.training import timesteps as levels

MARGIN = 1e-4
"""distance kept from both ends of the times"""


def flow_times(snr: torch.Tensor) -> torch.Tensor:
    """t = 1 / (1 + sqrt(snr)), of ratios of any shape; 0 where the ratio is infinite."""
    return (1 / (1 + snr.sqrt())).clamp(MARGIN, 1 - MARGIN)


def detail_inv_t(snr: torch.Tensor, value: tuple[float, float], is_v: bool) -> torch.Tensor:
    """1 / t, kept from the first to the second number of `value`."""
    return (1 / flow_times(snr)).clamp(*value)


def cosmap(snr: torch.Tensor, value: None, is_v: bool) -> torch.Tensor:
    """2 / (pi (1 - 2t + 2t^2)). Source: arXiv 2403.03206."""
    return levels.flow_weights("cosmap", flow_times(snr))


def sigma_sqrt(snr: torch.Tensor, value: None, is_v: bool) -> torch.Tensor:
    """t^-2."""
    return levels.flow_weights("sigma_sqrt", flow_times(snr))
