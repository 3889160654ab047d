"""MagCache: which steps leave the blocks out, what stands in their place, and how ratios are measured."""

from __future__ import annotations

import pytest
import torch

from library.generation.mag_cache import MagCache, MagCacheSettings, resampled


def run(cache: MagCache, added: list[float]) -> list[torch.Tensor]:
    """Tokens after each step; those before are 10 times the step, and blocks add `added` of the step."""

    def tokens(step):
        return torch.full((1, 2, 3), 10.0 * step)

    return [cache(tokens(step), lambda step=step: tokens(step) + added[step]) for step in range(cache.steps)]


def test_steps_are_left_out_by_the_rule():
    """By hand: ratios of 1.1 multiply to errors of 0.1, 0.31 and 0.641 in a row."""
    settings = MagCacheSettings(ratios=(1.1,) * 10, retention=0.2, threshold=0.35, longest=6)
    cache = MagCache(settings, 10)
    made = run(cache, [float(step + 1) for step in range(10)])
    assert cache.skipped == [2, 3, 5, 6, 8], "two of three, from step int(0.2 * 10) to the last but one"
    assert float(made[3][0, 0, 0]) == 30 + 2, "what step 1 added"
    assert float(made[4][0, 0, 0]) == 40 + 5 and float(made[9][0, 0, 0]) == 90 + 10


def test_no_more_than_so_many_in_a_row_and_none_at_the_ends():
    cache = MagCache(MagCacheSettings(ratios=(1.0,) * 8, retention=0.0, longest=3), 8)
    run(cache, [1.0] * 8)
    assert cache.skipped == [1, 2, 3, 5, 6]


def test_calibration_computes_all_and_measures():
    cache = MagCache(MagCacheSettings(calibrates=True), 4)
    run(cache, [1.0, 2.0, 3.0, 1.5])
    assert cache.skipped == [] and cache.measured == pytest.approx([2.0, 1.5, 0.5])


def test_ratios_of_another_number_of_steps_are_resampled():
    assert resampled((1.0, 2.0, 3.0, 4.0, 5.0), 3) == [1.0, 3.0, 5.0]
    assert resampled((1.0, 2.0), 5) == [1.0, 1.0, 1.0, 2.0, 2.0]
    assert resampled((1.0, 2.0), 1) == [2.0] and resampled((1.0, 2.0), 2) == [1.0, 2.0]
