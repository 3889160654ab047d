"""Chroma checkpoints: what a file holds, loading and saving it. Layouts and types are those of FLUX.1."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.flux_convert import APPROXIMATOR, rows_of, rules_of
from library.checkpoints.layout_rules import DenoiserLayouts, PipelineLayout
from library.checkpoints.loading import Transform, count_blocks, size_of
from library.chroma_models import Chroma, ChromaParams
from library.core.errors import CheckpointError
from library.flux_folder_utils import T5_PART, VAE_PART, scheduler_config, stream_config
from library.flux_utils import (
    StreamKind,
    StreamModelInfo,
    infer_streams,
    inspect_stream_model,
    load_stream_model,
    refuse_unknown_streams,
    save_stream_model,
)


def _refuse_other_models(shapes: Mapping[str, Tensor], path: str) -> None:
    refuse_unknown_streams(shapes, path, "Chroma")
    if not any(key.startswith(APPROXIMATOR) for key in shapes):
        raise CheckpointError(
            f"{path} is a FLUX.1 model ({APPROXIMATOR}* is not there); leave --model_type out, or give a Chroma file"
        )


def _infer_chroma(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    hidden, width = (size_of(shapes, f"{APPROXIMATOR}in_proj.weight", dim, path, "Chroma") for dim in (0, 1))
    return {
        **infer_streams(shapes, given, path, "Chroma"),
        "approximator_in_dim": width,
        "approximator_hidden_size": hidden,
        "approximator_depth": count_blocks(shapes, f"{APPROXIMATOR}layers."),
    }


CHROMA = StreamKind("Chroma", Chroma, ChromaParams, _refuse_other_models, _infer_chroma)


def inspect_chroma(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> StreamModelInfo:
    """Recognise a Chroma denoiser from headers alone; `config` overrides hyper-parameters by the names of ChromaParams.
    CheckpointError when the file is damaged or something else."""
    return inspect_stream_model(path, config, CHROMA)


def _config_of_diffusers(params: ChromaParams) -> dict[str, Any]:
    """config.json of the transformer in a diffusers folder. CheckpointError for what its class does not have."""
    return {
        "_class_name": "ChromaTransformer2DModel", **stream_config(params),
        "approximator_num_channels": params.approximator_in_dim,
        "approximator_hidden_dim": params.approximator_hidden_size, "approximator_layers": params.approximator_depth,
    }  # fmt: skip


LAYOUTS = DenoiserLayouts(
    inspect_chroma, rules_of, _config_of_diffusers, rows_of=lambda params: rows_of(params.hidden_size),
    pipeline=PipelineLayout(
        "ChromaPipeline", "ChromaTransformer2DModel", lambda params: scheduler_config(is_shifted=True),
        (VAE_PART, dataclasses.replace(
            T5_PART, folder="text_encoder", tokenizer=dataclasses.replace(T5_PART.tokenizer, folder="tokenizer"),
        )),
        {"image_encoder": [None, None], "feature_extractor": [None, None]},
    ),
)  # fmt: skip


def load_chroma(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
    form: str | None = None,
) -> Chroma:
    """Load a Chroma denoiser: single file in either layout, one of a split set, or a diffusers folder.

    `dtype` float8_e4m3fn keeps the weights of linear layers in 8 bits and the rest in bfloat16; None keeps the file's
    own types; `form`, one of weight_forms.FORMS, stores those of the blocks in fewer bits. `config` overrides
    hyper-parameters; `transform` may change the tensors as they are read. CheckpointError when the file does not
    fit.
    """
    return load_stream_model(
        inspect_chroma(path, config), CHROMA, CHROMA.title, path, dtype, device, disable_mmap, transform, form
    )


def save_chroma(
    model: Chroma, path: str | os.PathLike, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_stream_model(model, CHROMA, path, dtype, metadata)
