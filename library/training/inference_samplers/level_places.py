"""Which of a model's noise levels the steps of a sigma table take, for flow models and SD models alike.

Places count from 0, the smallest level, to 999.
"""

from __future__ import annotations

import math

import torch

from library.training.timesteps import NUM_TIMESTEPS

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
BISECTIONS = 60
SERIES_TERMS = 60
"""of the incomplete beta function up to the middle, where each is less than half of the one before"""


def simple_places(num_steps: int) -> list[int]:
    """Every so many-th level, from the largest down."""
    return [NUM_TIMESTEPS - 1 - int(step * NUM_TIMESTEPS / num_steps) for step in range(num_steps)]


def beta_places(num_steps: int) -> list[int]:
    """At quantiles of the beta distribution (0.6, 0.6), denser at both ends; equal ones are taken once, so that many
    steps become a few less. Source: arXiv 2407.12173."""
    places = [round(beta_quantile(1 - step / num_steps) * (NUM_TIMESTEPS - 1)) for step in range(num_steps)]
    return list(dict.fromkeys(places))


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """[n] float64 from sigma_max to sigma_min, evenly spaced in sigma^(1/7). Source: arXiv 2206.00364, eq. 5."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    largest, smallest = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return (largest + ramp * (smallest - largest)) ** KARRAS_RHO


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
