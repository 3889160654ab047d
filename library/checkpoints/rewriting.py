"""A checkpoint file written again with some of its tensors replaced: what a fine-tune of one part of a model is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from library.checkpoints.loading import CheckpointFiles
from library.checkpoints.scaled_weights import is_blob, unscaled
from library.safetensors_utils import stream_file_atomic


def holds_all(source: CheckpointFiles, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file has tensors of all these names, with as many numbers."""
    return all(key in source.shapes and source.shapes[key].numel() == tensor.numel() for key, tensor in tensors.items())


def write_replaced(
    source: CheckpointFiles, tensors: Mapping[str, Tensor], path: str | os.PathLike, dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """The file of `source` with `tensors` in the place of its own of these names, which have as many numbers (a matrix
    may be a convolution of one pixel there). The others are copied one by one.

    Floating-point tensors become `dtype`; with None replaced ones keep the type that they have, others that of the file
    (scaled 8-bit weights are multiplied out). What the file says of its hyper-parameters is kept.
    """
    keys = [key for key in source.shapes if not is_blob(key)]

    def kind(key: str) -> torch.dtype:
        own = tensors[key].dtype if key in tensors else source.dtype_of(key)
        return dtype if dtype is not None and own.is_floating_point else own

    def items() -> Iterator[tuple[str, Tensor]]:
        for key, tensor in unscaled(source, source.stream("cpu", True, [key for key in keys if key not in tensors])):
            yield key, tensor
        for key in keys:
            if key in tensors:
                yield key, tensors[key].detach().reshape(source.shapes[key].shape)

    infos = {key: (kind(key), tuple(source.shapes[key].shape)) for key in keys}
    config = {"model_config": json.dumps(source.model_config, sort_keys=True)} if source.model_config else {}
    stream_file_atomic(infos, items(), path, {**metadata, **config})
