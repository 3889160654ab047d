"""Metadata of adapter files that tools make of others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

KEPT = ("ss_v2", "ss_base_model_version")
"""keys that the first file which has them gives"""


def minimum_metadata(
    sources: Sequence[Mapping[str, str]], module: str, dims: Iterable[float], alphas: Iterable[float],
    network_args: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What readers need of an adapter file: base model, network module, rank and alpha ("Dynamic" when layers
    differ)."""
    texts = {key: source[key] for key in KEPT for source in reversed(sources) if key in source}
    texts["ss_network_module"] = module
    texts["ss_network_dim"] = one_or_dynamic(dims)
    texts["ss_network_alpha"] = one_or_dynamic(alphas)
    if network_args:
        texts["ss_network_args"] = json.dumps(dict(network_args), sort_keys=True)
    return texts


def one_or_dynamic(values: Iterable[float]) -> str:
    """The number that all values are, else "Dynamic"."""
    numbers = {f"{value:g}" for value in values}
    return numbers.pop() if len(numbers) == 1 else "Dynamic"


def ranks_and_alphas(tensors: Mapping[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Ranks and alphas of the LoRA layers of a file."""
    downs = {
        key.removesuffix(".lora_down.weight"): tensor
        for key, tensor in tensors.items()
        if key.endswith(".lora_down.weight")
    }
    ranks = [float(down.shape[0]) for down in downs.values()]
    alphas = [float(tensors.get(f"{name}.alpha", torch.tensor(float(down.shape[0])))) for name, down in downs.items()]
    return ranks, alphas


def title_of(path: str, metadata: Mapping[str, str]) -> str:
    """The title of a file: that of its metadata, else its stem."""
    return metadata.get("modelspec.title") or Path(path).stem


def merged_model_spec(sources: Sequence[tuple[str, Mapping[str, str]]], save_to: str) -> dict[str, str]:
    """modelspec.* of a file made of others: those of the first that has them, title and merged_from renewed."""
    first = next((metadata for _, metadata in sources if "modelspec.architecture" in metadata), {})
    spec = {key: value for key, value in first.items() if key.startswith("modelspec.")}
    for stale in ("modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail"):
        spec.pop(stale, None)
    spec["modelspec.title"] = Path(save_to).stem
    spec["modelspec.merged_from"] = ", ".join(title_of(path, metadata) for path, metadata in sources)
    return spec
