"""Files of models of any size with random weights, written as fast as the disk takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shapes = dict[str, tuple[int, ...]]


def shapes_of(build: Callable[[], torch.nn.Module], prefix: str = "") -> Shapes:
    """Names and shapes of a module that is built without memory."""
    import torch

    with torch.device("meta"):
        module = build()
    return {f"{prefix}{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def count_of(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def write_random(
    path: Path, shapes: Shapes, *, beside: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] | None = None, sparse: bool = False,
) -> None:
    """A safetensors file in bfloat16: random tensors of these shapes, and those of `beside`; `config` becomes the entry
    `model_config` of its metadata. `sparse`: zeros that take no space on the disk. All are cut from one row of noise:
    large models are written at the pace of the disk, and no two rows of a matrix are alike. Matrices keep the variance
    of their input, scales of norms are 1."""
    import torch

    from library.safetensors_utils import file_layout

    beside = {key: tensor.to(torch.bfloat16) for key, tensor in (beside or {}).items()}
    infos = {key: (torch.bfloat16, shape) for key, shape in shapes.items()}
    infos |= {key: (torch.bfloat16, tuple(tensor.shape)) for key, tensor in beside.items()}
    header, places, size = file_layout(infos, {"model_config": json.dumps(config, sort_keys=True)} if config else None)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)
        if sparse:
            return
        longest = max(math.prod(shape) for shape in shapes.values())
        noise = torch.randn(longest, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
        for key, (_, shape) in infos.items():
            tensor = beside[key] if key in beside else _weight(key, shape, noise)
            file.seek(places[key])
            file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _weight(key: str, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    import torch

    values = noise[: math.prod(shape)]
    if len(shape) > 1:
        return (values / math.prod(shape[1:]) ** 0.5).view(shape)
    return torch.ones(shape, dtype=noise.dtype) if key.endswith((".scale", ".weight")) else values * 0.05
