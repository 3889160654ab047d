"""Cross products of settings run pairwise: every value of one axis meets every value of each other axis, in few cases.

An axis is a parameter, a tuple of parameters, a `Sort`: a parameter whose values count as one when they are of one sort,
or an `Each`: a parameter each of whose values is met by some case, whatever else that holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest

U_NETS = {"sd", "sd1", "sd2", "sdxl"}


@dataclass(frozen=True)
class Sort:
    """The values of parameter `name`, sorted by `of`. Those that are `dear` stand for their sort only where no other
    does: their cases take longest."""

    name: str
    of: Callable[[Any], Any]
    dear: frozenset = frozenset()


@dataclass(frozen=True)
class Each:
    """Every value of parameter `name`."""

    name: str


def denoiser(name: str) -> Sort:
    """Families by what their denoiser is built of, which is all that an adapter sees of them."""
    return Sort(name, lambda family: "U-Net" if family in U_NETS else "transformer", frozenset({"sdxl"}))


def value_of(item: pytest.Item, axis: Any) -> tuple:
    params = item.callspec.params
    if isinstance(axis, Sort):
        return (repr(axis.of(params[axis.name])),)
    return tuple(repr(params[name]) for name in ((axis,) if isinstance(axis, str) else axis))


def pairs_of(item: pytest.Item, axes: tuple) -> set[tuple]:
    """The pairs of values that a case holds, and its values of `Each` axes."""
    values = [(axis, value_of(item, axis)) for axis in axes if not isinstance(axis, Each)]
    alone = [((axis, value_of(item, axis.name)),) for axis in axes if isinstance(axis, Each)]
    return {(item.function.__module__, item.originalname, *held) for held in (*combinations(values, 2), *alone)}


def is_dear(item: pytest.Item, axes: tuple) -> bool:
    return any(item.callspec.params[axis.name] in axis.dear for axis in axes if isinstance(axis, Sort))


def chosen(items: list[pytest.Item]) -> set[pytest.Item]:
    """All cases without the mark `cross_product`, and of the others those that together hold every pair. Always the
    same ones."""
    products = {item: mark.args for item in items if (mark := item.get_closest_marker("cross_product")) is not None}
    wanted = {item: pairs_of(item, axes) for item, axes in products.items()}
    kept, seen = set(items) - set(products), set()
    mixed = {item: zlib.crc32(item.nodeid.encode()) for item in wanted}  # so that the rest of the values is
    order = sorted(wanted, key=lambda item: (is_dear(item, products[item]), mixed[item]))
    for gain in range(max(map(len, wanted.values()), default=0), 0, -1):
        for item in order:
            if item not in kept and len(wanted[item] - seen) >= gain:
                kept.add(item)
                seen |= wanted[item]
    return kept
