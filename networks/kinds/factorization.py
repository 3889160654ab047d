"""Sizes as products of two whole numbers, as kinds of adapters that cut a weight into blocks choose them."""

from __future__ import annotations


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m <= n and m * n = size. A factor that divides the size is one of them; otherwise m is the largest
    divisor up to `factor` (-1: any) on the way from 1 to the square root."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else factor
    small, large = 1, size
    while small < large:
        divisor = next(m for m in range(small + 1, size + 1) if size % m == 0)
        if divisor > limit:
            break
        small, large = divisor, size // divisor
    return min(small, large), max(small, large)


def power_of_two_blocks(size: int, largest: int) -> tuple[int, int] | None:
    """(block, count) with block * count = size, the block even and at most `largest`, the count a power of two and the
    block as large as that allows; None when there is no such pair."""
    for block in range(largest - largest % 2, 0, -2):
        count, rest = divmod(size, block)
        if rest == 0 and count & (count - 1) == 0:
            return block, count
    return None


def divisors(size: int) -> list[int]:
    """All whole numbers that divide `size`, in rising order."""
    return [number for number in range(1, size + 1) if size % number == 0]
