"""The strength of adapters that PEFT and diffusers wrote: their files hold no alpha, a configuration does.

diffusers keeps it in the metadata of the file (`lora_adapter_metadata`, keys with the model in front:
`unet.lora_alpha`), PEFT in `adapter_config.json` beside `adapter_model.safetensors`. Without either, alpha is the rank.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.core.errors import CheckpointError
from library.core.text_files import parse_json, read_text

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
_MODEL_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPER = "base_model.model."
_DOWN = re.compile(r"(?P<name>.+)\.lora_A(\.default)?\.weight")
_FIELDS = ("lora_alpha", "alpha_pattern", "use_rslora")


def configs_of(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Model (`unet`, `text_encoder`, ...; "" for all of the file) -> its configuration; empty when there is none."""
    configs: dict[str, dict[str, Any]] = {}
    if METADATA_KEY in metadata:
        for key, value in _parsed(metadata[METADATA_KEY], f"{METADATA_KEY} in the metadata of {path}").items():
            model, _, name = key.rpartition(".")
            if name in _FIELDS:
                configs.setdefault(model, {})[name] = value
    beside = Path(path).with_name(CONFIG_FILE)
    if not configs and Path(path).name in _MODEL_NAMES and beside.is_file():
        configs[""] = _parsed(read_text(beside, error=CheckpointError), str(beside))
    return configs


def with_alphas(
    tensors: Mapping[str, torch.Tensor], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """The tensors and `<module>.alpha` for every LoRA that a configuration speaks of and that has none.

    PEFT's scale is lora_alpha / rank, with use_rslora lora_alpha / sqrt(rank) (arXiv 2312.03732); alpha here is such
    that alpha / rank is that scale.
    """
    result = dict(tensors)
    for key, down in tensors.items():
        match = _DOWN.fullmatch(key)
        if match is None or f"{match['name']}.alpha" in tensors:
            continue
        model, _, path = match["name"].partition(".")
        config = configs.get(model, configs.get(""))
        if config is None:
            continue
        alpha = _alpha(config, path if model in configs else match["name"].removeprefix(_WRAPPER))
        if alpha is not None:
            rank = down.shape[0]
            result[f"{match['name']}.alpha"] = torch.tensor(
                alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
            )
    return result


def _alpha(config: Mapping[str, Any], path: str) -> float | None:
    """A pattern is the end of a path, or a regular expression for it."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return None if config.get("lora_alpha") is None else float(config["lora_alpha"])


def _parsed(text: str, label: str) -> dict[str, Any]:
    value = parse_json(text, label, CheckpointError, hint="; the strength of the adapter stands there")
    if not isinstance(value, dict):
        raise CheckpointError(f"{label} is no JSON object; the strength of the adapter stands there")
    return value
