"""Metadata of a safetensors file that is there: taken out, changed, and written anew with the tensors copied byte by
byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from library.checkpoints.hashes import adapter_hashes
from library.checkpoints.safetensors_header import read_header_and_start
from library.core.atomic_file import atomic_path
from library.core.errors import CheckpointError
from library.safetensors_utils import MemoryEfficientSafeOpen

NEEDED = ("format", "lora_adapter_metadata", "model_config")
"""without these a file is read as another one: who wrote it, the strength of PEFT's adapters, sizes that shapes do not
tell"""
FOR_LOADERS = (
    *NEEDED, "ss_v2", "ss_v_parameterization", "ss_base_model_version", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.title",
    "modelspec.resolution",
    "modelspec.prediction_type", "modelspec.encoder_layer", "modelspec.timestep_range",
)  # fmt: skip
HASHES = ("sshs_model_hash", "sshs_legacy_hash")
_COPY_BLOCK = 8 << 20
_IN_SUBSETS = {
    "tags": ("caption_prefix", "caption_suffix", "class_tokens"),
    "folders": (
        "image_dir", "metadata_file", "image_jsonl_file", "video_directory", "video_jsonl_file", "control_directory",
    ),
}  # fmt: skip
_KEYS = {"tags": ("ss_tag_frequency",), "folders": ("ss_dataset_dirs", "ss_reg_dataset_dirs")}


def stripped(metadata: Mapping[str, str], what: str) -> dict[str, str]:
    """The metadata without the vocabulary of captions ("tags"), the names of folders ("folders"), or all that no loader
    needs ("all")."""
    if what == "all":
        return {key: value for key, value in metadata.items() if key in FOR_LOADERS or key in HASHES}
    result = {key: value for key, value in metadata.items() if key not in _KEYS[what]}
    datasets = _parsed(result.get("ss_datasets"))
    if isinstance(datasets, list):
        result["ss_datasets"] = json.dumps([_stripped_dataset(dataset, what) for dataset in datasets])
    elif "ss_datasets" in result:  # what cannot be read cannot be cleaned
        del result["ss_datasets"]
    if what == "folders" and "ss_tag_frequency" in result:
        result["ss_tag_frequency"] = json.dumps(_numbered(_parsed(result["ss_tag_frequency"])))
    return result


def _stripped_dataset(dataset: Any, what: str) -> Any:
    if not isinstance(dataset, dict):
        return None
    own = dict(dataset)
    if "tag_frequency" in own:
        own["tag_frequency"] = {} if what == "tags" else _numbered(own["tag_frequency"])
    subsets = own.get("subsets")
    names = _IN_SUBSETS[what]
    if isinstance(subsets, list):
        own["subsets"] = [
            {k: v for k, v in subset.items() if k not in names} if isinstance(subset, dict) else None
            for subset in subsets
        ]
    return own


def _numbered(by_folder: Any) -> Any:
    """Tag counts by folder, with numbers for the folders' names."""
    return (
        {f"folder {number}": tags for number, tags in enumerate(by_folder.values(), start=1)}
        if isinstance(by_folder, dict)
        else {}
    )


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def with_hashes(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with the hashes of an adapter renewed, where it has them: one of them depends on the length of the
    header. Tensors are read one at a time."""
    if not any(key in metadata for key in HASHES):
        return dict(metadata)
    rest = {key: value for key, value in metadata.items() if key not in HASHES}
    with MemoryEfficientSafeOpen(path) as file:
        shapes = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in file.infos.items()}
        return {**rest, **adapter_hashes(shapes, rest, file.get_tensor)}


def rewrite_metadata(
    source: str | os.PathLike[str], target: str | os.PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write `source` under the name `target` (which may be the same) with other metadata; all else stays byte by byte.
    The file appears whole or not at all."""
    _, _, start = read_header_and_start(source)
    with atomic_path(target) as temporary, open(source, "rb") as old, open(temporary, "wb") as new:
        old.seek(8)
        header = json.loads(old.read(start - 8))
        header.pop("__metadata__", None)
        entries = {"__metadata__": dict(metadata), **header} if metadata else header
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, _COPY_BLOCK)
        length = new.tell() - 8 - len(text)
        if length != os.fstat(old.fileno()).st_size - start:
            raise CheckpointError(f"{source} became shorter while it was read")
