"""The image encoder of SigLIP: reading it, and making of pictures of any size what it takes."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from library.checkpoints.loading import (
    CheckpointFiles,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    count_blocks,
    open_checkpoint,
    size_of,
    strip_prefix,
)
from library.components.siglip_models import SiglipImageEncoder, SiglipParams
from library.core.errors import CheckpointError

logger = logging.getLogger(__name__)

SUBFOLDER = "image_encoder"
PREFIX = "vision_model."
ROOTS = ("embeddings", "encoder", "post_layernorm")
_HEAD_SIZE = 72
"""of so400m, which shapes do not tell"""
_RELEASED_SIZES = {(14, 729): 384}
"""(pixels of a patch, positions) -> pixels of a picture, where they are more than whole patches cover"""


def inspect_siglip(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> SiglipParams:
    """Recognise the image encoder in a file or folder from headers alone; `config` overrides hyper-parameters by the
    names of SiglipParams. CheckpointError when it is something else."""
    return _open(path, config)[2]


def _open(path: str | os.PathLike, config: Mapping[str, Any] | None) -> tuple[CheckpointFiles, str, SiglipParams]:
    """Files, what stands before the names in them (files of transformers 5 have nothing there), hyper-parameters."""
    source = open_checkpoint(path, SUBFOLDER)
    prefix = next((key[: key.index(PREFIX) + len(PREFIX)] for key in source.shapes if PREFIX in key), "")
    shapes = strip_prefix(source.shapes, prefix)
    patches, positions = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    marks = (patches, positions, "encoder.layers.0.mlp.fc1.weight", "post_layernorm.weight")
    check_marks(shapes, marks, source.path, "SigLIP image encoder")
    if "embeddings.class_embedding" in shapes:
        raise CheckpointError(f"{source.path} is a CLIP image encoder; a SigLIP image encoder is needed")

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, source.path, "SiglipImageEncoder")

    hidden, patch, positions = size(patches, 0), size(patches, 2), size(positions, 0)
    inferred = {
        "hidden_size": hidden,
        "num_attention_heads": max(hidden // _HEAD_SIZE, 1),
        "num_hidden_layers": count_blocks(shapes, "encoder.layers."),
        "intermediate_size": size("encoder.layers.0.mlp.fc1.weight", 0),
        "patch_size": patch,
        "positions": positions,
        "image_size": _RELEASED_SIZES.get((patch, positions), math.isqrt(positions) * patch),
    }
    of_folder = source.config.get("vision_config", source.config)
    given = {name: of_folder[name] for name in ("num_attention_heads", "image_size") if name in of_folder}
    params = build_params(
        SiglipParams, inferred, {**given, **source.config_of(SUBFOLDER), **(config or {})}, source.path
    )
    return source, prefix, params


def load_siglip(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> SiglipImageEncoder:
    """Load the image encoder from a file, a folder, or the folder `image_encoder` of a pipeline. CheckpointError when
    it does not fit."""
    source, prefix, params = _open(path, config)
    logger.info("loading the SigLIP image encoder from %s", path)
    keys = [key for key in source.shapes if key.startswith(prefix) and key[len(prefix) :].split(".")[0] in ROOTS]
    state = strip_prefix(source.tensors(device, disable_mmap, keys, cast=source.casting(dtype)), prefix)
    state.pop("embeddings.position_ids", None)  # old files have a table of them
    model = build_on_meta(lambda: SiglipImageEncoder(params))
    check_state(model, state, source.path)
    assign_state(model, state)
    return model


def resized_pictures(pictures: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 as [B, 3, size, size]: in 256 steps and bicubic, as the encoder was trained."""
    bytes_ = ((pictures.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    rows = [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(size, size, 3)
        for picture in (
            Image.fromarray(one.numpy()).resize((size, size), Image.Resampling.BICUBIC) for one in bytes_.contiguous()
        )
    ]
    return torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, size, size]


@torch.no_grad()
def encode_pictures(model: SiglipImageEncoder, pictures: Tensor) -> Tensor:
    """States [B, L, hidden] of pictures [B, 3, H, W] in -1..1, of any size. On a CPU one at a time, so that a picture's
    states do not depend on its company."""
    resized = resized_pictures(pictures, model.params.image_size).to(model.device)
    parts = resized.split(1) if model.device.type == "cpu" else [resized]
    return torch.cat([model(part) for part in parts])
