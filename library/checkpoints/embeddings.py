"""Files of textual inversions: vectors of new words, for each text encoder of a family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.core.errors import CheckpointError
from library.families.registry import FAMILIES
from library.safetensors_utils import load_safetensors

OLD_KEYS = ("emb_params", "*")
"""names of the vectors in files for a single text encoder"""


def read_inversion(path: str, keys: Sequence[str], *, partly: bool = False) -> list[Tensor | None]:
    """Vectors [n, D] for each text encoder, by the names that the family has for them; one encoder alone takes the only
    tensor of a file under any name. `partly`: encoders may be missing (None). CheckpointError."""
    tensors = load_safetensors(path, device="cpu") if path.endswith(".safetensors") else _pickled_inversion(path)
    held, several = ", ".join(sorted(tensors)) or "nothing", {key for keys in _known_keys() for key in keys}
    if len(keys) == 1:
        foreign = sorted(several & tensors.keys())
        if foreign:
            raise CheckpointError(
                f"{path} is a textual inversion for a model with several text encoders ({' and '.join(foreign)}); one "
                "for a single text encoder is needed"
            )
        name = next((key for key in OLD_KEYS if key in tensors), None)
        if name is None and len(tensors) != 1:
            raise CheckpointError(f"{path} holds {held}; one tensor of vectors is needed ({keys[0]})")
        found = [tensors[name] if name else next(iter(tensors.values()))]
    else:
        here = [key for key in keys if key in tensors]
        foreign = sorted((several - set(keys)) & tensors.keys())
        if not here or foreign or (len(here) < len(keys) and not partly):
            raise CheckpointError(f"{path} holds {held}; {' and '.join(keys)} are needed")
        found = [tensors.get(key) for key in keys]
    found = [tensor[None] if tensor is not None and tensor.ndim == 1 else tensor for tensor in found]
    if any(tensor is not None and tensor.ndim != 2 for tensor in found):
        raise CheckpointError(f"{path} holds tensors that are no rows of vectors")
    return found


def _known_keys() -> list[tuple[str, ...]]:
    """Of the families with several text encoders."""
    return [record.embedding_keys for record in FAMILIES.values() if len(record.embedding_keys) > 1]


def _pickled_inversion(path: str) -> dict[str, Tensor]:
    """A .pt file: tensors, or the older form with string_to_param around them."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        raise CheckpointError(f"{path} cannot be read as tensors alone: {error}") from error
    if isinstance(content, dict) and "string_to_param" in content:
        content = dict(content["string_to_param"])
    return (
        {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, dict)
        else {}
    )
