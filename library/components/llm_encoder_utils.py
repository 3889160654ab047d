"""Language models as text encoders (Qwen3, the text tower of Qwen2.5-VL, LLaMA; Gemma 2 stands on this): sizes from
shapes, loaded into the classes of transformers; states of texts of different lengths."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
    Transform,
    assign_state,
    build_on_meta,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    part_of,
    strip_prefix,
)
from library.components.transformers_import import import_transformers_models
from library.core.errors import CheckpointError
from library.device_utils import to_device

if TYPE_CHECKING:
    from transformers import LlamaModel, Qwen2Model, Qwen3Model

_ROOTS = ("embed_tokens", "layers", "norm")
_FIRST = "layers.0.self_attn."


@dataclass(frozen=True)
class LanguageModel:
    """A kind of language model. `part`: its entry in the `model_config` of a file of several parts; `marks`: names that
    its files have; `strangers`: names that they do not have; `head_dim`: the size of an attention head, of the shapes
    without prefix and of what is given beside them; `others`: more hyper-parameters that shapes do not tell, by their
    names in transformers, as released; `attention`: what computes it."""

    title: str
    part: str
    prefixes: tuple[str, ...]
    marks: tuple[str, ...]
    strangers: tuple[str, ...]
    head_dim: Callable[[Mapping[str, Tensor], Mapping[str, Any]], int]
    rope_theta: float = 1e6
    eps: float = 1e-6
    others: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"


def _head_of_128(shapes: Mapping[str, Tensor], given: Mapping[str, Any]) -> int:
    """128 in every released model; other ones say how many heads they have."""
    heads = given.get("num_attention_heads")
    return shapes[f"{_FIRST}q_proj.weight"].shape[0] // heads if isinstance(heads, int) and heads > 0 else 128


QWEN3_PREFIXES = (
    "text_encoders.qwen3_06b.transformer.model.", "text_encoders.qwen3_06b.model.", "text_encoders.qwen3_06b.",
    "transformer.model.", "transformer.", "model.",
)  # fmt: skip
QWEN3 = LanguageModel(
    title="Qwen3",
    part="qwen3",
    prefixes=QWEN3_PREFIXES,
    marks=(f"{_FIRST}q_norm.weight",),
    strangers=(f"{_FIRST}q_proj.bias",),
    head_dim=lambda shapes, given: shapes[f"{_FIRST}q_norm.weight"].shape[0],
)
QWEN25_VL = LanguageModel(
    title="Qwen2.5-VL",
    part="qwen25_vl",
    prefixes=(
        "text_encoders.qwen25_7b.transformer.model.", "text_encoders.qwen25_7b.model.", "text_encoders.qwen25_7b.",
        "model.language_model.", "language_model.model.", "language_model.", "transformer.model.", "transformer.",
        "model.",
    ),
    marks=(f"{_FIRST}q_proj.bias",),
    strangers=(f"{_FIRST}q_norm.weight",),
    head_dim=_head_of_128,
)  # fmt: skip
LLAMA = LanguageModel(
    title="LLaMA",
    part="llama",
    prefixes=(
        "text_encoders.llama.transformer.model.", "text_encoders.llama.model.", "text_encoders.llama.",
        "model.language_model.", "language_model.model.", "language_model.", "transformer.model.", "transformer.",
        "model.",
    ),
    marks=(f"{_FIRST}q_proj.weight", "layers.0.post_attention_layernorm.weight"),
    strangers=(f"{_FIRST}q_proj.bias", f"{_FIRST}q_norm.weight", "layers.0.pre_feedforward_layernorm.weight"),
    head_dim=_head_of_128,
    rope_theta=5e5,
    eps=1e-5,
)  # fmt: skip


def inspect_language_model(
    kind: LanguageModel, path: str | os.PathLike, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Hyper-parameters by the names of transformers' configurations plus `rope_theta` and `eps`, from headers."""
    return _open(kind, path, config)[2]


def inspect_qwen3(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Those of a Qwen3 text encoder."""
    return inspect_language_model(QWEN3, path, config)


def inspect_qwen25_vl(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Those of the text tower of Qwen2.5-VL."""
    return inspect_language_model(QWEN25_VL, path, config)


def _open(
    kind: LanguageModel, path: Source, config: Mapping[str, Any] | None
) -> tuple[CheckpointFiles, str, dict[str, Any]]:
    source = open_checkpoint(path, "text_encoder")
    prefix = find_prefix(source.shapes, kind.prefixes, _ROOTS, source.path, f"{kind.title} text encoder")
    shapes = strip_prefix(source.shapes, prefix)
    check_marks(shapes, ("embed_tokens.weight", *kind.marks), source.path, f"{kind.title} text encoder")
    strange = [name for name in kind.strangers if name in shapes]
    if strange:
        raise CheckpointError(
            f"{source.path} holds no {kind.title} text encoder (it has {', '.join(strange)}, which that has not)"
        )
    given = {**_folder_config(kind, source.config), **source.config_of(kind.part), **(config or {})}
    try:
        inferred = _sizes(kind, shapes, given)
    except KeyError as error:
        raise CheckpointError(f"{source.path} does not fit {kind.title}: {error.args[0]} is missing") from error
    except ValueError as error:
        raise CheckpointError(
            f"{source.path}: {error}; give head_dim as an argument or under model_config in the file's metadata"
        ) from error
    return source, prefix, {**kind.others, **inferred, **given}


def _sizes(kind: LanguageModel, shapes: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    queries, keys = (shapes[f"{_FIRST}{name}_proj.weight"].shape[0] for name in "qk")
    head_dim = kind.head_dim(shapes, given)
    if queries % head_dim or keys % head_dim:
        raise ValueError(f"{queries} rows of queries and {keys} of keys are no multiples of the head size {head_dim}")
    vocab, hidden = shapes["embed_tokens.weight"].shape
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": count_blocks(shapes, "layers."),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "rope_theta": kind.rope_theta,
        "eps": kind.eps,
    }


def _folder_config(kind: LanguageModel, config: Mapping[str, Any]) -> dict[str, Any]:
    config = {**config, **(config.get("text_config") or {})}  # of models that see pictures, the text tower stands below
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    others = {name: config.get(name) for name in kind.others}
    heads = config.get("num_attention_heads")
    values = {**others, "num_attention_heads": heads, "rope_theta": theta, "eps": config.get("rms_norm_eps")}
    return {name: value for name, value in values.items() if value is not None}


def inspect_llama(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Those of a LLaMA 3 language model, alone or as the language part of one that sees pictures."""
    return inspect_language_model(LLAMA, path, config)


def qwen3_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Qwen3's entries of a checkpoint's state under the names of the module tree."""
    return language_model_state(QWEN3, state)


def language_model_state(kind: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of any kind, without a look at what is there."""
    return part_of(state, kind.prefixes, _ROOTS)


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
    import_transformers_models()
    from transformers import Qwen3Config, Qwen3Model

    return load_language_model(QWEN3, (Qwen3Config, Qwen3Model), path, dtype, device, disable_mmap, config, transform)


def load_qwen25_vl(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> Qwen2Model:
    """Load the text tower of Qwen2.5-VL; what sees pictures and the output head are left out.

    For text its positions in three sections are those of Qwen2. As `load_qwen3` otherwise; the size of a head is 128,
    or follows from `num_attention_heads` in `config`.
    """
    import_transformers_models()
    from transformers import Qwen2Config, Qwen2Model

    classes = (Qwen2Config, Qwen2Model)
    return load_language_model(QWEN25_VL, classes, path, dtype, device, disable_mmap, config, transform)


def load_llama(
    path: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    transform: Transform | None = None,
) -> LlamaModel:
    """Load LLaMA 3 as an encoder, also the language part of a model that sees pictures (LLaVA); what sees pictures, the
    output head and a tokenizer inside of the file are left out. As `load_qwen25_vl` otherwise."""
    import_transformers_models()
    from transformers import LlamaConfig, LlamaModel

    return load_language_model(LLAMA, (LlamaConfig, LlamaModel), path, dtype, device, disable_mmap, config, transform)


def load_language_model(
    kind: LanguageModel,
    classes: tuple[Any, Any],
    path: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool,
    config: Mapping[str, Any] | None,
    transform: Transform | None,
) -> Any:
    """The model of `classes`, which are those of transformers: (configuration, model)."""
    source, prefix, values = _open(kind, path, config)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        *(name for name in kind.others if name != "head_dim"),
    )  # fmt: skip
    config_class, model_class = classes
    model_config = config_class(
        **{name: values[name] for name in names},
        rms_norm_eps=values["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation=kind.attention,
    )
    keys = [key for key in source.shapes if key.startswith(prefix) and key[len(prefix) :].split(".")[0] in _ROOTS]
    state = strip_prefix(source.tensors(device, disable_mmap, keys, transform, source.casting(dtype)), prefix)
    model = build_on_meta(lambda: model_class(model_config))
    check_state(model, state, source.path)
    assign_state(model, state)
    model.rotary_emb = type(model.rotary_emb)(model_config).to(device)  # its table is in no file
    return model


def states_of(ids: Tensor, mask: Tensor, model: Any, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """States [B, L, D] of ids [B, L], 0 where the mask is; rows with the same number of tokens go through `encode`
    together, without padding. On a CPU one goes after the other: there products round differently with the number of rows,
    and a cache is to hold what the step makes."""
    first = next(model.parameters())
    lengths, width = mask.sum(dim=1).tolist(), model.get_input_embeddings().weight.shape[1]
    states = torch.zeros(*ids.shape, width, device=first.device, dtype=model.get_input_embeddings().weight.dtype)
    ids = to_device(ids, first.device)
    for length in sorted(set(lengths) - {0}):
        rows = [row for row, number in enumerate(lengths) if number == length]
        together = [[row] for row in rows] if first.device.type == "cpu" else [rows]
        for group in together:
            places = to_device(torch.tensor(group), first.device)
            states[places, :length] = encode(ids[places, :length]).to(states.dtype)
    return states
