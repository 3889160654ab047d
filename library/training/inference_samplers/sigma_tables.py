"""Noise levels of the steps of flow models, in place of a family's own: the table.

A function `(num_steps, shift) -> sigmas` [n + 1] float64, which run down from 1 to 0; `shift` is how far the family's
steps lie towards noise. All but `sgm_uniform` choose among the levels of 1000 evenly spaced times that are shifted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from library.training.inference_samplers import SIGMA_TABLES
from library.training.inference_samplers.discrete import karras_sigmas
from library.training.timesteps import NUM_TIMESTEPS, shift_sigmas

BETA_SHAPE = 0.6
BISECTIONS = 60
SERIES_TERMS = 60
"""of the incomplete beta function up to the middle, where each is less than half of the one before"""


def levels(shift: float) -> Tensor:
    """[1000] float64: the shifted times i / 1000, from the smallest to 1."""
    return shift_sigmas(torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS, shift)


def with_end(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, torch.zeros(1, dtype=torch.float64)))


def simple(num_steps: int, shift: float) -> Tensor:
    """Every so many-th level, from the largest down."""
    places = [NUM_TIMESTEPS - 1 - int(step * NUM_TIMESTEPS / num_steps) for step in range(num_steps)]
    return with_end(levels(shift)[places])


def sgm_uniform(num_steps: int, shift: float) -> Tensor:
    """Evenly spaced between the largest and the smallest level without that one, and shifted once more (as ComfyUI has
    it)."""
    smallest = float(levels(shift)[0])
    return with_end(shift_sigmas(torch.linspace(1.0, smallest, num_steps + 1, dtype=torch.float64)[:-1], shift))


def karras(num_steps: int, shift: float) -> Tensor:
    """Evenly spaced in sigma^(1/7) between the largest and the smallest level."""
    found = levels(shift)
    return with_end(karras_sigmas(num_steps, float(found[0]), float(found[-1])))


def beta(num_steps: int, shift: float) -> Tensor:
    """Levels at quantiles of the beta distribution (0.6, 0.6), denser at both ends; equal ones are taken once, so that
    many steps become a few less. Source: arXiv 2407.12173."""
    found, places = levels(shift), []
    for step in range(num_steps):
        place = round(beta_quantile(1 - step / num_steps) * (NUM_TIMESTEPS - 1))
        if place not in places:
            places.append(place)
    return with_end(found[places])


def beta_quantile(share: float) -> float:
    """x in 0..1 below which the share of the distribution with both exponents 0.6 lies, by bisection; the middle
    is exact."""
    if share > 0.5:
        return 1 - beta_quantile(1 - share)
    if share == 0.5:
        return 0.5
    low, high = 0.0, 0.5
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_share(middle) < share else (low, middle)
    return (low + high) / 2


def beta_share(x: float) -> float:
    """The share of that distribution below x: its regularised incomplete beta function, which is symmetric about 1/2.

    Source: the power series of x^a / (a B(a, a)) * 2F1(a, 1 - a; a + 1; x).
    """
    if x > 0.5:
        return 1 - beta_share(1 - x)
    a = BETA_SHAPE
    term, total = 1.0, 1.0 / a
    for n in range(1, SERIES_TERMS):
        term *= (n - a) / n * x  # (1 - a)_n / n! x^n
        total += term / (a + n)
    return x**a * total * math.gamma(2 * a) / math.gamma(a) ** 2


def table_sigmas(name: str, num_steps: int, shift: float) -> Tensor:
    """[n + 1] float32 of the table of this name. ConfigError for an unknown one."""
    return SIGMA_TABLES.resolve(name, "--sigma_table")(num_steps, shift).float()
