"""MagCache: steps that leave the blocks of a denoiser out, and add once more what the blocks added in the step before.

How much that differs is estimated by ratios of magnitudes, one for each step, which are measured once for a model and
kind of schedule (Ma et al., MagCache, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MagCacheSettings:
    """`ratios`: of the size of what the blocks add to that of the step before, one for each step; resampled where there
    are others. The first `retention` share of the steps and the last step are computed. At most `longest` steps in a
    row are left out, while the estimated error stays within `threshold`. With `calibrates` all are computed and the
    ratios measured."""

    ratios: tuple[float, ...] = ()
    retention: float = 0.2
    threshold: float = 0.24
    longest: int = 6
    calibrates: bool = False


@dataclass
class MagCache:
    """Stands around the blocks for all steps of one schedule; each text of guidance has one of its own."""

    settings: MagCacheSettings
    steps: int
    measured: list[float] = field(default_factory=list)
    """ratios of the steps after the first, where they are measured"""
    skipped: list[int] = field(default_factory=list)
    _step: int = 0
    _added: Tensor | None = None
    _ratio: float = 1.0
    _error: float = 0.0
    _in_a_row: int = 0

    def __call__(self, tokens: Tensor, blocks: Callable[[], Tensor]) -> Tensor:
        """`tokens` [B, L, D] before the blocks, and the function that runs them -> tokens after them."""
        step, self._step = self._step, self._step + 1
        if self._added is not None and self._is_left_out(step):
            self.skipped.append(step)
            return tokens + self._added
        made = blocks()
        added = made - tokens
        if self.settings.calibrates and self._added is not None:
            self.measured.append(ratio_of(added, self._added))
        self._added = added
        return made

    def _is_left_out(self, step: int) -> bool:
        settings = self.settings
        first = max(int(settings.retention * self.steps), 1)
        if settings.calibrates or not first <= step <= self.steps - 2:
            return False
        self._ratio *= resampled(settings.ratios, self.steps)[step]
        self._error += abs(1 - self._ratio)
        self._in_a_row += 1
        if self._error <= settings.threshold and self._in_a_row <= settings.longest:
            return True
        self._ratio, self._error, self._in_a_row = 1.0, 0.0, 0
        return False


def ratio_of(added: Tensor, before: Tensor) -> float:
    """Mean over tokens of the size of what blocks add [B, L, D] to that of the step before."""
    sizes, earlier = (torch.linalg.vector_norm(one.float(), dim=-1) for one in (added, before))
    return float((sizes / earlier).mean())


def resampled(ratios: Sequence[float], steps: int) -> list[float]:
    """One for each step: of other numbers of ratios the nearest at the same share of the schedule."""
    if len(ratios) == steps:
        return list(ratios)
    if steps == 1:
        return [ratios[-1]]
    scale = (len(ratios) - 1) / (steps - 1)
    return [ratios[round(step * scale)] for step in range(steps)]
