"""Solvers that reuse the derivatives of earlier steps: LMS, and PNDM (arXiv 2202.09778)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from library.training.inference_samplers.common import Denoise, NextNoise, steps_of

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""weights of the newest derivative, the one before it, ..., for steps of equal length"""
LMS_ORDER = 4
RK_STEPS = 3
"""steps of PNDM that are made with Runge-Kutta before four derivatives are known"""


def lms(denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None) -> torch.Tensor:
    """x += the integral from s to t of the polynomial through the last four derivatives. `noise` is not used."""
    levels, slopes = sigmas.tolist(), []
    for index, sigma, following in steps_of(sigmas):
        slopes = [denoise(latents, sigmas[index]), *slopes][:LMS_ORDER]
        nodes = [levels[index - k] for k in range(len(slopes))]
        for k, slope in enumerate(slopes):
            latents = latents + lagrange_integral(nodes, k, sigma, following) * slope
    return latents


def lagrange_integral(nodes: Sequence[float], k: int, start: float, end: float) -> float:
    """Integral from start to end of the Lagrange polynomial that is 1 at nodes[k] and 0 at the others (at most 4
    nodes)."""
    middle, half = (start + end) / 2, (end - start) / 2
    total = 0.0
    for point in (middle - half / math.sqrt(3), middle + half / math.sqrt(3)):  # Gauss-Legendre, exact up to degree 3
        value = 1.0
        for j, node in enumerate(nodes):
            if j != k:
                value *= (point - node) / (nodes[k] - node)
        total += value
    return half * total


def pndm(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None,
    *, midpoints: Sequence[tuple[float, float]] = (),
) -> torch.Tensor:
    """PNDM: Runge-Kutta for the first three steps, then Adams-Bashforth of order four; VE. `noise` is not used.

    `midpoints[i]`: the sigmas (reached by the half step, told to the network) of step i; they are one timestep apart
    where a step has an odd length. Steps without midpoints are all multistep (`plms`).
    """
    slopes: list[torch.Tensor] = []
    num_rk = min(RK_STEPS, len(midpoints), len(sigmas) - 2)  # the last step is never one of them: it may end at sigma 0
    for index, sigma, following in steps_of(sigmas):
        first = denoise(latents, sigmas[index])
        slopes = [first, *slopes][:4]
        if index < num_rk:
            slope = _runge_kutta_slope(denoise, latents, first, sigmas[index : index + 2], midpoints[index])
        else:
            slope = _weighted(slopes)
        latents = latents + (following - sigma) * slope
    return latents


def plms(denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None) -> torch.Tensor:
    """PNDM without Runge-Kutta: the first step is Heun's, then multistep of growing order; VE. `noise` is not used."""
    slopes: list[torch.Tensor] = []
    for index, sigma, following in steps_of(sigmas):
        slope = denoise(latents, sigmas[index])
        slopes = [slope, *slopes][:4]
        if index == 0 and len(sigmas) > 2:
            trial = latents + (following - sigma) * slope
            slope = (slope + denoise(trial, sigmas[1])) / 2
        else:
            slope = _weighted(slopes)
        latents = latents + (following - sigma) * slope
    return latents


def _weighted(slopes: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(weight * slope for weight, slope in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True))


def _runge_kutta_slope(
    denoise: Denoise, latents: torch.Tensor, first: torch.Tensor, ends: torch.Tensor, midpoint: tuple[float, float]
) -> torch.Tensor:
    """Slope of the classical Runge-Kutta step from ends[0] to ends[1]."""
    start, end = ends.tolist()
    reached, told = midpoint
    told_sigma = ends.new_tensor(told)
    # The network gets the half-step latents unchanged though it is told a neighbouring level: undo that level's scale.
    rescale = math.sqrt((1 + told**2) / (1 + reached**2))
    second = denoise((latents + (reached - start) * first) * rescale, told_sigma)
    third = denoise(latents + (told - start) * second, told_sigma)
    fourth = denoise(latents + (end - start) * third, ends[1])
    return (first + 2 * second + 2 * third + fourth) / 6
