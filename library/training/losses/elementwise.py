"""The loss of each element of the prediction, in float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from library.training.losses import LossOptions
from library.training.objective import Objective, expand_like
from library.training.timesteps import NUM_TIMESTEPS


def l2_loss(
    options: LossOptions, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """d^2 with d = prediction - target."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none")


def l1_loss(
    options: LossOptions, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """|d|."""
    return (prediction.float() - target.float()).abs()


def huber_loss(
    options: LossOptions, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """Pseudo-Huber 2c (sqrt(d^2 + c^2) - c), about d^2 for small d."""
    threshold = expand_like(huber_threshold(options, timesteps, objective), prediction)
    return threshold * scaled_pseudo_huber(prediction, target, threshold)


def smooth_l1_loss(
    options: LossOptions, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """2 (sqrt(d^2 + c^2) - c), about 2|d| for large d."""
    threshold = expand_like(huber_threshold(options, timesteps, objective), prediction)
    return scaled_pseudo_huber(prediction, target, threshold)


def scaled_pseudo_huber(prediction: torch.Tensor, target: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """2 (sqrt(d^2 + c^2) - c), written as 2 d^2 / (sqrt(d^2 + c^2) + c): no digits cancel for small d."""
    squared = (prediction.float() - target.float()) ** 2
    return 2 * squared / ((squared + threshold**2).sqrt() + threshold)


def huber_threshold(options: LossOptions, timesteps: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Threshold c [B] at timesteps [B] on the 0..1000 scale.

    constant: huber_c; exponential: huber_c^(t / 1000); snr: (1 - huber_c) / (1 + sigma)^2 + huber_c with
    sigma = 1 / sqrt(snr), which is s / (1 - s) for flow matching. All times huber_scale.
    Source: arXiv 2403.16728.
    """
    timesteps = timesteps.float()
    if options.huber_schedule == "constant":
        threshold = torch.full_like(timesteps, options.huber_c)
    elif options.huber_schedule == "exponential":
        threshold = torch.exp(math.log(options.huber_c) * timesteps / NUM_TIMESTEPS)
    else:
        sigma = objective.snr(timesteps).rsqrt()  # infinite at pure noise, where the threshold is huber_c
        threshold = (1 - options.huber_c) / (1 + sigma) ** 2 + options.huber_c
    return options.huber_scale * threshold
