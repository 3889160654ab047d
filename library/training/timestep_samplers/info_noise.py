"""InfoNoise: the density of noise levels that follows the losses.

Noise levels are counted in ln s, s = sigma / (1 - sigma) (of DDPM: noise over signal). The range is cut into parts of
equal length; of each the newest errors of the clean latents are kept. Their mean over s^2 is how much information about
the data a step of ln s brings there (I-MMSE); a gate takes the levels with hardly any noise out. What is drawn is
proportional to that.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.core.keyed_random import StepDraws
from library.training import timesteps as levels

if TYPE_CHECKING:
    from library.training.objective import Objective
    from library.training.timestep_samplers import TimestepOptions, TimestepSampler
    from library.training.timestep_samplers.info_noise_options import InfoNoiseOptions

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.001, 0.999  # sigmas
GATE_POWER = 3
ONSET = 0.002
"""share of the largest information from which on a part counts, where the gate finds its pivot itself"""
SMALLEST = 1e-30
IN_REACH = 1e-4
"""probability under the law of the warm-up from which on a part is drawn at all"""
WAITED_FOR = 0.9
"""share of the law's draws whose parts, the likeliest first, have enough losses before the first renewal; rarer parts
borrow from those beside them"""
GRID = 200_000
VERSION = 2
PURPOSE = "timesteps: InfoNoise"


class InfoNoise:
    """The losses of the parts, and the density made of them. `total_steps` of the run, None = not known."""

    def __init__(self, options: InfoNoiseOptions, total_steps: int | None = None) -> None:
        self.options, self.warm_up = options, options.warm_up(total_steps)
        ends = [math.log(s / (1 - s)) for s in (LOWEST, HIGHEST)]
        count = options.infonoise_K
        self.edges = torch.linspace(*ends, count + 1, dtype=torch.float64)  # [K + 1]
        self.sigmas = ((self.edges[1:] + self.edges[:-1]) / 2).exp()  # [K] s at the middle of each part
        self.losses: list[deque[float]] = [deque(maxlen=options.infonoise_B) for _ in range(count)]
        self.means = torch.zeros(count, dtype=torch.float64)  # [K]
        self.cdf: Tensor | None = None  # [K + 1], from 0 to 1
        self.in_reach = torch.ones(count, dtype=torch.bool)  # [K]
        self.waited_for = torch.ones(count, dtype=torch.bool)  # [K]
        self.renewals, self.degraded, self.last_status = 0, 0, "not_refreshed_yet"
        self._has_new = torch.zeros(count, dtype=torch.bool)
        self._has_warned = False

    @property
    def is_ready(self) -> bool:
        return self.cdf is not None

    def know_law(self, law: TimestepSampler, shapes: Iterable[Sequence[int]], objective: Objective) -> None:
        """Which parts the law of the warm-up reaches, for latents of any of these shapes [C, ..., h, w]."""
        reached, waited_for = torch.zeros_like(self.in_reach), torch.zeros_like(self.in_reach)
        for shape in shapes:
            times = law.sample((GRID, *shape), EvenDraws(0, 0, tuple(range(GRID))))
            ratios = log_ratios(times_as_timesteps(times, objective), objective)
            shares = torch.bincount(self._parts(ratios), minlength=len(reached)) / GRID
            reached |= shares >= IN_REACH
            likeliest = shares.sort(descending=True, stable=True)
            waited_for[likeliest.indices[likeliest.values.cumsum(0) - likeliest.values < WAITED_FOR]] = True
        self.in_reach, self.waited_for = reached, waited_for & reached

    def _parts(self, log_ratios: Tensor) -> Tensor:
        return torch.searchsorted(self.edges[1:-1], log_ratios.double(), right=True)

    def record(self, log_ratios: Tensor, losses: Tensor) -> None:
        """ln s [N] and mean squared errors of the clean latents [N] of samples, in the order of their steps and places."""
        parts = self._parts(log_ratios)
        counts = torch.bincount(parts, minlength=len(self.losses)).tolist()
        for kept, new in zip(self.losses, losses[parts.argsort(stable=True)].split(counts)):
            kept.extend(new.tolist())
        self._has_new[parts] = True

    def is_due(self, step: int) -> bool:
        """After optimizer step number `step`, from 1."""
        return step >= self.warm_up and step % self.options.infonoise_M == 0

    def renew(self, step: int) -> str:
        """Make the density anew: "ok", or why it stays as it is."""
        if not self.is_ready and self._missing():
            self.last_status = "skipped_bins_not_full"
            self._warn(step)
            return self.last_status
        self._renew_means()
        self.last_status = self._renew_density()
        self.renewals += 1
        self.degraded += self.last_status != "ok"
        return self.last_status

    def _missing(self) -> int:
        """Parts that are waited for and have too few losses."""
        return int((self.waited_for & (self._counts() < self.options.infonoise_N_min)).sum())

    def _counts(self) -> Tensor:
        return torch.tensor([len(losses) for losses in self.losses])

    def _warn(self, step: int) -> None:
        if step >= 2 * self.warm_up and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "InfoNoise still waits at step %d: %d of %d parts have fewer than --infonoise_N_min %d losses; noise levels"
                " are drawn as in the warm-up. Lower it, or --infonoise_K, or train longer",
                step, self._missing(), int(self.waited_for.sum()), self.options.infonoise_N_min,
            )

    def _renew_means(self) -> None:
        """Parts with new losses go towards their mean; those without, whose losses are of an older model, change as the
        others did on the whole."""
        beta, old = self.options.infonoise_beta, self.means.clone()
        is_rare = self.in_reach & (self._counts() < self.options.infonoise_N_min)
        new = self._has_new | is_rare
        newest = torch.tensor(
            [self._mean_around(k) if one else 0.0 for k, one in enumerate(new.tolist())], dtype=torch.float64
        )
        self.means[new] = (1 - beta) * old[new] + beta * newest[new]
        both = new & (old > 0)
        if both.any():
            self.means[~new] *= (self.means[both] / old[both]).median()
        self._has_new = torch.zeros_like(new)

    def _mean_around(self, part: int) -> float:
        """Of the losses of a part and of as many parts on both sides as are needed for enough of them."""
        for width in range(len(self.losses)):
            near = self.losses[max(0, part - width) : part + width + 1]
            if sum(map(len, near)) >= self.options.infonoise_N_min:
                break
        found = [loss for losses in near for loss in losses]
        return sum(found) / len(found) if found else 0.0

    def _renew_density(self) -> str:
        information = self.means / (self.sigmas**2 + SMALLEST)
        largest = information.max()
        if largest < SMALLEST:
            return "mse_collapsed"
        pivot = self.options.infonoise_gate_pivot_c or float(self.sigmas[information / largest >= ONSET][-1])
        gate = self.sigmas**GATE_POWER / (self.sigmas**GATE_POWER + pivot**GATE_POWER)
        shares = (information * gate).clamp(min=0) * self.in_reach
        width = self.edges[1] - self.edges[0]
        total = shares.sum() * width
        if total < SMALLEST:
            return "normalizer_too_small"
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), (shares / total * width).cumsum(0)])
        cdf[-1] = 1.0
        self.cdf = cdf
        return "ok"

    def log_ratios_of(self, u: Tensor) -> Tensor:
        """ln s [N] of uniform numbers [N]: the inverse of the distribution, linear within each part."""
        u = u.double()
        after = torch.searchsorted(self.cdf, u, right=True).clamp(1, len(self.cdf) - 1)
        low, high = self.cdf[after - 1], self.cdf[after]
        part = (u - low) / (high - low).clamp(min=SMALLEST)
        return self.edges[after - 1] + part.clamp(0, 1) * (self.edges[after] - self.edges[after - 1])

    def state_dict(self) -> dict[str, Any]:
        kept = torch.full((len(self.losses), self.options.infonoise_B), math.nan, dtype=torch.float64)
        for row, losses in zip(kept, self.losses):
            row[: len(losses)] = torch.tensor(list(losses), dtype=torch.float64)
        return {
            "version": VERSION, "K": self.options.infonoise_K, "B": self.options.infonoise_B, "losses": kept,
            "means": self.means, "has_new": self._has_new, "cdf": self.cdf, "renewals": self.renewals,
            "degraded": self.degraded, "status": self.last_status, "has_warned": self._has_warned,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of a state with another number of parts or losses nothing is taken: that is told, and the warm-up begins."""
        own = (VERSION, self.options.infonoise_K, self.options.infonoise_B)
        if tuple(state.get(name) for name in ("version", "K", "B")) != own:
            logger.warning(
                "the state has losses of InfoNoise with --infonoise_K %s and --infonoise_B %s; this run has %d and %d, and"
                " gathers its own from the beginning", state.get("K"), state.get("B"), *own[1:],
            )
            return
        for losses, row in zip(self.losses, state["losses"]):
            losses.clear()
            losses.extend(row[~row.isnan()].tolist())
        self.means, self._has_new, self.cdf = state["means"].clone(), state["has_new"].clone(), state["cdf"]
        self.renewals, self.degraded = state["renewals"], state["degraded"]
        self.last_status, self._has_warned = state["status"], state["has_warned"]


class EvenDraws(StepDraws):
    """Numbers that fill 0..1 evenly, in the place of random ones; those of a second purpose are spread over them."""

    def uniform(self, purpose: str, shape: Sequence[int] = (), *keys: int | str, **how: Any) -> Tensor:
        number = torch.arange(len(self.positions), dtype=torch.float64)
        if "part" in purpose:
            return (number * ((math.sqrt(5) - 1) / 2)) % 1
        return (number + 0.5) / len(self.positions)

    def normal(self, purpose: str, shape: Sequence[int] = (), *keys: int | str) -> Tensor:
        return torch.special.ndtri(self.uniform(purpose))


def log_ratios(timesteps: Tensor, objective: Objective) -> Tensor:
    """ln s of timesteps on the 0..1000 scale."""
    return -0.5 * objective.snr(timesteps).log()


def times_as_timesteps(times: Tensor, objective: Objective) -> Tensor:
    """From the objective's own unit to the 0..1000 scale."""
    return times * levels.NUM_TIMESTEPS if objective.is_flow else times


def data_factor(log_ratios: Tensor, objective: Objective) -> Tensor:
    """By which a mean squared error of what the objective compares becomes one of the clean latents: those are
    x_t - sigma * velocity, or x_t / signal - s * noise."""
    if objective.is_flow:
        return torch.ones_like(log_ratios) if objective.target == "latents" else torch.sigmoid(log_ratios) ** 2
    s = log_ratios.exp()
    return s**2 if objective.prediction_type == "epsilon" else s**2 / (1 + s**2)


class InfoNoiseSampler:
    """Draws as `law` until there is a density, then by that, within --min_timestep and --max_timestep."""

    def __init__(
        self, law: TimestepSampler, info: InfoNoise, options: TimestepOptions, objective: Objective
    ) -> None:
        self.law, self.info, self.options, self.objective = law, info, options, objective

    def know_epochs(self, *facts: int) -> None:
        getattr(self.law, "know_epochs", lambda *_: None)(*facts)

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> Tensor:
        """Times [B] float32 in the unit of the objective; see `TimestepSampler`."""
        if not self.info.is_ready:
            return self.law.sample(latent_shape, draws)
        log_ratio = self.info.log_ratios_of(draws.uniform(PURPOSE))  # [B]
        low, high = levels.timestep_range(self.options.min_timestep, self.options.max_timestep)
        if self.objective.is_flow:
            return (torch.sigmoid(log_ratio)).clamp(low / levels.NUM_TIMESTEPS, high / levels.NUM_TIMESTEPS).float()
        table = log_ratios(torch.arange(levels.NUM_TIMESTEPS), self.objective).double()  # [1000], rising
        after = torch.searchsorted(table, log_ratio).clamp(1, levels.NUM_TIMESTEPS - 1)
        nearest = torch.where(log_ratio - table[after - 1] < table[after] - log_ratio, after - 1, after)
        return nearest.clamp(low, high - 1).float()


def info_noise_sampler(sampler: Any) -> InfoNoiseSampler | None:
    """The one within a sampler of a run, which may cut its draws to sides of a boundary."""
    while sampler is not None and not isinstance(sampler, InfoNoiseSampler):
        sampler = getattr(sampler, "law", None)
    return sampler
