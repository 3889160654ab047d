"""Random weights of a sensible size for whole modules and for text encoders in the layout of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.loading import prefixed  # noqa: F401 - what files of tiny models are put together with
from library.safetensors_utils import save_file_atomic


def save_part(state: dict[str, Tensor], path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write one model file; `config` holds what its shapes do not tell and becomes the metadata entry
    `model_config`."""
    tensors = {
        key: tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor for key, tensor in state.items()
    }
    save_file_atomic(tensors, path, {"model_config": json.dumps(config, sort_keys=True)} if config else None)


def random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Non-zero weights of a sensible size for every key of a module."""
    return {key: random_weight(key, tensor.shape, generator) for key, tensor in model.state_dict().items()}


def random_weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Matrices keep the variance of their input; scales of norms (weights of one axis) are near 1, biases near 0."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / torch.Size(shape[1:]).numel() ** 0.5
    return 1 + 0.1 * values if key.endswith((".scale", ".weight")) else 0.05 * values


def clip_state(
    generator: torch.Generator, *, width: int, layers: int, vocab: int, max_len: int = 77
) -> dict[str, Tensor]:
    """Weights of a CLIP-L text encoder in the layout of its single file."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (vocab, width),
        "text_model.embeddings.position_embedding.weight": (max_len, width),
    }
    for number in range(layers):
        place = f"text_model.encoder.layers.{number}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"{place}self_attn.{name}.weight": (width, width), f"{place}self_attn.{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{place}{name}.weight": (width,), f"{place}{name}.bias": (width,)}
        shapes |= {f"{place}mlp.fc1.weight": (4 * width, width), f"{place}mlp.fc1.bias": (4 * width,)}
        shapes |= {f"{place}mlp.fc2.weight": (width, 4 * width), f"{place}mlp.fc2.bias": (width,)}
    shapes |= {"text_model.final_layer_norm.weight": (width,), "text_model.final_layer_norm.bias": (width,)}
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}


def t5_state(
    generator: torch.Generator, *, d_model: int, d_kv: int, heads: int, d_ff: int, layers: int, vocab: int,
    buckets: int = 32
) -> dict[str, Tensor]:
    """Weights of a T5 v1.1 encoder in the layout of its single file."""
    inner = d_kv * heads
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (vocab, d_model)}
    for number in range(layers):
        place = f"encoder.block.{number}.layer."
        for name in "qkv":
            shapes[f"{place}0.SelfAttention.{name}.weight"] = (inner, d_model)
        shapes[f"{place}0.SelfAttention.o.weight"] = (d_model, inner)
        if number == 0:
            shapes[f"{place}0.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        shapes[f"{place}0.layer_norm.weight"] = (d_model,)
        shapes[f"{place}1.DenseReluDense.wi_0.weight"] = (d_ff, d_model)
        shapes[f"{place}1.DenseReluDense.wi_1.weight"] = (d_ff, d_model)
        shapes[f"{place}1.DenseReluDense.wo.weight"] = (d_model, d_ff)
        shapes[f"{place}1.layer_norm.weight"] = (d_model,)
    shapes["encoder.final_layer_norm.weight"] = (d_model,)
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}


def language_model_state(
    generator: torch.Generator, *, vocab: int, width: int, key_width: int, hidden: int, layers: int, has_biases: bool
) -> dict[str, Tensor]:
    """Weights of a language model with gated feed-forwards in the layout of its single file; `key_width`: of its keys
    and values, `has_biases`: of queries, keys and values."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for number in range(layers):
        place = f"model.layers.{number}."
        shapes |= {f"{place}self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{place}self_attn.{name}_proj.weight": (key_width, width) for name in "kv"}
        if has_biases:
            shapes |= {f"{place}self_attn.q_proj.bias": (width,)}
            shapes |= {f"{place}self_attn.{name}_proj.bias": (key_width,) for name in "kv"}
        shapes |= {f"{place}mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{place}mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{place}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    return {key: random_weight(key, shape, generator) for key, shape in shapes.items()}
