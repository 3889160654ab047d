"""Weights in bfloat16 that learn: updates smaller than their last digit count, by chance or by a sum that is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from library.core.keyed_random import keyed_generator

LOW_BITS = 16
"""bits of a float32 that bfloat16 does not have"""


def stochastically_rounded(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16. `random`: whole numbers from 0 to 65535, as many. Each value becomes one of its two
    neighbours, the nearer the likelier: the mean over the random numbers is the value itself."""
    bits = values.contiguous().view(torch.int32) + random
    cut = torch.bitwise_and(bits, -(1 << LOW_BITS)).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


def kahan_sum(
    weight: torch.Tensor, compensation: torch.Tensor, update: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, compensation) in bfloat16 after one float32 update, all of one shape; their sum follows the sum in
    float32. Source: W. Kahan, "Pracniques: further remarks on reducing truncation errors", 1965."""
    wanted = update + compensation.float()
    before = weight.float()
    after = (before + wanted).to(torch.bfloat16)
    return after, (wanted - (after.float() - before)).to(torch.bfloat16)


def exact_value(weight: torch.Tensor, compensation: torch.Tensor | None) -> torch.Tensor:
    """In float32, what an optimizer moves: some measure how far a weight went from its start."""
    return weight.detach().float() if compensation is None else weight.detach().float() + compensation.float()


def write_rounded(
    weight: torch.Tensor, moved: torch.Tensor, kept: torch.Tensor | None, key: tuple[int, int, int]
) -> None:
    """Draws hang on seed, step and place alone: the order of updates does not matter."""
    seed, step, place = key
    # on the device: a large model has too many weights for the CPU
    generator = keyed_generator(seed, "stochastic rounding", step, place, device=weight.device)
    random = torch.randint(0, 1 << LOW_BITS, weight.shape, generator=generator, device=weight.device, dtype=torch.int32)
    weight.copy_(stochastically_rounded(moved, random))


def write_summed(
    weight: torch.Tensor, moved: torch.Tensor, kept: torch.Tensor | None, key: tuple[int, int, int]
) -> torch.Tensor:
    compensation = torch.zeros_like(weight) if kept is None else kept
    after, compensation = kahan_sum(weight, compensation, moved - exact_value(weight, compensation))
    weight.copy_(after)
    return compensation


BF16_UPDATES: dict[str, Callable[..., torch.Tensor | None]] = {"stochastic": write_rounded, "kahan": write_summed}
"""By the values of --bf16_update: (weight in bfloat16, its float32 copy after the optimizer's step, what was kept for
it, (seed, step, place of the parameter)) -> what is kept for the next update, in the optimizer's state under
COMPENSATION."""
