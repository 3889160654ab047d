"""The samplers that draw from a fixed law: flow sigmas in every known mode, and whole DDPM timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from library.core.keyed_random import StepDraws, keyed_generator
from library.training import timesteps
from library.training.timestep_samplers.laws import law_of, sigmas_from_uniform, stratified
from library.training.timestep_samplers.modes import DENSITY_MODES, FREE_NORMAL_MODES, MIXED_MODES, SIGMOID_MODES

if TYPE_CHECKING:
    from library.training.timestep_samplers import TimestepOptions

PURPOSE = "timesteps"


def draws_normal(mode: str) -> bool:
    """Whether a mode starts from standard normal numbers (else from uniform ones)."""
    return mode in SIGMOID_MODES or mode in FREE_NORMAL_MODES


def sigmas_from_draws(options: TimestepOptions, numbers: torch.Tensor, latent_hw: tuple[int, int]) -> torch.Tensor:
    """Sigmas [B] float64 from the random numbers [B] that the mode starts from (see `draws_normal`), squeezed into the
    range.

    `latent_hw` is the height and width of the latents; only the resolution-dependent modes look at it.
    """
    mode, numbers = options.timestep_sampling, numbers.double()
    if mode in DENSITY_MODES:
        return _density_sigmas(options, numbers)
    sigmas = law_of(mode, options, latent_hw).sigmas(numbers)
    return timesteps.limit_range(sigmas, options.min_timestep, options.max_timestep)


def _density_sigmas(options: TimestepOptions, numbers: torch.Tensor) -> torch.Tensor:
    """Of the modes that follow the density of --weighting_scheme, from uniform numbers."""
    u = timesteps.density(
        options.weighting_scheme, numbers,
        logit_mean=options.logit_mean, logit_std=options.logit_std, mode_scale=options.mode_scale,
    )
    limits = (options.min_timestep, options.max_timestep)
    if options.timestep_sampling == "whole":
        return timesteps.whole_flow_timesteps(u, options.discrete_flow_shift, *limits) / timesteps.NUM_TIMESTEPS
    if options.sigma_table == "falling":
        return timesteps.falling_timesteps(u, *limits) / timesteps.NUM_TIMESTEPS
    return timesteps.at_parts(u, timesteps.table_sigmas(options.discrete_flow_shift, *limits))


class FlowTimestepSampler:
    """Sigmas of flow matching, 0 = data, 1 = noise. With --num_timestep_buckets the uniform numbers of an epoch fill
    equal parts of 0..1 evenly; what an epoch is, `know_epochs` says."""

    def __init__(self, options: TimestepOptions) -> None:
        self.options = options
        self.steps_per_epoch, self.samples_per_step = 1, options.num_timestep_buckets or 1
        self._pool: tuple[tuple[int, int], torch.Tensor] | None = None

    def know_epochs(self, steps_per_epoch: int, samples_per_step: int) -> None:
        """Optimizer steps of an epoch, and most samples of a step, of all processes together."""
        self.steps_per_epoch, self.samples_per_step = steps_per_epoch, samples_per_step

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> torch.Tensor:
        """Sigmas [B] float32 for latents [B, C, ..., H, W]; one number per sample, whatever the batch is cut into."""
        options, latent_hw = self.options, (int(latent_shape[-2]), int(latent_shape[-1]))
        mode = options.timestep_sampling
        if mode not in DENSITY_MODES and (
            mode in MIXED_MODES or options.num_timestep_buckets or options.preserve_distribution_shape
        ):
            u = self._from_pool(draws) if options.num_timestep_buckets else draws.uniform(PURPOSE)
            return sigmas_from_uniform(options, u, draws.uniform(f"{PURPOSE}: part"), latent_hw).float()
        draw = draws.normal if draws_normal(mode) else draws.uniform
        return sigmas_from_draws(options, draw(PURPOSE), latent_hw).float()

    def _from_pool(self, draws: StepDraws) -> torch.Tensor:
        """The numbers [B] that the pool of this epoch has for the places of the samples in it."""
        epoch, step = divmod(draws.step, self.steps_per_epoch)
        count, key = self.steps_per_epoch * self.samples_per_step, (draws.seed, epoch)
        if self._pool is None or self._pool[0] != key:
            generator = keyed_generator(draws.seed, f"{PURPOSE}: pool", epoch)
            self._pool = (key, stratified(count, self.options.num_timestep_buckets, generator))
        return self._pool[1][[(step * self.samples_per_step + place) % count for place in draws.positions]]


class DdpmTimestepSampler:
    """Whole timesteps of DDPM, uniform in min..max-1."""

    def __init__(self, options: TimestepOptions) -> None:
        self.options = options

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> torch.Tensor:
        """Timesteps [B] float32 without a fraction."""
        return timesteps.ddpm_timesteps(draws.uniform(PURPOSE), self.options.min_timestep, self.options.max_timestep)
