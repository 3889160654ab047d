"""Laws of noise levels: each mode of --timestep_sampling that has one as a rising or falling function of one random
number, with its inverse, so that a law can be drawn from evenly spread numbers and be cut to a range exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.training import timesteps
from library.training.timestep_samplers.modes import FREE_NORMAL_MODES, SHIFT_MODES, SIGMOID_MODES, parts_of

if TYPE_CHECKING:
    from library.training.timestep_samplers import TimestepOptions

FURTHEST = 1e-300
"""smallest share of a normal law of which a quantile is taken"""
HALVINGS = 60
"""of 0..1, in which the inverse of a law without a formula for it lies"""


@dataclass(frozen=True)
class Law:
    """How sigmas come from numbers [B] float64, standard normal ones (`from_normal`) or uniform ones in 0..1.

    `sigmas` is monotonous; `numbers` is its inverse.
    """

    from_normal: bool
    sigmas: Callable[[Tensor], Tensor]
    numbers: Callable[[Tensor], Tensor]

    def quantile(self, u: Tensor) -> Tensor:
        """Sigmas of uniform numbers in 0..1."""
        return self.sigmas(timesteps.normal_from_uniform(u) if self.from_normal else u)

    def ends(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """The numbers, smaller one first, of which come sigmas from `low` to `high`."""
        first, last = self.numbers(torch.tensor([low, high], dtype=torch.float64)).sort().values
        return first, last

    def mass(self, low: float, high: float) -> Tensor:
        """Probability of a sigma from `low` to `high`."""
        first, last = self.ends(low, high)
        if not self.from_normal:
            return last - first
        return _share(-first) - _share(-last) if first > 0 else _share(last) - _share(first)

    def within(self, u: Tensor, low: float, high: float) -> Tensor:
        """Sigmas of uniform numbers, of the law cut to `low`..`high`: relative densities inside are kept. Where the law
        has nothing to speak of there, the end nearest to it."""
        first, last = self.ends(low, high)
        numbers = _normal_between(u, first, last) if self.from_normal else first + u * (last - first)
        return self.sigmas(numbers).clamp(low, high)


def _share(z: Tensor) -> Tensor:
    """Share of a standard normal law below z."""
    return torch.special.ndtr(z)


def _normal_between(u: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Quantiles of the standard normal law cut to first..last, exact in the far tails too."""
    if first > 0:  # the upper tail is computed as the lower one, where numbers do not run into 1
        return -_normal_between(1 - u, -last, -first)
    low, high = _share(first), _share(last)
    return torch.special.ndtri((low + u * (high - low)).clamp(min=FURTHEST)).clamp(first, last)


def law_of(mode: str, options: TimestepOptions, latent_hw: tuple[int, int]) -> Law:
    """The law of a mode that draws from one number (no mixture, no table) for latents of this height and width, with
    the shift of --timestep_schedule_shift behind it."""
    law, shift = _plain_law(mode, options, latent_hw), options.timestep_schedule_shift
    if shift == 1:
        return law
    return Law(
        law.from_normal, lambda numbers: timesteps.shift_sigmas(law.sigmas(numbers), shift),
        lambda sigmas: law.numbers(timesteps.shift_sigmas(sigmas, 1 / shift)),
    )  # fmt: skip


def _plain_law(mode: str, options: TimestepOptions, latent_hw: tuple[int, int]) -> Law:
    if mode == "mode":
        return _mode_law(options.mode_scale)
    if mode == "logsnr":
        mean, std = options.logit_mean, max(options.logit_std, 1e-12)
        return Law(
            True, lambda z: timesteps.logsnr_sigmas(z, options.logit_mean, options.logit_std),
            lambda sigmas: (-2 * torch.logit(sigmas) - mean) / std,
        )  # fmt: skip
    if mode == "ideogram4_shift":
        return Law(
            False, lambda u: timesteps.ideogram4_sigmas(u, latent_hw),
            lambda sigmas: _share((torch.logit(sigmas) - timesteps.ideogram4_mean(latent_hw)) / 1.5),
        )  # fmt: skip
    if mode in SHIFT_MODES:
        shift = 1 / options.discrete_flow_shift if mode == "logit_normal_low" else options.discrete_flow_shift
    else:
        shift = timesteps.shift_of_mode(mode, latent_hw) if mode in timesteps.MU_LINES else 1.0
    if mode in FREE_NORMAL_MODES:  # logit_normal and logit_normal_low
        mean, std = options.logit_mean, options.logit_std
        return Law(
            True, lambda z: timesteps.shift_sigmas(torch.sigmoid(mean + std * z), shift),
            lambda sigmas: (torch.logit(timesteps.shift_sigmas(sigmas, 1 / shift).clamp(0, 1)) - mean) / max(std, 1e-12),
        )  # fmt: skip
    if mode in SIGMOID_MODES:
        scale = options.sigmoid_scale
        return Law(
            True, lambda z: timesteps.shift_sigmas(torch.sigmoid(scale * z), shift),
            lambda sigmas: torch.logit(timesteps.shift_sigmas(sigmas, 1 / shift).clamp(0, 1)) / scale,
        )  # fmt: skip
    least = timesteps.UNIFORM_MARGIN if mode == "nextdit_shift" else 0.0
    return Law(
        False, lambda u: timesteps.shift_sigmas(u.clamp(min=least), shift),
        lambda sigmas: timesteps.shift_sigmas(sigmas, 1 / shift),
    )  # fmt: skip


def _mode_law(scale: float) -> Law:
    """1 - u - scale * (cos^2(pi u / 2) - 1 + u), falling for the scales that `TimestepOptions` takes with it."""

    def sigmas(u: Tensor) -> Tensor:
        return timesteps.density("mode", u, logit_mean=0.0, logit_std=1.0, mode_scale=scale)

    def numbers(wanted: Tensor) -> Tensor:
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_above = sigmas(middle) > wanted
            low, high = torch.where(is_above, middle, low), torch.where(is_above, high, middle)
        return (low + high) / 2

    return Law(False, sigmas, numbers)


def laws_of(options: TimestepOptions, latent_hw: tuple[int, int]) -> list[tuple[float, Law]]:
    """(share, law) of each part of the chosen mode; one of share 1 where it is no mixture."""
    parts = parts_of(options.timestep_sampling, options.timestep_mix_low_prob)
    return [(share, law_of(mode, replace(options, **fixed), latent_hw)) for share, mode, fixed in parts]


def choose(shares: list[float], chooser: Tensor) -> Tensor:
    """Which part of a mixture each sample takes, from uniform numbers [B]; shares need not add up to 1. Parts without
    mass are never chosen, unless all are."""
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    if not float(ends[-1]) > 0:
        return torch.zeros_like(chooser, dtype=torch.int64)
    return torch.searchsorted(ends / ends[-1], chooser.double(), right=True).clamp(max=len(shares) - 1)


def sigmas_from_uniform(
    options: TimestepOptions, u: Tensor, chooser: Tensor, latent_hw: tuple[int, int]
) -> Tensor:
    """Sigmas float64 of the chosen mode from uniform numbers of any shape, in its range: squeezed into it, or with
    --preserve_distribution_shape cut to it. `chooser`: further uniform numbers of that shape, which choose the part of
    a mixture."""
    u, laws = u.double(), laws_of(options, latent_hw)
    low, high = (limit / timesteps.NUM_TIMESTEPS for limit in timesteps.timestep_range(
        options.min_timestep, options.max_timestep
    ))  # fmt: skip
    cuts = options.preserve_distribution_shape and (low, high) != (0, 1)
    shares = [share * float(law.mass(low, high)) if cuts else share for share, law in laws]
    made = [law.within(u, low, high) if cuts else law.quantile(u) for _, law in laws]
    which = choose(shares, chooser)
    sigmas = made[0] if len(made) == 1 else torch.stack(made).gather(0, which[None])[0]
    return sigmas if cuts else timesteps.limit_range(sigmas, options.min_timestep, options.max_timestep)


def stratified(count: int, num_buckets: int, generator: torch.Generator) -> Tensor:
    """`count` uniform numbers float64 that fill `num_buckets` equal parts of 0..1 evenly: ceil(count / num_buckets) are
    drawn in each part, all are shuffled, and the first `count` stay."""
    each = math.ceil(count / num_buckets)
    parts = torch.arange(num_buckets, dtype=torch.float64).repeat_interleave(each)
    numbers = (parts + torch.rand(len(parts), generator=generator, dtype=torch.float64)) / num_buckets
    return numbers[torch.randperm(len(parts), generator=generator)[:count]]
