"""Random numbers for callers without steps and positions: from torch's global generator, as their own noise is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from library.core.keyed_random import StepDraws


@dataclass(frozen=True)
class GlobalDraws(StepDraws):
    """StepDraws of `len(positions)` samples that go on with the global generator: set torch.manual_seed to repeat
    them."""

    @classmethod
    def of(cls, samples: int) -> GlobalDraws:
        return cls(0, 0, tuple(range(samples)))

    def normal(self, purpose: str, shape: Sequence[int] = (), *keys: int | str) -> torch.Tensor:
        return torch.randn(len(self.positions), *shape)

    def uniform(self, purpose: str, shape: Sequence[int] = (), *keys: int | str) -> torch.Tensor:
        return torch.rand(len(self.positions), *shape)

    def batch_uniform(self, purpose: str, *keys: int | str) -> float:
        return float(torch.rand(()))

    def batch_uniforms(self, purpose: str, count: int, *keys: int | str) -> torch.Tensor:
        return torch.rand(count)
