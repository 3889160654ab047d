"""BOFT: rows of a weight are rotated by butterfly-shaped stages of small blocks (arXiv 2311.06243), as LyCORIS has
them.

`--network_module networks.boft`; --network_dim is the largest size of a block. Every stage mixes rows that lie twice as
far apart, so that few parameters reach all of them. --network_alpha is the limit of COFT and never a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from library.core.errors import ConfigError
from networks.diag_oft import arguments, shape_from_settings
from networks.kinds.factorization import power_of_two_blocks
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.oft import REFUSED, RotationModule, cayley, rotation_targets, tell_constraint


def boft_rotated(weight: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """The rows of `weight` [out, ...] through the stages `rotations` [stages, count, b, b].

    Stage i looks at the rows as [c, 2, k] with k = 2^i * b / 2, exchanges the last two axes, multiplies groups of b
    rows by their rotation and puts the rows back in order. Source: the butterfly of arXiv 2311.06243, section 4.2.
    """
    _, count, size, _ = rotations.shape
    for stage, rotation in enumerate(rotations):
        half = 2**stage * size // 2
        rows = weight.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)
        rows = torch.einsum("kij,kj...->ki...", rotation, rows.unflatten(0, (count, size))).flatten(0, 1)
        weight = rows.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
    return weight


class BOFTModule(RotationModule):
    """BOFT of one layer: `oft_blocks` [stages, count, b, b] with count * b = rows and count a power of two."""

    def block_shape(self, rows: int) -> tuple[int, ...]:
        found = power_of_two_blocks(rows, self.lora_dim)
        if found is None:
            smallest = next((size for size in range(2, rows + 1, 2) if power_of_two_blocks(rows, size)), None)
            advice = f"use --network_dim {smallest} or more" if smallest else "exclude this layer"
            raise ConfigError(
                f"{self.lora_name}: {rows} rows are no even block of up to {self.lora_dim} rows times a power of two; "
                f"{advice}"
            )
        size, count = found
        return bin(count - 1).count("1") + 1, count, size, size

    @staticmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """rescale * stages(W) - W. The multiplier leads every stage, and the factors, from doing nothing (0) to what
        was trained (1). Source: boft_rotated."""
        blocks, original = tensors["oft_blocks"], weight.float()
        rotations = cayley(blocks, float(tensors.get("alpha", 0.0)) * original.shape[0])
        identity = torch.eye(blocks.shape[-1], device=rotations.device)
        changed = boft_rotated(original, multiplier * rotations + (1 - multiplier) * identity)
        if "rescale" in tensors:
            factors = tensors["rescale"].float().view(-1, *[1] * (changed.ndim - 1))
            changed = changed * (1 + multiplier * (factors - 1))
        return changed - original


def shape_from_file(
    tensors: Mapping[str, torch.Tensor], split: Sequence[int] | None
) -> tuple[int, float | None, dict[str, Any]]:
    """(size of a block, alpha, further arguments of BOFTModule) of one layer's tensors in a file."""
    shape = tuple(tensors["oft_blocks"].shape)
    alpha = float(tensors["alpha"]) if "alpha" in tensors else 0.0
    return shape[-1], alpha, {"shapes": {"oft_blocks": shape}, "rescaled": "rescale" in tensors}


KIND = NetworkKind(
    "BOFT", BOFTModule, shape_from_file, shape_from_settings, arguments, REFUSED,
    targets=rotation_targets, prepare=tell_constraint,
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
