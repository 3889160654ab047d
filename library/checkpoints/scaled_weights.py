"""Weights in files that stand there in fewer bits with scales beside them, as ComfyUI writes them: which they are, what
is read of them, and what else in a file is no weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.weight_forms import FP8_SCALED, INT8, StoredWeight
from library.core.errors import CheckpointError
from library.safetensors_utils import FP8_DTYPES

if TYPE_CHECKING:
    from library.checkpoints.loading import CheckpointFiles

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
SCALED_FORMS = {**dict.fromkeys(FP8_DTYPES, FP8_SCALED), torch.int8: INT8}
"""types of weights that scales may stand beside -> their form"""
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TOKENIZERS = {"spiece_model", "tokenizer", "tekken_model"}
_BLOB_NAMES = {*_TOKENIZERS, "scaled_fp8"}
_BLOB_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant", ".scaled_fp8", ".spiece_model", *SCALE_SUFFIXES)

Items = Iterable[tuple[str, Tensor]]


def is_blob(key: str) -> bool:
    """Entries that are no weights: tokenizers inside the file, marks and scales of quantised files."""
    return key in _BLOB_NAMES or key.endswith(_BLOB_SUFFIXES)


def is_scale(key: str) -> bool:
    """Those of them that scaled 8-bit weights are multiplied by, and what marks such weights."""
    return is_blob(key) and key.split(".")[-1] not in _TOKENIZERS


def refuse_unknown_forms(path: str, shapes: Mapping[str, Tensor]) -> None:
    """CheckpointError for weights in fewer bits whose scales are no numbers per weight, row or block, or two in a
    byte."""
    for key, scale in shapes.items():
        suffix = next((suffix for suffix in SCALE_SUFFIXES if key.endswith(suffix)), None)
        weight = shapes.get(f"{key.removesuffix(suffix)}.weight") if suffix else None
        if weight is not None and (weight.dtype == torch.uint8 or scale.dtype not in SCALE_DTYPES):
            kinds = f"{weight.dtype} with scales in {scale.dtype}".replace("torch.", "")
            raise CheckpointError(
                f"{path} stores {key.removesuffix(suffix)}.weight as {kinds} (NVFP4 or MXFP8); needed: the model in"
                " bf16, fp16 or scaled float8; --quantize_base nf4 or --fp8_scaled makes it as small while it is read"
            )


def unscaled(files: CheckpointFiles, items: Items) -> Items:
    """Tensors of a file as they are read, less what is no weight; weights with scales beside them are multiplied out,
    float32."""
    return multiplied_out(with_scales(files, items), lambda weight: False)


def with_scales(files: CheckpointFiles, items: Items) -> Iterator[tuple[str, Tensor | StoredWeight]]:
    """Tensors of a file as they are read, less what is no weight. A weight in float8 or int8 (`X.weight`) with scales
    beside it (`X.scale_weight`, `X.weight_scale`) comes with them."""
    names = {
        f"{key[: -len(suffix)]}.weight": key
        for suffix in SCALE_SUFFIXES
        for key in files.shapes
        if key.endswith(suffix)
    }
    scales = dict(files.stream("cpu", True, names.values())) if names else {}
    for key, tensor in items:
        if key in names and tensor.dtype in SCALED_FORMS:
            yield key, as_in_file(tensor, scales[names[key]].to(tensor.device, torch.float32))
        elif not is_blob(key):
            yield key, tensor


def as_in_file(weight: Tensor, scale: Tensor) -> StoredWeight:
    """A weight in scaled numbers as files have it, whose scale has one value, one per row [out, 1], or one per block of
    a row [out, blocks, 1]."""
    if scale.numel() == 1:
        scale = scale.reshape(1).repeat(weight.shape[0])
    scale = scale.flatten(1) if scale.ndim == 3 and scale.shape[1] > 1 else scale.flatten()
    return StoredWeight(SCALED_FORMS[weight.dtype], weight, scale, weight.shape)


def multiplied_out(items: Items, keeps: Callable[[StoredWeight], bool]) -> Items:
    for key, tensor in items:
        yield key, tensor.widened() if isinstance(tensor, StoredWeight) and not keeps(tensor) else tensor


def transformed(
    files: CheckpointFiles, items: Items, transform: Callable[[CheckpointFiles, Items], Items],
    keeps: Callable[[StoredWeight], bool],
) -> Items:
    """The tensors after `transform`, which sees all of them multiplied out; what it hands on as it was and is to be
    kept is kept as the file has it."""
    own: dict[str, tuple[Tensor, StoredWeight]] = {}

    def wide() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in items:
            if isinstance(tensor, StoredWeight):
                weight, tensor = tensor, tensor.widened()
                if keeps(weight):
                    own[key] = tensor, weight
            yield key, tensor

    for key, tensor in transform(files, wide()):
        given, weight = own.pop(key, (None, None))
        yield key, weight if tensor is given else tensor
