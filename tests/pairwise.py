"""Cross products of settings run pairwise: every value of one axis meets every value of each other axis, in few cases."""

from __future__ import annotations

import zlib
from itertools import combinations

import pytest


def pairs_of(item: pytest.Item, axes: tuple) -> set[tuple]:
    """The pairs of values that a case holds."""
    values = [(axis, tuple(repr(item.callspec.params[name]) for name in ((axis,) if isinstance(axis, str) else axis))) for axis in axes]
    return {(item.function.__module__, item.originalname, *pair) for pair in combinations(values, 2)}


def chosen(items: list[pytest.Item]) -> set[pytest.Item]:
    """All cases without the mark `cross_product`, and of the others those that together hold every pair. Always the same ones."""
    products = {item: mark.args for item in items if (mark := item.get_closest_marker("cross_product")) is not None}
    wanted = {item: pairs_of(item, axes) for item, axes in products.items()}
    kept, seen = set(items) - set(products), set()
    order = sorted(wanted, key=lambda item: zlib.crc32(item.nodeid.encode()))  # so that the rest of the values is mixed
    for gain in range(max(map(len, wanted.values()), default=0), 0, -1):
        for item in order:
            if item not in kept and len(wanted[item] - seen) >= gain:
                kept.add(item)
                seen |= wanted[item]
    return kept
