"""From noise or pictures to clean latents: where sampling starts, parts that are kept, latents that grow, guidance."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from library.core.errors import ConfigError
from library.core.keyed_random import keyed_generator, keyed_random
from library.device_utils import to_like
from library.generation.gen_img.plan import GradualLatentSettings
from library.generation.sampling_utils import start_noise, step_draws
from library.training.inference_samplers import INFERENCE_SAMPLERS
from library.training.inference_samplers.common import Denoise, ancestral_levels, noise_of, steps_of
from library.training.inference_samplers.discrete import (
    STEPS_OFFSET,
    DiscreteSchedule,
    Predict,
    network_denoiser,
    network_latents,
    sampler_of,
    schedule_of,
)
from library.training.inference_samplers.flow import Observe, observed

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 4
PYRAMID_DISCOUNTS, OFFSETS = (0.5, 0.9), (0.01, 0.2)
NO_STEPS_OFFSET = ("dpmsingle",)
"""samplers whose timesteps count from 0 in any case"""


@dataclass(frozen=True)
class NoiseSettings:
    """Start noise beside plain one: part of the pictures that get it, and the range of its strength."""

    pyramid_prob: float | None = None
    pyramid_discounts: Sequence[float] = PYRAMID_DISCOUNTS
    offset_prob: float | None = None
    offsets: Sequence[float] = OFFSETS

    def start(self, seed: int, height: int, width: int) -> Tensor:
        """Latents [1, 4, h, w] of a seed; every draw is a function of the seed alone."""
        noise = start_noise(seed, LATENT_CHANNELS, height, width)
        draws = keyed_random(seed, "kinds of start noise")
        chosen = draws.random(), draws.uniform(*self.pyramid_discounts), draws.random(), draws.uniform(*self.offsets)
        if self.pyramid_prob is not None and chosen[0] < self.pyramid_prob:
            noise = pyramid_noise(noise, chosen[1], seed)
        if self.offset_prob is not None and chosen[2] < self.offset_prob:
            noise = noise + chosen[3] * torch.randn(
                (1, LATENT_CHANNELS, 1, 1), generator=keyed_generator(seed, "start noise offset")
            )
        return noise


def pyramid_noise(noise: Tensor, discount: float, seed: int) -> Tensor:
    """noise [1, C, H, W] plus noise of half, a quarter, ... of the sides with weight discount^i; standard deviation
    1."""
    total, height, width = noise, *noise.shape[2:]
    for level in range(1, 10):
        size = (max(1, height // 2**level), max(1, width // 2**level))
        coarse = torch.randn((1, noise.shape[1], *size), generator=keyed_generator(seed, "pyramid noise", level))
        total = total + discount**level * F.interpolate(
            coarse, size=(height, width), mode="bilinear", align_corners=False
        )
        if 1 in size:
            break
    return total / total.std()


@dataclass
class SamplingRun:
    """How a batch is sampled. `source` [B, 4, h, w] clean latents to start from (img2img), with `strength`; `mask`
    [B, 1, h, w] 1 = made anew, 0 = kept. `steps_offset` is the first timestep of evenly spaced times."""

    sampler: str
    steps: int
    seeds: Sequence[int]
    prediction_type: str
    zero_terminal_snr: bool
    size: tuple[int, int]
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    steps_offset: int = STEPS_OFFSET
    source: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0
    gradual: GradualLatentSettings | None = None
    sigma_table: str | None = None
    """noise levels of the steps, None: those of the sampler"""
    observe: Observe | None = None
    """sees the clean latents as far as they can be told in each step"""

    def _schedule(self) -> DiscreteSchedule:
        return schedule_of(
            self.sampler, self.steps, zero_terminal_snr=self.zero_terminal_snr, steps_offset=self.steps_offset,
            table=self.sigma_table,
        )

    def _first_step(self) -> tuple[int, int]:
        """As `first_step`; everything is made without a source."""
        if self.source is None:
            return 0, 0
        steps = len(self._schedule().timesteps)  # some tables have fewer than were asked for
        return first_step(steps, self.strength, 0 if self.sampler in NO_STEPS_OFFSET else self.steps_offset)

    def timesteps(self) -> list[float]:
        """Of the steps that are made, downwards."""
        return self._schedule().timesteps[self._first_step()[1] :].tolist()

    def sample(self, predict: Predict, device: torch.device) -> Tensor:
        """Clean latents [B, 4, h, w] of the network's scale."""
        schedule = self._schedule()
        start, first = self._start(schedule, device)
        if first >= len(schedule.timesteps):
            assert self.source is not None
            return self.source.to(device)
        schedule = schedule.from_step(first)
        denoise = network_denoiser(predict, schedule, self.prediction_type)
        if self.mask is not None:
            denoise = self._keeping(denoise, start)
        if self.observe is not None:
            denoise = observed(denoise, schedule.sigmas, self.observe)
        generators = [step_draws(seed) for seed in self.seeds]
        if self.gradual is None:
            latents = sampler_of(self.sampler, schedule)(denoise, start, schedule.sigmas, noise_of(generators, start))
        else:
            latents = grown_latents(denoise, start, schedule, self.gradual, generators, self.size)
        latents = network_latents(latents, float(schedule.sigmas[-1]))
        if self.mask is not None:
            latents = torch.where(self.mask.to(latents) == 0, self.source.to(latents), latents)
        return latents

    def _start(self, schedule: DiscreteSchedule, device: torch.device) -> tuple[Tensor, int]:
        """(VE latents to start from, index of the first step)."""
        height, width = self.size if self.gradual is None else _scaled(self.size, self.gradual.ratio)
        if self.source is None:
            noise = torch.cat([self.noise.start(seed, height, width) for seed in self.seeds])
            return noise.to(device) * schedule.start_scale, 0
        level, first = self._first_step()
        source = self.source.to(device).float()
        if (height, width) != tuple(source.shape[2:]):
            source = F.interpolate(source, size=(height, width), mode="bicubic", align_corners=False)
        if first >= len(schedule.timesteps):
            return source, first
        shape = (1, LATENT_CHANNELS, height, width)
        noise = torch.cat([torch.randn(shape, generator=keyed_generator(seed, "img2img noise")) for seed in self.seeds])
        sigma, told = float(schedule.sigmas[level]), float(schedule.sigmas[first])
        noised = source + sigma * noise.to(device)
        if INFERENCE_SAMPLERS.entry(self.sampler).info["spacing"] == "linspace":
            return noised, first
        return noised * math.sqrt(
            (1 + told**2) / (1 + sigma**2)
        ), first  # these keep the scale of the network between steps

    def _keeping(self, denoise: Denoise, start: Tensor) -> Denoise:
        """The denoiser with the kept part led to the source: its derivative is (x - source) / sigma, so that solvers
        pass through source + sigma * noise at each time they reach and end at the source itself."""
        made, source = to_like(self.mask, start), to_like(self.source, start)

        def kept(latents: Tensor, sigma: Tensor) -> Tensor:
            return made * denoise(latents, sigma) + (1 - made) * (latents - source) / float(sigma)

        return kept


def first_step(steps: int, strength: float, offset: int) -> tuple[int, int]:
    """(index of the time whose noise is added, index of the first step) of img2img.

    k = min(int(steps * strength) + offset, steps); noise of time number -k, steps from max(steps - k + offset, 0). With
    an offset of 1 there is one step's noise more than the network is told, which --force_scheduler_zero_steps_offset
    undoes.
    """
    count = min(int(steps * strength) + offset, steps)
    return max(steps - count, 0), max(steps - count + offset, 0)


# -- gradual latent ----------------------------------------------------------------------------------------------------


def _scaled(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Sides times `ratio`, in multiples of 8 (the U-Net halves three times), and never above the size itself."""
    return tuple(side if ratio >= 1 else min(side, max(8, int(side * ratio) // 8 * 8)) for side in size)


def growth(
    timesteps: Sequence[float], settings: GradualLatentSettings, size: tuple[int, int]
) -> list[tuple[int, int] | None]:
    """For each step the size that latents get in it, None = as they are. ConfigError when they would not reach
    `size`."""
    ratio, since, sizes = settings.ratio, settings.every_n_steps, []
    for timestep in timesteps:
        grown = None
        if timestep < settings.timesteps and ratio < 1 and since >= settings.every_n_steps:
            ratio, since = min(ratio + settings.ratio_step, 1.0), 0
            grown = _scaled(size, ratio)
        sizes.append(grown)
        since += 1
    if ratio < 1:
        raise ConfigError(
            f"gradual latent ends at {ratio:g} of the size after {len(timesteps)} steps; more --steps, a higher"
            " --gradual_latent_timesteps, a larger --gradual_latent_ratio_step or fewer --gradual_latent_every_n_steps "
            "are needed"
        )
    return sizes


def grown_latents(
    denoise: Denoise, latents: Tensor, schedule: DiscreteSchedule, settings: GradualLatentSettings,
    generators: Sequence[torch.Generator], size: tuple[int, int],
) -> Tensor:
    """euler_a whose latents grow: after the step without noise they are enlarged, then noise of the new size is
    added."""
    sizes = growth(schedule.timesteps.tolist(), settings, size)
    for index, sigma, following in steps_of(schedule.sigmas):
        down, up = ancestral_levels(sigma, following)
        latents = latents + (down - sigma) * denoise(latents, schedule.sigmas[index])
        grown = sizes[index]
        if grown is not None:
            latents = F.interpolate(latents, size=grown, mode="bicubic", align_corners=False)
            if settings.unsharp and settings.unsharp[3]:
                latents = sharpened(latents, *settings.unsharp[:3])
        if up > 0:
            noise = noise_of(generators, latents)()
            if grown is not None and settings.unsharp and not settings.unsharp[3]:
                noise = sharpened(noise, *settings.unsharp[:3])
            latents = latents + up * settings.s_noise * noise
    return latents


def sharpened(x: Tensor, kernel_size: float, sigma: float, strength: float) -> Tensor:
    """Unsharp mask: x + strength * (x - blurred x), Gaussian of `kernel_size` places, borders reflected."""
    places = torch.arange(int(kernel_size), dtype=torch.float32) - int(kernel_size) // 2
    line = torch.exp(-(places**2) / (2 * max(sigma, 1e-6) ** 2))
    kernel = (line[:, None] * line[None]) / line.sum() ** 2
    half = int(kernel_size) // 2
    weights = kernel.to(x)[None, None].repeat(x.shape[1], 1, 1, 1)
    blurred = F.conv2d(F.pad(x, (half,) * 4, mode="reflect"), weights, groups=x.shape[1])
    return x + strength * (x - blurred)


# -- guidance ----------------------------------------------------------------------------------------------------------


def guided(
    positive: Tensor, negative: Tensor | None, empty: Tensor | None, scale: float, negative_scale: float | None
) -> Tensor:
    """positive alone; u + s (c - u) with the negative prompt u; or, with the empty prompt e, e + s (c - e) - n (u -
    e)."""
    if negative is None:
        return positive
    if empty is None or negative_scale is None:
        return negative + scale * (positive - negative)
    return empty + scale * (positive - empty) - negative_scale * (negative - empty)


def branches_of(scale: float, negative_scale: float | None) -> tuple[str, ...]:
    """Which prompts run at each step, in the order of the rows."""
    if scale <= 1:
        return ("positive",)
    return ("negative", "positive") if negative_scale is None else ("negative", "positive", "empty")


def guided_predictor(
    predict: Callable[[Tensor, Tensor], Tensor], branches: Sequence[str], scale: float, negative_scale: float | None
) -> Predict:
    """`predict` takes all branches as one batch, in their order."""

    def guided_prediction(latents: Tensor, timestep: Tensor) -> Tensor:
        rows = predict(torch.cat([latents] * len(branches)), timestep).chunk(len(branches))
        parts = dict(zip(branches, rows, strict=True))
        return guided(parts["positive"], parts.get("negative"), parts.get("empty"), scale, negative_scale)

    return guided_prediction


def blended(predictors: Sequence[Predict], regions: Tensor) -> Predict:
    """The predictions of parts of a prompt, each in its region. `regions` [P, H, W] weights; where none is, all count
    alike."""

    def prediction(latents: Tensor, timestep: Tensor) -> Tensor:
        weights = F.interpolate(
            regions[:, None].to(latents), size=latents.shape[2:], mode="bilinear", align_corners=False
        )
        total = weights.sum(0, keepdim=True)
        weights = torch.where(
            total > 0, weights / total.clamp_min(1e-6), torch.ones_like(weights) / len(weights)
        )  # [P, 1, h, w]
        return sum(weight * predict(latents, timestep) for weight, predict in zip(weights, predictors, strict=True))

    return prediction
