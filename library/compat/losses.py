"""Noise, losses and their weights as functions of a namespace and a noise scheduler.

A noise scheduler is any object with `alphas_cumprod` [1000] (of diffusers, say); one without stands for flow matching,
whose timestep t means the noise level t / 1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.compat.draws import GlobalDraws
from library.compat.namespace import options_of
from library.core.errors import ConfigError, did_you_mean
from library.generation.prompt_weighting import parse_weights
from library.training import timestep_samplers
from library.training.loss_weights.snr import debiased_factor, min_snr_factor, v_pred_like_factor, v_to_noise_ratio
from library.training.losses import LOSSES, LossOptions
from library.training.losses.elementwise import huber_threshold, scaled_pseudo_huber
from library.training.losses.reduction import loss_mask
from library.training.objective import (
    DdpmObjective,
    FlowMatchingObjective,
    ddpm_alphas_cumprod,
    expand_like,
    with_multires_noise,
    with_noise_offset,
)
from library.training.option_groups import NoiseOptions
from library.training.timestep_samplers import TimestepOptions

__all__ = [
    "add_v_prediction_like_loss", "apply_debiased_estimation", "apply_masked_loss", "apply_noise_offset",
    "apply_snr_weight",
    "conditional_loss", "fix_noise_scheduler_betas_for_zero_terminal_snr", "get_huber_threshold_if_needed",
    "get_noise_noisy_latents_and_timesteps", "get_snr_scale", "parse_prompt_attention",
    "prepare_scheduler_for_custom_training",
    "pyramid_noise_like", "scale_v_prediction_loss_like_noise_prediction",
]  # fmt: skip


class SchedulerLevels:
    """What losses ask an Objective for, of a noise scheduler: signal-to-noise ratios."""

    def __init__(self, noise_scheduler: Any) -> None:
        self.alphas_cumprod: Tensor | None = getattr(noise_scheduler, "alphas_cumprod", None)

    def snr(self, timesteps: Tensor) -> Tensor:
        """[B] at timesteps [B] on the 0..1000 scale."""
        if self.alphas_cumprod is None:
            return FlowMatchingObjective(None).snr(timesteps)
        signal = self.alphas_cumprod.to(timesteps.device).double()[timesteps.long()]
        return (signal / (1 - signal)).float()


# -- noise -----------------------------------------------------------------------------------------------------------


def get_noise_noisy_latents_and_timesteps(
    args: Any, noise_scheduler: Any, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(noise that is the target, noisy latents, timesteps [B] int64) of a model with a table of noise levels, drawn
    from torch's global generator. The table is that of Stable Diffusion, rescaled with --zero_terminal_snr."""
    options, draws = options_of(args, TimestepOptions), GlobalDraws.of(len(latents))
    objective = DdpmObjective(options, options_of(args, NoiseOptions))
    times = timestep_samplers.build(options, is_flow=False).sample(latents.shape, draws)
    sample = objective.corrupt(latents, torch.randn_like(latents), times.to(latents.device), draws)
    return sample.noise, sample.noisy_latents, sample.timesteps.long()


def pyramid_noise_like(noise: Tensor, device: torch.device, iterations: int = 6, discount: float = 0.4) -> Tensor:
    """`noise` with coarser noise added; every sample keeps the standard deviation 1."""
    options = NoiseOptions(multires_noise_iterations=iterations, multires_noise_discount=discount)
    return with_multires_noise(noise.to(device), options, GlobalDraws.of(len(noise)))


def apply_noise_offset(
    latents: Tensor, noise: Tensor, noise_offset: float | None, adaptive_noise_scale: float | None
) -> Tensor:
    options = NoiseOptions(noise_offset=noise_offset, adaptive_noise_scale=adaptive_noise_scale)
    return with_noise_offset(noise, latents, options, GlobalDraws.of(len(noise)))


def prepare_scheduler_for_custom_training(noise_scheduler: Any, device: torch.device) -> None:
    """Put the ratios of all timesteps beside the scheduler, as `all_snr`."""
    levels = SchedulerLevels(noise_scheduler)
    noise_scheduler.all_snr = levels.snr(torch.arange(len(levels.alphas_cumprod))).to(device)


def fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler: Any) -> None:
    """Give a scheduler the table of Stable Diffusion that ends without signal."""
    alphas_cumprod = ddpm_alphas_cumprod(zero_terminal_snr=True)
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    noise_scheduler.alphas_cumprod = alphas_cumprod.float()
    noise_scheduler.alphas = alphas.float()
    noise_scheduler.betas = (1 - alphas).float()


# -- losses ----------------------------------------------------------------------------------------------------------


def get_huber_threshold_if_needed(args: Any, timesteps: Tensor, noise_scheduler: Any) -> Tensor | None:
    """Thresholds [B] of --loss_type huber and smooth_l1 at timesteps [B]; None for other losses."""
    options = options_of(args, LossOptions)
    if options.loss_type not in ("huber", "smooth_l1"):
        return None
    return huber_threshold(options, timesteps, SchedulerLevels(noise_scheduler))


def conditional_loss(
    model_pred: Tensor, target: Tensor, loss_type: str, reduction: str, huber_c: Tensor | None = None
) -> Tensor:
    """The loss of each element, reduced by "none", "mean" or "sum"; `huber_c` [B] is what get_huber_threshold_if_needed
    gives."""
    if loss_type in ("huber", "smooth_l1"):
        if huber_c is None:
            raise ValueError(f"loss_type {loss_type} needs huber_c; get_huber_threshold_if_needed gives it")
        threshold = expand_like(huber_c, model_pred)
        loss = scaled_pseudo_huber(model_pred, target, threshold) * (threshold if loss_type == "huber" else 1)
    elif loss_type in LOSSES:
        loss = LOSSES.resolve(loss_type)(LossOptions(loss_type=loss_type), model_pred, target, None, None)
    else:
        raise ConfigError(
            f"loss_type is '{loss_type}'{did_you_mean(loss_type, LOSSES.names()) or '.'} Known: {', '.join(LOSSES.names())}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is '{reduction}'; known: none, mean, sum")
    return loss if reduction == "none" else getattr(loss, reduction)()


def apply_snr_weight(
    loss: Tensor, timesteps: Tensor, noise_scheduler: Any, gamma: float, v_prediction: bool = False
) -> Tensor:
    """Losses [B] weighted by min-SNR."""
    return loss * min_snr_factor(SchedulerLevels(noise_scheduler).snr(timesteps), gamma, v_prediction)


def get_snr_scale(timesteps: Tensor, noise_scheduler: Any) -> Tensor:
    """snr / (snr + 1) [B], snr capped at 1000."""
    return v_to_noise_ratio(SchedulerLevels(noise_scheduler).snr(timesteps))


def scale_v_prediction_loss_like_noise_prediction(loss: Tensor, timesteps: Tensor, noise_scheduler: Any) -> Tensor:
    return loss * get_snr_scale(timesteps, noise_scheduler)


def add_v_prediction_like_loss(
    loss: Tensor, timesteps: Tensor, noise_scheduler: Any, v_pred_like_loss: float
) -> Tensor:
    return loss * v_pred_like_factor(SchedulerLevels(noise_scheduler).snr(timesteps), v_pred_like_loss, False)


def apply_debiased_estimation(
    loss: Tensor, timesteps: Tensor, noise_scheduler: Any, v_prediction: bool = False
) -> Tensor:
    return loss * debiased_factor(SchedulerLevels(noise_scheduler).snr(timesteps), True, v_prediction)


def apply_masked_loss(loss: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Losses [B, C, ...] times the masks of the batch: conditioning images, else alpha masks, else none."""
    mask = loss_mask(batch.get("conditioning_images"), batch.get("alpha_masks"), loss.shape, masked_loss=True)
    return loss if mask is None else loss * mask.to(loss)


def parse_prompt_attention(text: str) -> list[list[Any]]:
    """Pieces [text, weight] of a prompt with (weights:1.2)."""
    return [[piece, weight] for piece, weight in parse_weights(text)]
