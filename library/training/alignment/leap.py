"""Leap: the model learns to reach the clean latents in a few large steps.

In a share of the optimizer steps a sample is noised to two levels k > j. The first step goes from k to j, the second
from there to 0; the loss is the squared error of where it ends. The second begins at the true latents of level j (a
"connector"), through which a part of its gradient goes on into the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.core.errors import Problems, UnsupportedCombination
from library.dataset.batch import PRESERVED
from library.training.alignment.options import LeapOptions
from library.training.hooks.base import Hook
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.objective import expand_like
from library.training.run import DiTOutput
from library.training.timestep_samplers import TimestepOptions, is_limited
from library.training.timesteps import NUM_TIMESTEPS, timestep_range

if TYPE_CHECKING:
    from library.core.keyed_random import StepDraws
    from library.core.options import Config
    from library.dataset.batch import Batch
    from library.training.objective import NoisyLatents, Objective
    from library.training.run import StepOutput
    from library.training.step import TrainStep
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, C, ...], levels [B]) -> noise - data [B, C, ...]"""
SMALLEST_DISTANCE = 0.1
NEARLY_CLEAN = 1e-3
"""level at which the velocity at the end of a path is asked for"""


def two_levels(
    first: Tensor, second: Tensor, gap: float, ends: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Levels k > j [B] from two draws, at least `gap` apart: closer ones are moved apart around their middle, within
    `ends`, above 0: what predicts clean latents says nothing of the velocity there."""
    high, low = torch.maximum(first, second), torch.minimum(first, second)
    least, most = ends
    lowest = max(least, min(1 / NUM_TIMESTEPS, (most - gap) / 2))
    middle = ((high + low) / 2).clamp(lowest + gap / 2, most - gap / 2)
    is_close = high - low < gap
    return torch.where(is_close, middle + gap / 2, high), torch.where(is_close, middle - gap / 2, low)


def stratified_levels(u: Tensor) -> tuple[Tensor, ...]:
    """Falling levels [B] from uniform numbers [B, K], one in each K-th of 0..1."""
    count = u.shape[1]
    return tuple((count - 1 - number + u[:, number]) / count for number in range(count))


def connected(true: Tensor, reached: Tensor, coe: float, *, keeps_true: bool) -> Tensor:
    """Where the second step begins: at the true place or at the reached one, with `coe` of its gradient going into what
    reached it."""
    flowing = coe * (reached - reached.detach())
    return (true if keeps_true else reached.detach()) + flowing


@dataclasses.dataclass(frozen=True)
class Leaps:
    """Two steps, or more, from noised latents to clean ones. `place(levels)` noises the latents."""

    velocity: Velocity
    place: Callable[[Tensor], Tensor]
    coe: float

    def two_steps(self, k: Tensor, j: Tensor, *, keeps_true: bool) -> tuple[Tensor, Tensor]:
        """(place reached at j, clean latents reached)."""
        start = self.place(k)
        reached = start - expand_like(k - j, start) * self.velocity(start, k)
        begin = connected(self.place(j), reached, self.coe, keeps_true=keeps_true)
        return reached, begin - expand_like(j, start) * self.velocity(begin, j)

    def telescope(self, levels: tuple[Tensor, ...]) -> Tensor:
        """The clean latents reached from the noisiest place, by the velocities at the true places of falling levels."""
        reached = self.place(levels[0])
        for level, following in zip(levels, (*levels[1:], torch.zeros_like(levels[0]))):
            reached = reached - expand_like(level - following, reached) * self.velocity(self.place(level), level)
        return reached

    def simpson(self, k: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """As `two_steps`, each step by the velocities at its ends and its middle, 1 : 4 : 1."""
        start, middle = self.place(k), (k + j) / 2
        between = self.velocity(self.place(middle), middle)
        total = self.velocity(start, k) + 4 * between + self.velocity(self.place(j), j)
        reached = start - expand_like((k - j) / 6, start) * total
        begin, end = connected(self.place(j), reached, self.coe, keeps_true=True), torch.full_like(j, NEARLY_CLEAN)
        between = self.velocity(self.place(j / 2), j / 2)
        total = self.velocity(begin, j) + 4 * between + self.velocity(self.place(end), end)
        return reached, begin - expand_like(j / 6, start) * total


def velocity_of(output: DiTOutput, sample: NoisyLatents, objective: Objective) -> Tensor:
    """noise - data [B, C, ...] in float32, whatever the family predicts or compares."""
    prediction = output.pred.float()
    if objective.target == "latents":
        return (sample.noisy_latents - prediction) / expand_like(sample.sigmas, prediction)
    return -prediction if objective.target == "reverse_velocity" else prediction


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference [B], at least SMALLEST_DISTANCE."""
    return (first - second).detach().abs().flatten(1).mean(dim=1).clamp(min=SMALLEST_DISTANCE)


class Leap(Hook):
    """Takes such steps in the place of the usual ones in a drawn share of the optimizer steps."""

    told_as = "--leap_enabled"
    without_untouched = (
        "needs a prediction at one noise level, and --leap_enabled compares what several reach; take one of them out"
    )

    def __init__(self, options: LeapOptions | None = None) -> None:
        """Without `options` they are those of the run."""
        super().__init__(options)
        self.ends = (0.0, 1.0)
        """lowest and highest noise level of the run"""

    def check(self, config: Config, family: ModelFamily, trainable: Trainable) -> None:
        self.opts = self.opts or config[LeapOptions]
        problems = Problems()
        if not family.objective().is_flow:
            problems.add(f"--leap_enabled needs a flow model; {family.name} is none")
        else:
            loss, weights = config[LossOptions].loss_type, config[LossWeightOptions]
            if loss.lower() != "l2":
                problems.add(
                    f"--loss_type is {loss}; --leap_enabled compares clean latents by their squared error: use l2"
                )
            if weights.loss_weighting != "none" or getattr(family.objective(), "weighs", False):
                problems.add(
                    "the loss is weighed by noise level (--loss_weighting, --weighting_scheme); --leap_enabled has two"
                    " levels in one loss: leave the weight out"
                )
        times = config[TimestepOptions]
        low, high = timestep_range(times.min_timestep, times.max_timestep)
        self.ends = (low / NUM_TIMESTEPS, high / NUM_TIMESTEPS)
        if family.splits_levels:
            problems.add(
                "--leap_enabled goes through noise levels of both experts in one loss, and only one of them learns in"
                " a step; train them one by one, as runs of their own"
            )
        if self.opts.leap_variant == "lagrange" and is_limited(times):
            problems.add(
                "--leap_variant lagrange asks the model at levels down to 0, and --min_timestep and --max_timestep"
                f" leave {low} to {high} of 1000; use another variant, or leave the range out"
            )
        if self.opts.leap_variant != "sparse" and high - low < self.opts.leap_min_gap * NUM_TIMESTEPS:
            problems.add(
                f"--leap_min_gap is {self.opts.leap_min_gap} and the timesteps go from {low} to {high}: two levels never"
                f" lie so far apart; needed: {(high - low) / NUM_TIMESTEPS:g} or less, or a wider range"
            )
        problems.raise_if_any()

    def process_batch(self, step: TrainStep, batch: Batch, times: Tensor | None) -> StepOutput:
        draws = step.draws_of(batch, times)
        if not batch.request.is_training or draws.batch_uniform("leap") >= self.opts.leap_ratio:
            return step.process_batch(batch, times)
        draws, batch = step.begin(batch), step.with_latents(batch)
        latents = step.latents_of(batch)
        noise = step.noise_of(latents, draws) if batch.noise is None else batch.noise.view_as(latents)
        if any(attributes.get(PRESERVED) for attributes in batch.custom_attributes):  # of a dataset class of one's own
            raise UnsupportedCombination(f"{PRESERVED} in the dataset configuration {self.without_untouched}")

        def noised(levels: Tensor) -> NoisyLatents:
            return step.objective.corrupt(latents, noise, levels, draws)

        def velocity(places: Tensor, levels: Tensor) -> Tensor:
            sample = dataclasses.replace(noised(levels), noisy_latents=places)
            step.trainable.on_sample(sample)
            return velocity_of(step.predict(sample, conditioning, batch), sample, step.objective)

        levels = self.levels(step, latents, draws)
        noisiest = noised(levels[0])
        step.trainable.on_sample(noisiest)  # text encoders go by it
        conditioning = step.conditioning_of(batch)
        leaps = Leaps(velocity, lambda levels: noised(levels).noisy_latents, self.opts.leap_nested_grad_coe)
        first, ended = self.taken(leaps, levels)
        per_sample, logs = step.loss_of(DiTOutput(ended, latents), noisiest, batch)
        if self.opts.leap_distance_weighting:
            off = distance(ended, latents) + (distance(*first) if first is not None else 0.0)
            per_sample = per_sample / off
        return step.result(per_sample, {**logs, "loss/leap": per_sample.detach().mean()}, batch)

    def levels(self, step: TrainStep, latents: Tensor, draws: StepDraws) -> tuple[Tensor, ...]:
        """Falling levels, [B] each, from which steps begin."""
        if self.opts.leap_variant == "sparse":
            levels = stratified_levels(draws.uniform("leap levels", (3,)).to(latents.device))
            low, high = self.ends
            levels = tuple(low + level * (high - low) for level in levels)
            return tuple(level.clamp(1 / NUM_TIMESTEPS, 1 - 1 / NUM_TIMESTEPS) for level in levels)
        first, second = step.times_of(latents, draws), step.times_of(latents, draws.apart("leap"))
        return two_levels(first, second, self.opts.leap_min_gap, self.ends)

    def taken(self, leaps: Leaps, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """((place reached first, where it should be) or None, clean latents reached)."""
        if self.opts.leap_variant == "sparse":
            return None, leaps.telescope(levels)
        k, j = levels
        if self.opts.leap_variant == "lagrange":
            reached, ended = leaps.simpson(k, j)
        else:
            reached, ended = leaps.two_steps(k, j, keeps_true=self.opts.leap_variant == "original")
        return (reached, leaps.place(j)), ended
