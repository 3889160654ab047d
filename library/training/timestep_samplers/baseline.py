"""The samplers that draw from a fixed law: flow sigmas in every known mode, and whole DDPM timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from library.core.keyed_random import StepDraws
from library.training import timesteps
from library.training.timestep_samplers.modes import DENSITY_MODES, SIGMOID_MODES

if TYPE_CHECKING:
    from library.training.timestep_samplers import TimestepOptions

PURPOSE = "timesteps"


def draws_normal(mode: str) -> bool:
    """Whether a mode starts from standard normal numbers (else from uniform ones)."""
    return mode in SIGMOID_MODES or mode == "logsnr"


def sigmas_from_draws(options: TimestepOptions, numbers: torch.Tensor, latent_hw: tuple[int, int]) -> torch.Tensor:
    """Sigmas [B] float64 from the random numbers [B] that the mode starts from (see `draws_normal`).

    `latent_hw` is the height and width of the latents; only the resolution-dependent modes look at it.
    """
    mode, numbers = options.timestep_sampling, numbers.double()
    if mode in DENSITY_MODES:
        u = timesteps.density(
            options.weighting_scheme, numbers,
            logit_mean=options.logit_mean, logit_std=options.logit_std, mode_scale=options.mode_scale,
        )
        if mode == "whole":
            limits = (options.min_timestep, options.max_timestep)
            return timesteps.whole_flow_timesteps(u, options.discrete_flow_shift, *limits) / timesteps.NUM_TIMESTEPS
        sigmas = timesteps.table_sigmas(u, options.discrete_flow_shift)
    elif mode == "logsnr":
        sigmas = timesteps.logsnr_sigmas(numbers, options.logit_mean, options.logit_std)
    elif mode == "ideogram4_shift":
        sigmas = timesteps.ideogram4_sigmas(numbers, latent_hw)
    else:
        sigmas = torch.sigmoid(options.sigmoid_scale * numbers) if mode in SIGMOID_MODES else numbers
        if mode == "shift":
            sigmas = timesteps.shift_sigmas(sigmas, options.discrete_flow_shift)
        elif mode in timesteps.MU_LINES:
            if mode == "nextdit_shift":
                sigmas = sigmas.clamp(min=timesteps.UNIFORM_MARGIN)
            sigmas = timesteps.shift_sigmas(sigmas, timesteps.shift_of_mode(mode, latent_hw))
    return timesteps.limit_range(sigmas, options.min_timestep, options.max_timestep)


class FlowTimestepSampler:
    """Sigmas of flow matching, 0 = data, 1 = noise."""

    def __init__(self, options: TimestepOptions) -> None:
        self.options = options

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> torch.Tensor:
        """Sigmas [B] float32 for latents [B, C, ..., H, W]; one number per sample, whatever the batch is cut into."""
        draw = draws.normal if draws_normal(self.options.timestep_sampling) else draws.uniform
        latent_hw = (int(latent_shape[-2]), int(latent_shape[-1]))
        return sigmas_from_draws(self.options, draw(PURPOSE), latent_hw).float()


class DdpmTimestepSampler:
    """Whole timesteps of DDPM, uniform in min..max-1."""

    def __init__(self, options: TimestepOptions) -> None:
        self.options = options

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> torch.Tensor:
        """Timesteps [B] float32 without a fraction."""
        u = draws.uniform(PURPOSE).double()
        return timesteps.ddpm_timesteps(u, self.options.min_timestep, self.options.max_timestep).float()
