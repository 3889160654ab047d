"""Formulas of guidance: one prediction made of those for the prompt, for the negative prompt and for an empty one.

Predictions are [B, ...] of any number of axes, pictures and clips alike; each sample is combined by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from library.generation.guidance_options import step_scales
from library.generation.requests import PictureRequest, Request
from library.generation.sampling_utils import guided

SMALLEST_SQUARE = 1e-8
"""added to squared lengths that are divided by"""


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products [B, 1, ...] of the samples of both."""
    return (first * second).sum(dim=tuple(range(1, first.ndim)), keepdim=True)


def zero_star(negative: Tensor, positive: Tensor, cfg_scale: float) -> Tensor:
    """CFG-Zero*: guidance away from a * negative, with the a that brings it closest to positive.

    a = <positive, negative> / (|negative|^2 + 1e-8). Source: arXiv 2503.18886, section 4.
    """
    best = inner(positive, negative) / (inner(negative, negative) + SMALLEST_SQUARE)
    return guided(best * negative, positive, cfg_scale)


def perpendicular(negative: Tensor, positive: Tensor, neutral: Tensor, cfg_scale: float, weight: float) -> Tensor:
    """Away from that part of the negative prompt alone which is perpendicular to the prompt, `weight` times; `neutral`
    is the prediction for an empty prompt, from which both are counted.

    Source: arXiv 2304.04968, section 3.2.
    """
    wanted, unwanted = positive - neutral, negative - neutral
    along = inner(unwanted, wanted) / (inner(wanted, wanted) + SMALLEST_SQUARE)
    return neutral + cfg_scale * (wanted - weight * (unwanted - along * wanted))


def combine(request: PictureRequest, negative: Tensor, positive: Tensor, neutral: Tensor | None = None) -> Tensor:
    """The guided prediction in the form that the request asks for. `neutral`: that for an empty prompt, which
    `perp_neg` needs."""
    if request.perp_neg is not None and neutral is not None:
        return perpendicular(negative, positive, neutral, request.cfg_scale, request.perp_neg)
    if request.cfgzerostar_scaling:
        return zero_star(negative, positive, request.cfg_scale)
    return guided(negative, positive, request.cfg_scale)


def step_of(sigmas: Tensor, sigma: Tensor) -> int:
    """The step, counted from 0, that begins nearest to `sigma`."""
    return min(int((sigmas - float(sigma)).abs().argmin()), len(sigmas) - 2)


Velocity = Callable[[Tensor, Tensor], Tensor]


def held_at_first(velocity: Velocity, sigmas: Tensor, request: PictureRequest) -> Velocity:
    """The velocity, multiplied by `cfgzerostar_multiplier` in the first steps where the request asks for that."""
    held, factor = request.cfgzerostar_init_steps, request.cfgzerostar_multiplier
    if held < 1:
        return velocity

    def predicted(latents: Tensor, sigma: Tensor) -> Tensor:
        if step_of(sigmas, sigma) >= held:
            return velocity(latents, sigma)
        return factor * velocity(latents, sigma) if factor else torch.zeros_like(latents)

    return predicted


def scheduled(request: Request, sigmas: Tensor, guided: Callable[[Request], Velocity]) -> Velocity:
    """What is guided in the steps and by the scales of `cfg_schedule`, alone in the others, and held in the first ones.

    `sigmas` [steps + 1]: levels or times of the steps, downwards, of the kind that the function is called with;
    `guided`: request without a schedule -> function.
    """
    if request.cfg_schedule is None:
        return held_at_first(guided(request), sigmas, request)
    scales = step_scales(request.cfg_schedule, len(sigmas) - 1)
    choices = {scale: guided(request.at_scale(scale)) for scale in set(scales)}

    def predicted(latents: Tensor, sigma: Tensor) -> Tensor:
        return choices[scales[step_of(sigmas, sigma)]](latents, sigma)

    return held_at_first(predicted, sigmas, request)
