"""Language models as text encoders (Qwen3): sizes from shapes, loaded into the classes of transformers."""

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
    from transformers import Qwen3Model

QWEN3_PREFIXES = (
    "text_encoders.qwen3_06b.transformer.model.", "text_encoders.qwen3_06b.model.", "text_encoders.qwen3_06b.",
    "transformer.model.", "transformer.", "model.",
)  # fmt: skip
_ROOTS = ("embed_tokens", "layers", "norm")


def inspect_qwen3(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hyper-parameters by the names of transformers' Qwen3Config plus `rope_theta` and `eps`, from headers."""
    return _open_qwen3(path, config)[2]


def _open_qwen3(
    path: str | os.PathLike, config: Mapping[str, Any] | None
) -> tuple[CheckpointFiles, str, dict[str, Any]]:
    source = open_checkpoint(path, "text_encoder")
    prefix = find_prefix(source.shapes, QWEN3_PREFIXES, _ROOTS, source.path, "Qwen3 text encoder")
    shapes = strip_prefix(source.shapes, prefix)
    first = "layers.0.self_attn."
    if "embed_tokens.weight" not in shapes or f"{first}q_norm.weight" not in shapes or f"{first}q_proj.bias" in shapes:
        some = ", ".join(list(source.shapes)[:3]) or "no tensors"
        raise CheckpointError(
            f"{source.path} holds no Qwen3 text encoder (layers.*.self_attn.q_norm is not there; it begins with {some})"
        )
    try:
        head_dim = shapes[f"{first}q_norm.weight"].shape[0]
        vocab, hidden = shapes["embed_tokens.weight"].shape
        inferred = {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"].shape[0],
            "num_hidden_layers": count_blocks(shapes, "layers."),
            "num_attention_heads": shapes[f"{first}q_proj.weight"].shape[0] // head_dim,
            "num_key_value_heads": shapes[f"{first}k_proj.weight"].shape[0] // head_dim,
            "head_dim": head_dim,
            "rope_theta": 1e6,
            "eps": 1e-6,
        }
    except KeyError as error:
        raise CheckpointError(f"{source.path} does not fit Qwen3: {error.args[0]} is missing") from error
    return source, prefix, {**inferred, **_folder_config(source.config), **source.model_config, **(config or {})}


def _folder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    values = {"rope_theta": theta, "eps": config.get("rms_norm_eps")}
    return {name: value for name, value in values.items() if value is not None}


def qwen3_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Qwen3's entries of a checkpoint's state under the names of the module tree."""
    return part_of(state, QWEN3_PREFIXES, _ROOTS)


def load_qwen3(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> Qwen3Model:
    """Load Qwen3 as an encoder from a file (any known prefix) or a transformers folder; the output head is left out.

    `config` overrides the names of `inspect_qwen3`. 8-bit files are widened. CheckpointError when the file does not
    fit.
    """
    from transformers import Qwen3Config, Qwen3Model

    source, prefix, values = _open_qwen3(path, config)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )  # fmt: skip
    model_config = Qwen3Config(
        **{name: values[name] for name in names},
        rms_norm_eps=values["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    keys = [key for key in source.shapes if key.startswith(prefix) and key[len(prefix) :].split(".")[0] in _ROOTS]
    state = strip_prefix(source.tensors(device, disable_mmap, keys, transform, source.casting(dtype)), prefix)
    model = build_on_meta(lambda: Qwen3Model(model_config))
    check_state(model, state, source.path)
    assign_state(model, state)
    model.rotary_emb = type(model.rotary_emb)(model_config).to(device)  # its table is in no file
    return model
