"""Sequences in parts of bounded size."""

from library.core.parts import in_parts


def test_parts_keep_the_order_and_the_bound() -> None:
    assert list(in_parts([1, 2, 3, 9, 1], lambda size: size, 4)) == [[1, 2], [3], [9], [1]]
    assert not list(in_parts([], lambda size: size, 4))
