"""Noise levels of the steps of flow models, in place of a family's own: the table.

A function `(num_steps, shift) -> sigmas` [n + 1] float64, which run down from 1 to 0; `shift` is how far the family's
steps lie towards noise. All but `sgm_uniform` choose among the levels of 1000 evenly spaced times that are shifted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from library.training.inference_samplers import SIGMA_TABLES
from library.training.inference_samplers.level_places import beta_places, karras_sigmas, simple_places
from library.training.timesteps import NUM_TIMESTEPS, shift_sigmas


def levels(shift: float) -> Tensor:
    """[1000] float64: the shifted times i / 1000, from the smallest to 1."""
    return shift_sigmas(torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS, shift)


def with_end(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, torch.zeros(1, dtype=torch.float64)))


def simple(num_steps: int, shift: float) -> Tensor:
    """Every so many-th level, from the largest down."""
    return with_end(levels(shift)[simple_places(num_steps)])


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
    """Levels at quantiles of the beta distribution (0.6, 0.6), see `beta_places`."""
    return with_end(levels(shift)[beta_places(num_steps)])


def table_sigmas(name: str, num_steps: int, shift: float) -> Tensor:
    """[n + 1] float32 of the table of this name. ConfigError for an unknown one."""
    return SIGMA_TABLES.resolve(name, "--sigma_table")(num_steps, shift).float()
