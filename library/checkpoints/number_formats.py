"""Weights in a narrower number format: what it cannot hold is named instead of written as infinity, or bounded where
that is asked for."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from library.core.errors import CheckpointError

logger = logging.getLogger(__name__)

_is_clamping: ContextVar[bool] = ContextVar("clamp_overflow", default=False)
NAMED = 5
"""tensors that a message names"""


@contextmanager
def clamping(is_on: bool) -> Iterator[None]:
    """While it lasts `narrowed` bounds values instead of refusing them: --clamp_overflow."""
    token = _is_clamping.set(is_on)
    try:
        yield
    finally:
        _is_clamping.reset(token)


def is_clamping() -> bool:
    return _is_clamping.get()


def largest_that_fits(dtype: torch.dtype) -> float:
    """Numbers of at least this size are infinite in the format, or cut off where it has no infinity; smaller ones are
    rounded to it."""
    info = torch.finfo(dtype)
    if info.max == sys.float_info.max:  # as wide as the numbers that are computed with here
        return math.inf
    return info.max + 2.0 ** math.floor(math.log2(info.max)) * info.eps / 2


def overflow_of(tensor: Tensor, dtype: torch.dtype | None) -> float | None:
    """The largest finite size of a number of `tensor` where `dtype` cannot hold it; None when all fit."""
    if dtype is None or not tensor.is_floating_point() or not dtype.is_floating_point or not tensor.numel():
        return None
    limit = largest_that_fits(dtype)
    if torch.finfo(tensor.dtype).max < limit:
        return None
    wide = tensor.detach()
    wide = wide.float() if wide.element_size() == 1 else wide
    largest = float(wide.abs().amax())
    if not math.isfinite(largest):  # infinite before: not a matter of the format
        largest = float(wide.nan_to_num(0.0, 0.0, 0.0).abs().amax())
    return largest if largest >= limit else None


FOR_FILES = "Write it in bf16 or float32, or add --clamp_overflow to bound such numbers"
AT_LOADING = "Compute in bf16 or float32 (--mixed_precision bf16, without --fp8_base)"
IN_MEMORY = "Load the model in bf16 or float32, or lower the adapter's multiplier"


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype | None, advice: str = FOR_FILES) -> Tensor:
    """`tensor` in `dtype` (None = as it is). CheckpointError that names it when numbers do not fit; under `clamping`
    they are bounded, and that is told."""
    return narrowed_all({name: (tensor, dtype)}, advice)[name]


def narrowed_all(
    tensors: Mapping[str, tuple[Tensor, torch.dtype | None]], advice: str = FOR_FILES
) -> dict[str, Tensor]:
    """As narrowed, for many: one message for all."""
    beyond = {name: largest for name, pair in tensors.items() if (largest := overflow_of(*pair)) is not None}
    if beyond and not is_clamping():
        raise CheckpointError(told_overflow(beyond, tensors[next(iter(beyond))][1], advice))
    result = {}
    for name, (tensor, dtype) in tensors.items():
        if name in beyond:
            limit = torch.finfo(dtype).max
            logger.warning(
                "%s reaches %g and is bounded to %g, the largest number of %s", name, beyond[name], limit, _word(dtype)
            )
            bounded = (tensor.float() if tensor.element_size() == 1 else tensor).clamp(-limit, limit)
            tensor = torch.where(torch.isinf(tensor), tensor, bounded)
        result[name] = tensor.to(dtype or tensor.dtype)
    return result


def told_overflow(beyond: Mapping[str, float], dtype: torch.dtype, advice: str = FOR_FILES) -> str:
    """One sentence for tensors whose largest numbers do not fit."""
    some = ", ".join(f"{name} reaches {size:g}" for name, size in list(beyond.items())[:NAMED])
    more = f" and {len(beyond) - NAMED} more tensors do not fit" if len(beyond) > NAMED else ""
    return f"{some}{more}; {_word(dtype)} holds numbers up to {torch.finfo(dtype).max:g}. {advice}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
