"""Weights in fewer bits than they are computed with: the forms, and a weight in one of them between file and layer.

| form | a number | scales, float32 |
|---|---|---|
| fp8 | float8_e4m3fn, cast | none |
| fp8_scaled | float8_e4m3fn | one per row, or per block of a row's inputs: the largest number of each becomes 448 |
| int8 | a whole number of -127 to 127 | one per row |
| nf4 | one of 16 quantiles of the normal distribution, two in a byte | one per 64 (or 32) inputs of a row |

NF4 is that of QLoRA (Dettmers et al. 2023, arXiv:2305.14314), computed by bitsandbytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.safetensors_utils import cast_floats

FP8, FP8_SCALED, INT8, NF4 = "fp8", "fp8_scaled", "int8", "nf4"
FORMS = (FP8, FP8_SCALED, INT8, NF4)

FP8_STORAGE = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
"""largest number of float8_e4m3fn"""
FP8_BLOCK = 64
"""inputs of a row that share a scale, where scales of 8-bit numbers go by blocks"""
LARGEST_INT8 = 127.0
NF4_BLOCKS = (64, 32)
"""inputs that share a scale of NF4: the first of these that divides the inputs of a row"""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight `shape` = [out, in, ...] in a form of FORMS.

    `data`: its numbers, [out, in, ...], or bytes [out, in / 2] of NF4 as int8, because models of transformers cast
    their inputs to the type of some weights, and leave them alone where it is int8; `scale`: None, [out] or
    [out, blocks]. Rows are apart in both, so that rules between layouts of files join, divide and swap them as they do
    rows of tensors: `torch.cat`, `chunk`, `split`.
    """

    form: str
    data: Tensor
    scale: Tensor | None
    shape: torch.Size

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def widened(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that it stands for."""
        return widened(self.form, self.data, self.scale, self.shape, dtype)

    def to(self, device: torch.device | str) -> StoredWeight:
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def split(self, rows: int | Sequence[int]) -> list[StoredWeight]:
        """As that of tensors, along the rows."""
        pieces = self.data.split(rows)
        scales = [None] * len(pieces) if self.scale is None else self.scale.split(rows)
        return [
            replace(self, data=data, scale=scale, shape=torch.Size((len(data), *self.shape[1:])))
            for data, scale in zip(pieces, scales)
        ]

    def chunk(self, count: int) -> list[StoredWeight]:
        return self.split(-(-self.shape[0] // count))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.cat and not kwargs and len(args) == 1:
            return joined(args[0])
        raise TypeError(f"{getattr(function, '__name__', function)} does not take weights in fewer bits")


def whole(weight: StoredWeight | Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor as it is, and what a weight in fewer bits stands for."""
    return weight.widened(dtype) if isinstance(weight, StoredWeight) else weight


def joined(parts: Sequence[StoredWeight | Tensor]) -> StoredWeight | Tensor:
    """Rows of weights one below the other. Where the parts are not all in one form, what they stand for."""
    kinds = {
        (part.form, part.dtype, part.scale is None, None if part.scale is None else part.scale.shape[1:])
        if isinstance(part, StoredWeight) else None
        for part in parts
    }  # fmt: skip
    if len(kinds) > 1 or None in kinds:
        wide = next((part.dtype for part in parts if isinstance(part, Tensor)), torch.bfloat16)
        return torch.cat([whole(part, wide) for part in parts])
    data = torch.cat([part.data for part in parts])
    scale = None if parts[0].scale is None else torch.cat([part.scale for part in parts])
    return replace(parts[0], data=data, scale=scale, shape=torch.Size((len(data), *parts[0].shape[1:])))


def stored(weight: Tensor, form: str, block: int | None = None, name: str = "a weight") -> StoredWeight:
    """A weight [out, in, ...] in a form; `block`: the inputs of a row that share a scale of fp8_scaled, None = all.

    Where the inputs of a row cannot be divided into blocks, 8-bit numbers have scales by rows, and NF4 is int8.
    CheckpointError that names the weight when it holds numbers that fp8 does not.
    """
    rows = weight.detach().flatten(1)  # [out, in]
    if form == FP8:
        data, scale = cast_floats(rows, FP8_STORAGE, name), None
    elif form == FP8_SCALED:
        data, scale = scaled_fp8(rows, block)
    elif form == NF4 and nf4_block(rows.shape[1]):
        data, scale = _as_nf4(rows)
        return StoredWeight(form, data, scale, weight.shape)
    elif form in (INT8, NF4):
        form, (data, scale) = INT8, _as_int8(rows)
    else:
        raise ValueError(f"'{form}' is no form of weights; there are {', '.join(FORMS)}")
    return StoredWeight(form, data.view(weight.shape), scale, weight.shape)


def widened(form: str, data: Tensor, scale: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight that `data` and `scale` of a StoredWeight stand for, computed in float32 where there are scales."""
    if form == NF4:
        inputs = shape[1:].numel()
        matrix = torch.ops.bitsandbytes.dequantize_4bit(
            data.view(torch.uint8), scale.flatten(), inputs // scale.shape[1], NF4, [shape[0], inputs], dtype
        )
        return matrix.view(shape)
    if scale is None:
        return data.to(dtype)
    return unscaled(data, scale).to(dtype)


def scaled_fp8(weight: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """(weight [out, in] in 8 bits, scales [out] float32): each row divided by its largest absolute value / 448, so that
    rows of any size use the whole range. With `block` each run of so many inputs of a row has a scale of its own,
    [out, in / block], where the inputs are a multiple of it. Scales stay float32: in a format of fewer digits all
    numbers of a block would be off by the same share."""
    full = weight.detach().float()
    if block is None or full.shape[1] % block:
        scale = full.abs().amax(dim=1).clamp_min(1e-12) / LARGEST_FP8
        return (full / scale[:, None]).clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8_STORAGE), scale
    blocks = full.unflatten(1, (-1, block))  # [out, in / block, block]
    scale = (blocks.abs().amax(dim=2) / LARGEST_FP8).clamp_min(1e-8)
    return (blocks / scale[:, :, None]).clamp(-LARGEST_FP8, LARGEST_FP8).flatten(1).to(FP8_STORAGE), scale


def unscaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Numbers [out, in, ...] times scales by rows [out], or by blocks [out, blocks] of a matrix; float32."""
    if scale.ndim == 2:
        return (weight.float().unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
    return weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))


def _as_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """([out, in] int8, scales [out])."""
    full = rows.float()
    scale = full.abs().amax(dim=1).clamp_min(1e-12) / LARGEST_INT8
    return (full / scale[:, None]).round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8), scale


def nf4_block(inputs: int) -> int | None:
    """How many of so many inputs of a row share a scale of NF4; None where it cannot be divided."""
    return next((block for block in NF4_BLOCKS if inputs % block == 0), None)


def _as_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """([out, in / 2] int8, scales [out, in / block])."""
    load_nf4()
    block = nf4_block(rows.shape[1])
    packed, scale = torch.ops.bitsandbytes.quantize_4bit(rows.contiguous(), block, NF4, torch.uint8)
    return packed.view(torch.int8).view(len(rows), -1), scale.float().view(len(rows), -1)


def load_nf4() -> None:
    """bitsandbytes, whose operators NF4 is made of and read with. ImportError when it is not there."""
    import bitsandbytes.functional  # noqa: F401


def has_nf4() -> bool:
    """Whether bitsandbytes is installed, told without importing it."""
    return importlib.util.find_spec("bitsandbytes") is not None


def holds_nf4(device: torch.device | str) -> bool:
    """Whether bitsandbytes has its operators for a device: tried on a block of each size."""
    try:
        rows = [torch.linspace(-1, 1, block, device=device)[None] for block in NF4_BLOCKS]
        return all(bool((stored(row, NF4).widened() - row).abs().amax() < 0.2) for row in rows)
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError):
        return False


def is_stored(form: str | None, name: str, blocks: tuple[str, ...]) -> bool:
    """Whether a form takes the matrix of this name: the cast to fp8 all of a denoiser, the others those in blocks."""
    return form in (None, FP8) or name.startswith(blocks)
