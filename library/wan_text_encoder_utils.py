"""The umT5 encoder of Wan, in the layout of its own files or that of transformers, loaded into the class of
transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.layout_rules import Rule, to_original
from library.checkpoints.loading import (
    CheckpointFiles,
    Transform,
    assign_state,
    build_on_meta,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    size_of,
    strip_prefix,
)
from library.components.transformers_import import import_transformers_models

if TYPE_CHECKING:
    from transformers import UMT5EncoderModel

PREFIXES = (
    "text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "umt5xxl.transformer.", "umt5xxl.", "text_encoder.",
)  # fmt: skip
OWN_PREFIXES = (*PREFIXES, "encoder.", "model.")
ROOTS = ("encoder", "shared")
OWN_ROOTS = ("token_embedding", "blocks", "norm", "pos_embedding")
OWN_MARK = "blocks.0.pos_embedding.embedding.weight"
_ATTENTION, _DENSE = "encoder.block.{}.layer.0.", "encoder.block.{}.layer.1."
_BLOCK = (
    (_ATTENTION + "layer_norm.weight", "norm1.weight"),
    *((f"{_ATTENTION}SelfAttention.{name}.weight", f"attn.{name}.weight") for name in "qkvo"),
    (_ATTENTION + "SelfAttention.relative_attention_bias.weight", "pos_embedding.embedding.weight"),
    (_DENSE + "layer_norm.weight", "norm2.weight"),
    (_DENSE + "DenseReluDense.wi_0.weight", "ffn.gate.0.weight"),
    (_DENSE + "DenseReluDense.wi_1.weight", "ffn.fc1.weight"),
    (_DENSE + "DenseReluDense.wo.weight", "ffn.fc2.weight"),
)
"""(name in transformers, name in a block of the own layout)"""


@dataclass(frozen=True)
class UMT5Info:
    """What the headers of an encoder file tell; `rules`: by which its names become those of transformers; `values`: the
    hyper-parameters of `inspect_umt5`."""

    source: CheckpointFiles
    prefix: str
    rules: tuple[Rule, ...]
    values: dict[str, Any]


def own_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """Every tensor of an encoder in the own layout under its name in transformers; none of another."""
    if OWN_MARK not in keys:
        return
    yield Rule("shared.weight", ("token_embedding.weight",))
    yield Rule("encoder.final_layer_norm.weight", ("norm.weight",))
    for number in range(count_blocks(keys, "blocks.")):
        for theirs, own in _BLOCK:
            yield Rule(theirs.format(number), (f"blocks.{number}.{own}",))


def inspect_umt5(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Hyper-parameters of an umT5 encoder file by the names `d_model, d_kv, d_ff, num_layers, num_heads, vocab_size,
    buckets, max_distance, eps`, from headers. CheckpointError when there is none."""
    return _open(path, config).values


def _open(path: str | os.PathLike, config: Mapping[str, Any] | None) -> UMT5Info:
    source = open_checkpoint(path, "text_encoder")
    is_own = any(key.endswith(OWN_MARK) for key in source.shapes)
    prefixes, roots = (OWN_PREFIXES, OWN_ROOTS) if is_own else (PREFIXES, ROOTS)
    prefix = find_prefix(source.shapes, prefixes, roots, source.path, "umT5 encoder")
    stripped = strip_prefix(source.shapes, prefix)
    rules = tuple(own_rules(stripped))
    shapes = to_original(stripped, rules)
    second = (_ATTENTION + "SelfAttention.relative_attention_bias.weight").format(1)
    query, bias, dense = (name.format(0) for name in (
        _ATTENTION + "SelfAttention.q.weight", _ATTENTION + "SelfAttention.relative_attention_bias.weight",
        _DENSE + "DenseReluDense.wi_0.weight",
    ))  # fmt: skip
    check_marks(
        shapes, (("shared.weight", "encoder.embed_tokens.weight"), query, bias, dense, second), source.path,
        "umT5 encoder (a position bias in every block)",
    )
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, source.path, "UMT5EncoderModel")

    inferred = {
        "d_model": size(embedding, 1),
        "vocab_size": size(embedding, 0),
        "num_heads": size(bias, 1),
        "d_kv": size(query, 0) // size(bias, 1),
        "d_ff": size(dense, 0),
        "num_layers": count_blocks(shapes, "encoder.block."),
        "buckets": size(bias, 0),
        "max_distance": 128,
        "eps": 1e-6,
    }
    names = {"relative_attention_max_distance": "max_distance", "layer_norm_epsilon": "eps"}
    folder = {ours: source.config[theirs] for theirs, ours in names.items() if theirs in source.config}
    return UMT5Info(source, prefix, rules, {**inferred, **folder, **source.config_of("umt5"), **(config or {})})


def load_umt5(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    transform: Transform | None = None,
) -> UMT5EncoderModel:
    """Load the encoder from a file (either layout, any known prefix, pickled too) or a folder; dropout is off.

    `config` overrides the names of `inspect_umt5`. CheckpointError when the file
    does not fit.
    """
    import_transformers_models()
    from transformers import UMT5Config, UMT5EncoderModel

    info = _open(path, config)
    values = info.values
    model_config = UMT5Config(
        vocab_size=values["vocab_size"], d_model=values["d_model"], d_kv=values["d_kv"], d_ff=values["d_ff"],
        num_layers=values["num_layers"], num_heads=values["num_heads"],
        relative_attention_num_buckets=values["buckets"], relative_attention_max_distance=values["max_distance"],
        layer_norm_epsilon=values["eps"], dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        use_cache=False,
    )  # fmt: skip
    keys = [key for key in info.source.shapes if key.startswith(info.prefix)]
    tensors = info.source.tensors(device, disable_mmap, keys, transform, info.source.casting(dtype))
    state = to_original(strip_prefix(tensors, info.prefix), info.rules)
    state = {key: tensor for key, tensor in state.items() if key.startswith(("encoder.", "shared."))}
    embedding = state.pop("encoder.embed_tokens.weight", None)
    state.setdefault("shared.weight", embedding)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model = build_on_meta(lambda: UMT5EncoderModel(model_config))
    check_state(model, state, info.source.path)
    assign_state(model, state)
    model.encoder.embed_tokens.weight = model.shared.weight  # one parameter under two names
    return model
