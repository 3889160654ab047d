"""Which samples are packed together: every one once in an epoch, within the budget, in as many packs in every epoch."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest

from library.dataset.packing import Packing, fill, fill_of, most_samples, packs_of_epoch
from library.dataset.plan import GlobalBatch, plan_packs, requests_of_epoch
from library.families.latents import LatentSpec
from library.families.registry import FAMILIES

TOKENS = {item: 10 + 7 * item % 40 for item in range(30)}
SAMPLES = [*range(30), 4, 4, 9]
NEXT, FIRST = Packing(100), Packing(100, strategy="ffd", window=12)


def of_epoch(packing: Packing, epoch: int, seed: int = 3) -> list[tuple[int, ...]]:
    return packs_of_epoch(SAMPLES, TOKENS, packing, seed=seed, epoch=epoch)


@pytest.mark.parametrize("packing", [NEXT, FIRST, replace(FIRST, window=0), replace(NEXT, max_samples=2)])
def test_every_sample_once_and_within_the_budget(packing: Packing) -> None:
    counts = set()
    for epoch in range(1, 40):
        packs = of_epoch(packing, epoch)
        counts.add(len(packs))
        assert Counter(item for pack in packs for item in pack) == Counter(SAMPLES)
        assert all(sum(TOKENS[item] for item in pack) <= 100 for pack in packs)
        assert all(len(pack) <= (packing.max_samples or 99) for pack in packs)
        assert packs == of_epoch(packing, epoch)
    assert len(counts) == 1
    assert of_epoch(packing, 1) != of_epoch(packing, 2) != of_epoch(packing, 2, seed=4)


def test_a_pack_begins_where_the_next_does_not_fit() -> None:
    tokens = {0: 60, 1: 30, 2: 20, 3: 10, 4: 200, 5: 5}
    assert fill([0, 1, 2, 3, 4, 5], tokens, NEXT) == [(0, 1), (2, 3), (4,), (5,)]
    assert fill([0, 1, 2, 3, 4, 5], tokens, replace(FIRST, window=0)) == [(4,), (0, 1, 3), (2, 5)]
    assert fill([0, 1, 2, 3, 4, 5], tokens, replace(FIRST, window=3)) == [(0, 1), (2,), (4,), (3, 5)]
    assert fill_of([(0, 1), (2, 3)], tokens, NEXT) == pytest.approx(0.6)
    assert fill_of([(4,), (5,)], tokens, NEXT) == pytest.approx(0.525)


def test_the_emptiest_is_left_out() -> None:
    whole, cut = of_epoch(NEXT, 5), of_epoch(replace(NEXT, drop_last=True), 5)
    (missing,) = set(whole) - set(cut)
    assert sum(TOKENS[i] for i in missing) == min(sum(TOKENS[i] for i in pack) for pack in whole)


def test_every_rank_has_a_pack() -> None:
    packs = [(0, [(1, 2, 3), (4,), (5, 6)]), (2, [(7,), (8, 9)])]
    steps = plan_packs(packs, seed=1, epoch=1, num_processes=2)
    assert {batch for step in steps for batch in step} == {
        GlobalBatch(0, (1, 2, 3, 4), (3, 1)), GlobalBatch(0, (5, 6), (2,)), GlobalBatch(2, (7, 8, 9), (1, 2)),
    }  # fmt: skip
    shares = [list(requests_of_epoch(steps, epoch=1, first_step=0, rank=rank, num_processes=2)) for rank in range(2)]
    for first, second in zip(*shares, strict=True):
        assert {first.items, second.items} in ({(1, 2, 3), (4,)}, {(5, 6), ()}, {(7,), (8, 9)})
        assert (*first.positions, *second.positions) == tuple(range(first.group_size))


def test_two_processes_train_what_two_micro_batches_do() -> None:
    packs = [(0, [(1, 2, 3), (4,), (5, 6), (7,)])]
    of_two = plan_packs(packs, seed=1, epoch=1, num_processes=2)
    alone = plan_packs(packs, seed=1, epoch=1, num_processes=1, accumulation=2)
    samples = [[item for batch in step for item in batch.items] for step in of_two]
    assert samples == [[item for batch in step for item in batch.items] for step in alone]


def test_tokens_of_a_sample() -> None:
    spec = LatentSpec(channels=4, spatial_stride=8, patch=2, temporal_stride=4, clips=True)
    assert spec.tokens((64, 96)) == 4 * 6
    assert spec.tokens((72, 64)) == 5 * 4  # the last patch of a side is filled up
    assert spec.tokens((64, 96, 9)) == 3 * 4 * 6
    assert FAMILIES["hunyuan_image"].architecture.latents.tokens((1024, 1024)) == 1024


def first_fit_decreasing(order: list[int], tokens: dict[int, int], packing: Packing) -> list[tuple[int, ...]]:
    """Pack by pack, as it is defined."""
    packs: list[list[int]] = []
    for item in sorted(order, key=lambda item: -tokens[item]):
        fitting = (
            pack for pack in packs
            if sum(tokens[one] for one in pack) + tokens[item] <= packing.token_budget
            and len(pack) < (packing.max_samples or 10**9)
        )  # fmt: skip
        pack = next(fitting, None)
        if pack is None:
            pack = []
            packs.append(pack)
        pack.append(item)
    return [tuple(pack) for pack in packs]


def test_the_first_pack_with_room_is_found_among_many() -> None:
    draws = random.Random(2)
    for count, most in ((0, 0), (1, 0), (2, 1), (17, 0), (64, 3), (400, 0), (401, 5)):
        tokens = {item: draws.choice((1, 20, 20, 33, 50, 99, 100, 130)) for item in range(count)}
        packing, order = Packing(100, most, "ffd", 0), draws.sample(range(count), count)
        assert fill(order, tokens, packing) == first_fit_decreasing(order, tokens, packing)


def test_a_whole_epoch_is_packed_at_once() -> None:
    """In seconds where every pack was looked at in turn."""
    draws = random.Random(1)
    tokens = {item: draws.randint(64, 7000) for item in range(20_000)}
    begun = time.perf_counter()
    packs = fill(list(tokens), tokens, Packing(16384, strategy="ffd", window=0))
    assert time.perf_counter() - begun < 5 and fill_of(packs, tokens, Packing(16384)) > 0.99


@pytest.mark.parametrize("packing", [NEXT, FIRST, replace(NEXT, max_samples=3), Packing(5)])
def test_no_pack_of_any_epoch_has_more_samples_than_told(packing: Packing) -> None:
    most = most_samples(SAMPLES, TOKENS, packing)
    assert all(len(pack) <= most for epoch in range(1, 40) for pack in of_epoch(packing, epoch))
    small = sorted(TOKENS[item] for item in SAMPLES)[:most]
    assert most == packing.max_samples or sum(small) <= packing.token_budget or most == 1
