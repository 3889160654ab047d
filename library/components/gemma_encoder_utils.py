"""Gemma 2 as a text encoder: sizes from shapes, loaded into the class of transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.loading import (
    CheckpointFiles,
    Transform,
    assign_state,
    build_on_meta,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    part_of,
    strip_prefix,
)
from library.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import Gemma2Model

GEMMA2_PREFIXES = (
    "text_encoders.gemma2_2b.transformer.model.", "text_encoders.gemma2_2b.transformer.", "text_encoders.gemma2_2b.",
    "transformer.model.", "transformer.", "model.",
)  # fmt: skip
_ROOTS = ("embed_tokens", "layers", "norm")
_MARK = "layers.0.pre_feedforward_layernorm.weight"
NOT_IN_SHAPES: Mapping[str, Any] = {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
"""hyper-parameters of the released model that shapes do not tell, by their names in transformers"""


def inspect_gemma2(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hyper-parameters by the names of transformers' Gemma2Config plus `rope_theta`, from headers."""
    return _open_gemma2(path, config)[2]


def _open_gemma2(
    path: str | os.PathLike, config: Mapping[str, Any] | None
) -> tuple[CheckpointFiles, str, dict[str, Any]]:
    source = open_checkpoint(path, "text_encoder")
    prefix = find_prefix(source.shapes, GEMMA2_PREFIXES, _ROOTS, source.path, "Gemma 2 text encoder")
    shapes = strip_prefix(source.shapes, prefix)
    if _MARK not in shapes or "embed_tokens.weight" not in shapes:
        some = ", ".join(list(source.shapes)[:3]) or "no tensors"
        raise CheckpointError(
            f"{source.path} holds no Gemma 2 text encoder ({_MARK} is not there; it begins with {some})"
        )
    given = {**_folder_config(source.config), **_own_config(source.model_config), **(config or {})}
    return source, prefix, {**NOT_IN_SHAPES, **_inferred(shapes, given, source.path), **given}


def _own_config(model_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a whole file's `model_config` that is about its text encoder; a file of its own has it without a
    level."""
    return model_config.get("gemma2", model_config)


def _folder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    values = {**{name: config.get(name) for name in NOT_IN_SHAPES}, "rope_theta": theta}
    return {name: value for name, value in values.items() if value is not None}


def _inferred(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    head_dim = given.get("head_dim", NOT_IN_SHAPES["head_dim"])
    try:
        vocab, hidden = shapes["embed_tokens.weight"].shape
        queries, keys = (shapes[f"layers.0.self_attn.{name}_proj.weight"].shape[0] for name in "qk")
        intermediate = shapes["layers.0.mlp.gate_proj.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"{path} does not fit Gemma 2: {error.args[0]} is missing") from error
    if queries % head_dim or keys % head_dim:
        raise CheckpointError(
            f"{path}: {queries} rows of queries and {keys} of keys are no multiples of the head size {head_dim};"
            " give head_dim as an argument or under model_config in the file's metadata"
        )
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": count_blocks(shapes, "layers."),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
    }


def gemma2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gemma's entries of a checkpoint's state under the names of the module tree; nothing when it is not there."""
    part = part_of(state, GEMMA2_PREFIXES, _ROOTS)
    return part if _MARK in part else {}


def load_gemma2(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> Gemma2Model:
    """Load Gemma 2 as an encoder from a file, alone or beside other parts, or a transformers folder; an output head is
    left out.

    `config` overrides the names of `inspect_gemma2`. 8-bit files are widened. CheckpointError when the file does not
    fit.
    """
    from transformers import Gemma2Config, Gemma2Model

    source, prefix, values = _open_gemma2(path, config)
    known = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    given = {name: values[name] for name in (*known, *NOT_IN_SHAPES) if name != "rope_theta"}
    model_config = Gemma2Config(
        **given,
        rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
        use_cache=False,
        attn_implementation="eager",  # the only one that bounds the attention's logits
    )
    keys = [key for key in source.shapes if key.startswith(prefix) and key[len(prefix) :].split(".")[0] in _ROOTS]
    state = strip_prefix(source.tensors(device, disable_mmap, keys, transform, source.casting(dtype)), prefix)
    model = build_on_meta(lambda: Gemma2Model(model_config))
    check_state(model, state, source.path)
    assign_state(model, state)
    model.rotary_emb = type(model.rotary_emb)(model_config).to(device)  # its table is in no file, nor is the next one's
    if hasattr(model.embed_tokens, "embed_scale"):  # older versions of transformers keep the factor elsewhere
        model.embed_tokens.embed_scale = torch.tensor(model_config.hidden_size**0.5, device=device)
    return model
