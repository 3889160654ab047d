"""Gradients in buckets: each is reduced once, in few calls."""

from __future__ import annotations

import torch

from library.training.gradient_sums import buckets_of, sum_in_buckets


def test_buckets_are_of_one_kind_and_bounded() -> None:
    tensors = [torch.zeros(n, dtype=kind) for n, kind in (
        (2, torch.float32), (3, torch.bfloat16), (2, torch.float32), (1, torch.float32), (40, torch.float32), (1, torch.bfloat16)
    )]  # fmt: skip
    found = [[len(tensor) for tensor in bucket] for bucket in buckets_of(tensors, 16)]
    assert sorted(found) == [[1], [2, 2], [3, 1], [40]]
    assert not list(buckets_of([]))


def test_every_gradient_is_reduced_once_in_few_calls() -> None:
    gradients = [torch.full((n, 2), float(n)) for n in range(1, 9)]
    gradients.append(torch.full((3, 4), 9.0).t())  # not contiguous
    calls = []

    def doubled(tensor: torch.Tensor) -> None:
        calls.append(tensor.numel())
        tensor.mul_(2)

    sum_in_buckets(gradients, doubled)
    assert [float(gradient.unique()) for gradient in gradients] == [2.0 * n for n in range(1, 10)]
    assert calls == [sum(gradient.numel() for gradient in gradients)]
