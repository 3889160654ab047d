"""The layers of an adapter file under the names that the file has, so that a tool can write them back as they were."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from library.core.errors import CheckpointError
from library.core.text_files import parse_json
from networks.files.lora_conversion import named_parameter, refuse_unknown
from networks.files.peft_config import METADATA_KEY
from networks.kinds.registry import check_layers

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
PEFT_DOWN = ("lora_A.weight", "lora_A.default.weight")
PEFT_MODELS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class FileLayer:
    """One layer: `tensors` under kohya names, `keys` those that they have in the file."""

    name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def is_peft(self) -> bool:
        """Whether readers of this naming take the scale from the rank alone: PEFT's matrices without an alpha."""
        return ALPHA not in self.keys and self.keys.get(DOWN, "").endswith(PEFT_DOWN)

    def key_of(self, parameter: str, plain_names: bool = True) -> str:
        """The key under which a parameter is written: its own, else one in the manner of the file."""
        if parameter in self.keys:
            return self.keys[parameter]
        return f"{self.name}.{parameter if plain_names else _foreign(parameter)}"


def _foreign(parameter: str) -> str:
    return {DOWN: "lora_A.weight", UP: "lora_B.weight"}.get(parameter, parameter)


def file_layers(
    tensors: Mapping[str, torch.Tensor], label: str
) -> tuple[dict[str, FileLayer], dict[str, torch.Tensor]]:
    """(layers by the names of the file, what may stand beside them). CheckpointError for layers of no known kind, or
    that are not complete and sound, and for tensors that belong to none."""
    layers: dict[str, FileLayer] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        found = named_parameter(key, tensors)
        if found is None:
            others[key] = tensor
            continue
        layer = layers.setdefault(found[0], FileLayer(found[0]))
        layer.tensors[found[1]], layer.keys[found[1]] = tensor, key
    check_layers({name: layer.tensors for name, layer in layers.items()}, label)
    refuse_unknown(others, label)
    return layers, others


def peft_settings(ranks: Mapping[str, int], old: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry `lora_adapter_metadata` of diffusers for modules of these ranks (names as in the file) whose scale is
    1: alpha is the rank everywhere. Other fields of an old entry stay."""
    settings: dict[str, Any] = {}
    for model, own in _by_model(ranks):
        prefix = f"{model}." if model else ""
        usual = Counter(own.values()).most_common(1)[0][0]
        unusual = {name: rank for name, rank in own.items() if rank != usual}
        kept = {key.removeprefix(prefix): value for key, value in (old or {}).items() if key.startswith(prefix)}
        values = {
            **kept, "r": usual, "lora_alpha": usual, "rank_pattern": unusual, "alpha_pattern": unusual,
            "use_rslora": False,
            "target_modules": sorted(own),
        }  # fmt: skip
        settings.update({f"{prefix}{key}": value for key, value in values.items()})
    return settings


def _by_model(ranks: Mapping[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    models: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        model, _, path = name.partition(".")
        known = model in PEFT_MODELS
        models.setdefault(model if known else "", {})[path if known else name] = rank
    yield from models.items()


def with_peft_settings(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, str]:
    """The metadata of a file in PEFT's naming after its ranks changed. Without an old entry, and with one rank, none is
    needed."""
    result = dict(metadata)
    old = (
        parse_json(result.pop(METADATA_KEY), f"{METADATA_KEY} in the metadata", CheckpointError)
        if METADATA_KEY in result
        else None
    )
    if ranks and (old is not None or len(set(ranks.values())) > 1):
        result[METADATA_KEY] = json.dumps(peft_settings(ranks, old), sort_keys=True)
    return result
