"""LoRA pairs of the parts of a fused layer as one pair, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def fuse_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """k independent pairs [rank, in], [rows_i, rank] -> one pair [k*rank, in], [sum rows_i, k*rank] with the same
    change (up is block-diagonal)."""
    return torch.cat([down for down, _ in pairs]), torch.block_diag(*[up for _, up in pairs])


def split_pair(
    down: torch.Tensor, up: torch.Tensor, rows: Sequence[int]
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """The reverse of fuse_pairs; None when the rank does not divide or `up` is not block-diagonal."""
    count, rank = len(rows), down.shape[0]
    if rank % count or up.shape != (sum(rows), rank):
        return None
    size = rank // count
    grid = [list(part.split(size, dim=1)) for part in up.split(list(rows))]
    if any(bool(grid[i][j].any()) for i in range(count) for j in range(count) if i != j):
        return None
    return [(down_part, grid[i][i]) for i, down_part in enumerate(down.split(size))]
