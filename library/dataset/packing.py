"""Packs: which samples of several sizes go through the denoiser together. A pure function of (seed, epoch).

The number of packs is that of the first epoch in every epoch, since the steps of an epoch are counted once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.core.keyed_random import keyed_random

STRATEGIES = ("next_fit", "ffd")
MOST_SHUFFLES = 20
"""of an epoch, until one needs no more packs than the first epoch"""

Pack = tuple[int, ...]
"""indices of the items"""


@dataclass(frozen=True)
class Packing:
    """How packs are filled. `token_budget`: tokens of the denoiser's picture or clip in one pack, at most, and a sample
    that has more is alone; `max_samples`: of a pack, 0 = any number. `strategy`: next_fit takes the samples as they
    come and begins a pack where the next one does not fit; ffd sorts each `window` of them (0 = all), the largest
    first, and puts each into the first pack that has room. `drop_last`: the emptiest pack of an epoch is left out."""

    token_budget: int
    max_samples: int = 0
    strategy: str = "next_fit"
    window: int = 256
    drop_last: bool = False


def packs_of_epoch(
    samples: Sequence[int], tokens: Mapping[int, int], packing: Packing, *, seed: int, epoch: int, dataset: int = 0
) -> list[Pack]:
    """The packs of one dataset in the order in which they are trained. `samples`: items with repeats; `tokens`: of each
    item."""
    packs = _as_many_as_first(samples, tokens, packing, seed, epoch, dataset)
    if packing.drop_last and len(packs) > 1:
        packs.remove(min(packs, key=lambda pack: _total(pack, tokens)))
    keyed_random(seed, "order of packs", epoch, dataset).shuffle(packs)
    return packs


def most_samples(samples: Sequence[int], tokens: Mapping[int, int], packing: Packing) -> int:
    """How many samples a pack of any epoch has at most: the smallest ones together."""
    count, total = 0, 0
    for item in sorted(samples, key=lambda item: tokens[item]):
        total += tokens[item]
        if count and total > packing.token_budget:
            break
        count += 1
    return min(count, packing.max_samples or count)


def fill_of(packs: Sequence[Pack], tokens: Mapping[int, int], packing: Packing) -> float:
    """Which part of the budget packs fill in the mean; a sample that has more fills one."""
    filled = sum(min(_total(pack, tokens), packing.token_budget) for pack in packs)
    return filled / (packing.token_budget * max(len(packs), 1))


def _as_many_as_first(
    samples: Sequence[int], tokens: Mapping[int, int], packing: Packing, seed: int, epoch: int, dataset: int
) -> list[Pack]:
    def packed(of_epoch: int, number: int) -> list[Pack]:
        order = list(samples)
        keyed_random(seed, "order of packed samples", of_epoch, dataset, number).shuffle(order)
        return fill(order, tokens, packing)

    first = packed(1, 0)
    if epoch <= 1:
        return first
    for number in range(MOST_SHUFFLES):
        packs = packed(epoch, number)
        if len(packs) <= len(first):
            break
    else:
        packs = first
    while len(packs) < len(first):
        largest = max(packs, key=len)
        place, half = packs.index(largest), len(largest) // 2
        packs[place : place + 1] = [largest[:half], largest[half:]]
    return packs


def fill(order: Sequence[int], tokens: Mapping[int, int], packing: Packing) -> list[Pack]:
    """Samples in their order as packs."""
    if packing.strategy == "next_fit":
        return [tuple(pack) for pack in _next_fit(order, tokens, packing)]
    size = packing.window or max(len(order), 1)
    windows = [order[start : start + size] for start in range(0, len(order), size)]
    return [tuple(pack) for window in windows for pack in _first_fit_decreasing(window, tokens, packing)]


def _next_fit(order: Sequence[int], tokens: Mapping[int, int], packing: Packing) -> list[list[int]]:
    packs: list[list[int]] = []
    total = 0
    for item in order:
        if not packs or not _fits(packs[-1], total, tokens[item], packing):
            packs.append([])
            total = 0
        packs[-1].append(item)
        total += tokens[item]
    return packs


def _first_fit_decreasing(order: Sequence[int], tokens: Mapping[int, int], packing: Packing) -> list[list[int]]:
    packs: list[list[int]] = []
    totals: list[int] = []
    rooms = _Rooms(len(order))
    for item in sorted(order, key=lambda item: -tokens[item]):  # equal ones stay in their order
        number = rooms.first(tokens[item])
        if number is None:
            number = len(packs)
            packs.append([])
            totals.append(0)
        packs[number].append(item)
        totals[number] += tokens[item]
        is_full = len(packs[number]) == packing.max_samples
        rooms.set(number, _NO_ROOM if is_full else packing.token_budget - totals[number])
    return packs


_NO_ROOM = -1


class _Rooms:
    """What is left in each of some packs. The first one with enough is found in log(packs) steps: whole epochs have
    thousands of packs. Those that are not begun have no room."""

    def __init__(self, count: int) -> None:
        self.width = 1 << max(count - 1, 0).bit_length()
        self.largest = [_NO_ROOM] * (2 * self.width)
        """a tree: node n has the larger one of nodes 2n and 2n + 1, and the packs begin at node `width`"""

    def set(self, number: int, room: int) -> None:
        node = self.width + number
        self.largest[node] = room
        while node > 1:
            node //= 2
            self.largest[node] = max(self.largest[2 * node], self.largest[2 * node + 1])

    def first(self, needed: int) -> int | None:
        """The first pack with this much room; None where no pack has."""
        if self.largest[1] < needed:
            return None
        node = 1
        while node < self.width:
            node *= 2
            node += self.largest[node] < needed
        return node - self.width


def _fits(pack: Sequence[int], total: int, more: int, packing: Packing) -> bool:
    has_place = not packing.max_samples or len(pack) < packing.max_samples
    return has_place and (not pack or total + more <= packing.token_budget)


def _total(pack: Pack, tokens: Mapping[int, int]) -> int:
    return sum(tokens[item] for item in pack)
