"""An autoencoder in tiles: each is computed for itself, and where neighbours overlap one passes over into the other.

Memory is that of a tile. A picture that is no larger than one is computed as it is, with equal results; larger ones
come out close, because what a network does all over a picture (group norms, attention) is done all over a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Latents of a tile's side, and how many two neighbours share at least."""

    side: int
    shared: int

    def starts(self, size: int) -> list[int]:
        """Where tiles begin that cover `size` latents, evenly spaced, the last one at the end."""
        if size <= self.side:
            return [0]
        gaps = math.ceil((size - self.side) / (self.side - self.shared))
        return [round(number * (size - self.side) / gaps) for number in range(gaps + 1)]

    def run(self, compute: Callable[[Tensor], Tensor], x: Tensor, steps: tuple[int, int]) -> Tensor:
        """`compute` of x [B, C, H, W], tile by tile. `steps`: rows of x, and of the result, for each latent."""
        before, after = steps
        side = self.side * before
        tops, lefts = (self.starts(size // before) for size in x.shape[-2:])
        strips = []
        for top in tops:
            strip = x[..., top * before : top * before + side, :]
            tiles = [compute(strip[..., left * before : left * before + side]) for left in lefts]
            strips.append(_joined(tiles, [left * after for left in lefts], -1))
        return _joined(strips, [top * after for top in tops], -2)


def _joined(pieces: Sequence[Tensor], starts: Sequence[int], dim: int) -> Tensor:
    """Pieces that begin at `starts` of the result; over what two share, weights go evenly from the first to the
    second."""
    result = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:]):
        shared = result.shape[dim] - start
        weight = torch.arange(shared, device=piece.device, dtype=torch.float32) / shared
        weight = weight.to(piece.dtype).reshape(-1, *[1] * (-dim - 1))  # [shared] or [shared, 1]
        passage = torch.lerp(result.narrow(dim, start, shared), piece.narrow(dim, 0, shared), weight)
        rest = piece.narrow(dim, shared, piece.shape[dim] - shared)
        result = torch.cat((result.narrow(dim, 0, start), passage, rest), dim=dim)
    return result
