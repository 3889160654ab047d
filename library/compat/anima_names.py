"""Anima by its known calls: loading and saving."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.anima_models import Anima
from library.anima_utils import FILE_PREFIX, load_anima
from library.checkpoints.weight_forms import FP8_SCALED
from library.compat.networks import merging
from library.components import tokenizers
from library.components.llm_encoder_utils import load_qwen3
from library.safetensors_utils import cast_all, save_file_atomic
from networks.lora_anima import TARGETS


def load_anima_model(
    device: str | torch.device, dit_path: str | os.PathLike, attn_mode: str, split_attn: bool,
    loading_device: str | torch.device,
    dit_weight_dtype: torch.dtype | None, fp8_scaled: bool = False,
    lora_weights_list: Sequence[Mapping[str, Tensor]] | None = None,
    lora_multipliers: Sequence[float] | None = None,
) -> Anima:
    """The denoiser on `loading_device`, with adapters merged. `attn_mode` and `split_attn` choose among ways with equal
    results and change nothing; `fp8_scaled` keeps the matrices of the blocks in 8 bits."""
    transform = merging(TARGETS, lora_weights_list, lora_multipliers)
    return load_anima(
        dit_path, dit_weight_dtype, loading_device, transform=transform, form=FP8_SCALED if fp8_scaled else None
    )


def load_qwen3_tokenizer(qwen3_path: str | os.PathLike) -> Any:
    """The tokenizer in a folder, beside the text encoder in its folder, or from the hub for a file."""
    return tokenizers.load_qwen3_tokenizer(None, None, os.fspath(qwen3_path))


def load_qwen3_text_encoder(
    qwen3_path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu",
    lora_weights: Sequence[Mapping[str, Tensor]] | None = None, lora_multipliers: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """(text encoder, its tokenizer)."""
    model = load_qwen3(qwen3_path, dtype, device, transform=merging(TARGETS, lora_weights, lora_multipliers))
    return model, load_qwen3_tokenizer(qwen3_path)


def load_t5_tokenizer(t5_tokenizer_path: str | os.PathLike | None = None) -> Any:
    return tokenizers.load_t5_tokenizer(
        None if t5_tokenizer_path is None else os.fspath(t5_tokenizer_path), option="--t5_tokenizer_path"
    )


def save_anima_model(
    save_path: str | os.PathLike, dit_state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None,
    dtype: torch.dtype | None = None
) -> None:
    """Write the weights of a denoiser under the names of files. What shapes do not tell of a model of other sizes than
    Anima's must stand in `metadata` (library.anima_utils.model_config_metadata)."""
    names = {
        key if key.startswith(FILE_PREFIX) else FILE_PREFIX + key: tensor.detach().cpu()
        for key, tensor in dit_state_dict.items()
    }
    save_file_atomic(cast_all(names, dtype), save_path, {"format": "pt", **(metadata or {})})
