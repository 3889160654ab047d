"""The free matrices of rotations (OFT, BOFT): their names in a layer, and the limit of how far they turn."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

EPSILON = 1e-8


def limit_factor(skew: torch.Tensor, constraint: float) -> torch.Tensor:
    """What Q is multiplied by so that its norm over all blocks is at most the constraint: 1 where it is."""
    return (constraint / (torch.linalg.vector_norm(skew) + EPSILON)).clamp(max=1.0)


def block_names(tensors: Iterable[str]) -> list[str]:
    """Names of the free matrices among a layer's tensors, parts in their order."""
    parts = [name for name in tensors if re.fullmatch(r"oft_blocks\.\d+", name)]
    return sorted(parts, key=lambda name: int(name.split(".")[1])) or ["oft_blocks"]
