"""Whole models of Stable Diffusion as files and folders, for the calls of both of its families."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch


def is_safetensors(path: str) -> bool:
    return os.path.splitext(path)[1].lower() == ".safetensors"


def join_metadata(metadata: Mapping[str, str] | None, epochs: int, steps: int) -> dict[str, str]:
    """Metadata of a whole model that was trained for so many epochs and steps."""
    return {**(metadata or {}), "epoch": str(epochs), "global_step": str(steps)}


def write_diffusers_folder(
    kind: str, output_dir: str, save: Callable[..., None], unet: Any, vae: Any, encoders: Mapping[str, Any],
    dtype: torch.dtype | None = None
) -> None:
    """A folder in the layout of diffusers, by way of one file that `save(path, metadata=...)` writes beside it.
    `encoders`: name of the slot -> text encoder."""
    from library.components.ldm_folder_files import hyper_parameters, read_single, tokenizer_of, write_folder

    parent = os.path.dirname(os.path.abspath(output_dir))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=parent) as folder:
        file = os.path.join(folder, "model.safetensors")
        told = hyper_parameters(unet.params, vae.params, {name: _values(model) for name, model in encoders.items()})
        save(file, metadata={"model_config": json.dumps(told)})
        content = dataclasses.replace(read_single(file, kind, None), rest={}, metadata={})
        write_folder(content, tokenizer_of(None, None), output_dir, dtype, None)


def _values(encoder: Any) -> dict[str, Any]:
    """What ClipInfo.values has that shapes do not tell."""
    config = encoder.config
    return {
        "heads": config.num_attention_heads, "act": config.hidden_act, "eos": config.eos_token_id,
        "layers": config.num_hidden_layers,
    }
