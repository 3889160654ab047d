"""Gradients are summed over processes bucket by bucket: few large reductions instead of one for each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from library.core.parts import in_parts

BUCKET_BYTES = 64 * 2**20
"""large enough for the whole bandwidth, and a small part of the memory of gradients"""


def buckets_of(tensors: Iterable[torch.Tensor], most_bytes: int = BUCKET_BYTES) -> Iterator[list[torch.Tensor]]:
    """Tensors of one device and number format, in their order, that take together at most so much memory; a larger one
    is alone. They hang on shapes and formats only, and so are the same on all processes."""
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for kind in kinds.values():
        yield from in_parts(kind, lambda tensor: tensor.nbytes, most_bytes)


def sum_in_buckets(gradients: Iterable[torch.Tensor], reduce: Callable[[torch.Tensor], object]) -> None:
    """`reduce`, which changes a tensor in place, of all gradients."""
    for bucket in buckets_of(gradients):
        if len(bucket) == 1:
            reduce(bucket[0])
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])
