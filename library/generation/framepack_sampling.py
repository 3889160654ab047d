"""How FramePack makes one section: times, solver, steps in which the blocks are left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.generation.framepack_requests import MagCacheSettings
from library.training.inference_samplers.flow import flow_schedule
from library.training.inference_samplers.sigma_tables import table_sigmas
from library.training.timesteps import MU_LINES, line_mu

logger = logging.getLogger(__name__)

ORDER = 3
LARGEST_SHIFT = 7.0


def section_sigmas(steps: int, tokens: float, shift: float | None = None, table: str | None = None) -> Tensor:
    """Sigmas [steps + 1] float32 from 1 to 0 of a section with that many tokens; `shift` in the place of the one that
    follows from them, evenly spaced but where a `table` is named, some of which have fewer steps."""
    if shift is None:
        shift = min(math.exp(line_mu(tokens, MU_LINES["flux_shift"])), LARGEST_SHIFT)
    return flow_schedule(steps, shift) if table is None else table_sigmas(table, steps, shift)


def unipc_clean(clean: Callable[[Tensor, Tensor], Tensor], latents: Tensor, sigmas: Tensor) -> Tensor:
    """The last estimate of the data of UniPC (arXiv 2302.04867) of order three with B(h) = -h, along -log(sigma).

    `clean`: (latents, sigma []) -> estimate of the data. Of sigmas [n + 1] the last one is not reached: the result is
    the estimate at the one before. Fewer steps mean lower orders, and the first ones have them too.
    """
    order, known = min(ORDER, len(sigmas) - 2), []
    for index, sigma in enumerate(sigmas[:-1]):
        if index:
            places = [-math.log(float(s)) for s in sigmas[: index + 1]]
            start, step = latents, _Step(places, known[-min(order, index) :], float(sigma / sigmas[index - 1]))
            arrived = clean(step.predicted(start), sigma)
            latents = step.corrected(start, arrived)
        else:
            arrived = clean(latents, sigma)
        known = [*known, arrived][-max(order, 1) :]
    return known[-1]


class _Step:
    """A step to places[-1] from the one before. `known`: estimates of the data at the last places before it, in order;
    `ratio`: of the noise levels."""

    def __init__(self, places: Sequence[float], known: Sequence[Tensor], ratio: float) -> None:
        self.ratio, self.now = ratio, known[-1]
        self.h = places[-1] - places[-2]
        older = [(place - places[-2]) / self.h for place in places[-2 - (len(known) - 1) : -2]][::-1]
        self.slopes = [(clean - self.now) / place for clean, place in zip(known[-2::-1], older)]
        self.positions = [*older, 1.0]

    def base(self, start: Tensor) -> Tensor:
        """The step of order one."""
        return self.ratio * start - math.expm1(-self.h) * self.now

    def _weights(self, count: int) -> list[float]:
        """Of the slopes at the first `count` positions: sum_i weight_i position_i^(k-1) = moment_k for k = 1..count, so
        that estimates which are polynomials in the position are integrated exactly."""
        moments, phi = [], math.expm1(-self.h) / -self.h - 1
        for k in range(1, count + 1):
            moments.append(phi * math.factorial(k) / -self.h)
            phi = phi / -self.h - 1 / math.factorial(k + 1)
        powers = torch.tensor([[position**k for position in self.positions[:count]] for k in range(count)])
        return torch.linalg.solve(powers.double(), torch.tensor(moments, dtype=torch.float64)).tolist()

    def predicted(self, start: Tensor) -> Tensor:
        count = len(self.slopes)
        if not count:
            return self.base(start)
        # of one slope half is taken in any case, as the paper does for order two
        weights = [0.5] if count == 1 else self._weights(count)
        return self.base(start) + self.h * sum(w * slope for w, slope in zip(weights, self.slopes, strict=True))

    def corrected(self, start: Tensor, arrived: Tensor) -> Tensor:
        """The end again, now that the estimate there is known too."""
        slopes = [*self.slopes, arrived - self.now]
        weights = [0.5] if len(slopes) == 1 else self._weights(len(slopes))
        return self.base(start) + self.h * sum(w * slope for w, slope in zip(weights, slopes, strict=True))


# -- leaving the blocks out --------------------------------------------------------------------------------------------


def ratios_of(ratios: Sequence[float], steps: int) -> list[float]:
    """As many ratios as there are steps, each that of the nearest place."""
    if len(ratios) == steps or steps < 2:
        return list(ratios[:steps])
    return [ratios[round(step * (len(ratios) - 1) / (steps - 1))] for step in range(steps)]


@dataclass
class MagCache:
    """A `BlockCache` for the steps of one section (arXiv 2506.09045). Each call is one forward: with guidance by two
    texts there is one of these for each."""

    settings: MagCacheSettings
    steps: int
    step: int = 0
    ratio: float = 1.0
    error: float = 0.0
    left_out: int = 0
    residual: Tensor | None = None
    measured: list[float] = field(default_factory=list)
    """ratios of the section, where they are measured"""

    def __call__(self, tokens: Tensor, blocks: Callable[[], Tensor]) -> Tensor:
        is_left_out = self._leaves_out()
        self.step += 1
        if is_left_out:
            return tokens + self.residual
        made = blocks()
        residual = made - tokens
        if self.settings.calibrate:
            before = residual if self.residual is None else self.residual
            ratio = residual.float().norm(dim=-1) / before.float().norm(dim=-1).clamp_min(1e-12)
            self.measured.append(round(ratio.mean().item(), 5))
        self.residual = residual
        return made

    def _leaves_out(self) -> bool:
        """Whether this step adds what the last whole one added."""
        first = max(int(self.settings.retention * self.steps), 1)
        if self.settings.calibrate or self.residual is None or not first <= self.step < self.steps - 1:
            return False
        self.ratio *= ratios_of(self.settings.ratios, self.steps)[self.step]
        self.error += abs(1 - self.ratio)
        self.left_out += 1
        if self.error <= self.settings.threshold and self.left_out <= self.settings.most:
            return True
        self.ratio, self.error, self.left_out = 1.0, 0.0, 0
        return False


# -- decoding ----------------------------------------------------------------------------------------------------------


def joined_clips(first: Tensor, second: Tensor, overlap: int) -> Tensor:
    """Clips [B, 3, F, H, W] of which the last `overlap` frames of the first are the first ones of the second, faded
    from one to the other."""
    weights = torch.linspace(1, 0, overlap, dtype=first.dtype, device=first.device).view(1, 1, -1, 1, 1)
    faded = weights * first[:, :, -overlap:] + (1 - weights) * second[:, :, :overlap]
    return torch.cat((first[:, :, :-overlap], faded, second[:, :, overlap:]), dim=2)


def decode_by_sections(
    decode: Callable[[Tensor], Tensor], latents: Tensor, window: int, stride: int, *, is_f1: bool
) -> Tensor:
    """Pixels [1, 3, F, H, W] of latents [1, C, F', h, w] of a first frame and sections of `window` frames, two sections
    at a time, which is what a decoder can hold; where they meet they are faded into each other.

    Sections are decoded in the order in which they are made, with those that the first frame belongs to.
    """
    count, overlap = (latents.shape[2] - 1) // window, stride * window - (stride - 1)
    if is_f1:
        made = decode(latents[:, :, : 1 + window])
        for section in range(1, count):
            end = 1 + (section + 1) * window
            made = joined_clips(made, decode(latents[:, :, end - 2 * window : end]), overlap)
        return made
    first = [0, *range(1 + window, 1 + count * window, window)]
    made = decode(latents[:, :, first[-1] :])
    for begin in reversed(first[:-1]):
        length = 2 * window + (1 if begin == 0 else 0)
        made = joined_clips(decode(latents[:, :, begin : begin + length]), made, overlap)
    return made
