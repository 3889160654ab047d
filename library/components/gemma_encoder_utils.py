"""Gemma 2 as a text encoder: sizes from shapes, loaded into the class of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.loading import Source, Transform
from library.components.llm_encoder_utils import (
    LanguageModel,
    inspect_language_model,
    language_model_state,
    load_language_model,
)
from library.components.transformers_import import import_transformers_models

if TYPE_CHECKING:
    from transformers import Gemma2Model

_MARK = "layers.0.pre_feedforward_layernorm.weight"
GEMMA2 = LanguageModel(
    title="Gemma 2",
    part="gemma2",
    prefixes=(
        "text_encoders.gemma2_2b.transformer.model.", "text_encoders.gemma2_2b.transformer.",
        "text_encoders.gemma2_2b.", "transformer.model.", "transformer.", "model.",
    ),
    marks=(_MARK,),
    strangers=(),
    head_dim=lambda shapes, given: given.get("head_dim", 256),
    rope_theta=10000.0,
    others={
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    attention="eager",  # the only one that bounds the attention's logits
)  # fmt: skip


def inspect_gemma2(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hyper-parameters by the names of transformers' Gemma2Config plus `rope_theta` and `eps`, from headers."""
    return inspect_language_model(GEMMA2, path, config)


def gemma2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gemma's entries of a checkpoint's state under the names of the module tree; nothing when it is not there."""
    part = language_model_state(GEMMA2, state)
    return part if _MARK in part else {}


def load_gemma2(
    path: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> Gemma2Model:
    """Load Gemma 2 as an encoder from a file, alone or beside other parts, a transformers folder, or tensors in memory;
    an output head is left out.

    `config` overrides the names of `inspect_gemma2`. 8-bit files are widened. CheckpointError when the file does not
    fit.
    """
    import_transformers_models()
    from transformers import Gemma2Config, Gemma2Model

    classes = (Gemma2Config, Gemma2Model)
    model = load_language_model(GEMMA2, classes, path, dtype, device, disable_mmap, config, transform)
    if hasattr(model.embed_tokens, "embed_scale"):  # older versions of transformers keep the factor elsewhere
        model.embed_tokens.embed_scale = torch.tensor(model.config.hidden_size**0.5, device=device)  # is in no file
    return model
