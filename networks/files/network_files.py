"""Adapter files: reading them under any known naming, and writing them whole or not at all."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping

import torch

from library.checkpoints.adapter_tensors import no_adapter, outside_endings
from library.checkpoints.hashes import adapter_hashes
from library.checkpoints.number_formats import narrowed_all
from library.core.errors import CheckpointError
from library.safetensors_utils import (
    load_pickled_tensors,
    load_safetensors,
    read_header,
    save_file_atomic,
    save_pickled_atomic,
)
from networks.files.peft_config import configs_of, with_alphas
from networks.kinds.targets import NetworkTargets

logger = logging.getLogger(__name__)


def read_adapter_file(path: str | os.PathLike[str], targets: NetworkTargets | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file under kohya names; CheckpointError when it is missing, damaged or no adapter."""
    is_safetensors = os.fspath(path).endswith(".safetensors")
    # read, not mapped: Windows replaces no file that is mapped, and a run may write to the name of an adapter that it
    # read
    tensors = load_safetensors(path, device="cpu", disable_mmap=True) if is_safetensors else load_pickled_tensors(path)
    metadata = read_header(path)[1] if is_safetensors else {}
    configs = configs_of(path, metadata)
    if configs:
        tensors = with_alphas(tensors, configs)
    return to_kohya_names(tensors, targets, str(path), metadata)


def to_kohya_names(
    tensors: Mapping[str, torch.Tensor], targets: NetworkTargets | None, label: str,
    metadata: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of an adapter under kohya names; names of other programs are rewritten by the family's table."""
    if not any(is_adapter_key(key) for key in tensors):
        raise CheckpointError(no_adapter(label, tensors, metadata))
    if targets is not None:
        from networks.files.lora_conversion import is_beside, to_kohya

        try:
            renamed = to_kohya(targets.family, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{label}: {error}") from error
        beside = [key for key in renamed if is_beside(key)]
        if beside:
            logger.info(
                "%s: %d tensors are vectors of words (%s), which are no part of the adapter: image scripts and a "
                "training with --token_string read them, tools that write adapter files keep them, merging into a "
                "model leaves them out", label, len(beside), ", ".join(sorted({key.split(".")[1] for key in beside})),
            )  # fmt: skip
        return {key: tensor for key, tensor in renamed.items() if key not in beside}
    return dict(tensors)


def is_adapter_key(key: str) -> bool:
    """Whether a tensor of this name belongs to an adapter, of any kind."""
    name = key.partition(".")[2] or key
    marks = (
        "lora_down", "lora_up", "lora_A", "lora_B", "hada_w1_a", "lokr_w1", "lokr_w2", "oft_blocks", "a1.weight",
        "lora.down", "lora.up",
        "lora_linear_layer", "_lora1.", "_lora2.",
    )  # fmt: skip
    if any(mark in name for mark in marks) or name.rpartition(".")[2] in (
        "diff",
        "diff_b",
        "w_norm",
        "b_norm",
        "on_input",
    ):
        return True
    return key.endswith(outside_endings())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: the smallest and the largest tell, and are one pass."""
    return not tensor.numel() or all(map(math.isfinite, torch.stack(torch.aminmax(tensor.float())).tolist()))


def check_finite(tensors: Mapping[str, torch.Tensor], label: str) -> None:
    """CheckpointError for a value that would make every output NaN."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(
                f"{label}: {key} has values that are not finite (NaN or infinite); the training of this file failed"
            )


def by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """lora name -> parameter name -> tensor. A name ends at the first dot."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, dot, parameter = key.partition(".")
        if dot:
            modules.setdefault(name, {})[parameter] = tensor
    return modules


def match_names(
    names: Iterable[str], known: Iterable[str], targets: NetworkTargets
) -> tuple[dict[str, str], list[str]]:
    """(name in the file -> name in the model, names that are in no model), other programs' spellings included."""
    known = set(known)
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in names:
        match = next((candidate for candidate in targets.canonical_names(name) if candidate in known), None)
        if match is None:
            unknown.append(name)
        else:
            found[name] = match
    return found, unknown


def write_adapter_file(
    path: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str] | None
) -> None:
    """Write tensors as `dtype` (None = as held); alpha stays float32. safetensors get the metadata and hashes of the
    content, other endings are a torch pickle without metadata. The file appears complete or not at all."""
    ready = {key: tensor.contiguous() for key, tensor in narrowed_all(_for_file(tensors, dtype)).items()}
    if os.path.splitext(path)[1] != ".safetensors":
        save_pickled_atomic(ready, path)
        return
    metadata = dict(metadata or {})
    if metadata:
        metadata.update(adapter_hashes(ready, metadata))
    save_file_atomic(ready, path, metadata or None)


def _for_file(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, tuple[torch.Tensor, torch.dtype | None]]:
    """key -> (tensor, its type in the file): rounding an alpha would change the scale."""
    return {
        key: (tensor.detach().cpu(), torch.float32 if key.endswith(".alpha") else dtype)
        for key, tensor in tensors.items()
    }
