"""Tiles of an autoencoder: they cover a picture, overlap enough, and pass over into one another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from library.components.tiling import Tiles


def test_tiles_cover_every_size_with_enough_in_common() -> None:
    tiles = Tiles(12, 3)
    assert tiles.starts(5) == tiles.starts(12) == [0] and tiles.starts(30) == [0, 9, 18]
    for size in range(13, 200):
        starts = tiles.starts(size)
        assert starts[0] == 0 and starts[-1] == size - 12 and len(starts) == -(-(size - 12) // 9) + 1
        assert all(1 <= after - before <= 9 for before, after in zip(starts, starts[1:]))


@pytest.mark.parametrize("size", [(3, 4), (4, 9), (11, 4), (7, 13)])
def test_what_looks_at_single_places_is_the_same_in_tiles(size: tuple[int, int]) -> None:
    """Enlarging and reducing, which differ in which of the two sides has more rows for a latent."""
    latents, tiles = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)), Tiles(4, 1)
    seen: list[torch.Size] = []

    def enlarge(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return F.interpolate(x, scale_factor=8, mode="nearest")

    picture = enlarge(latents)
    torch.testing.assert_close(tiles.run(enlarge, latents, (1, 8)), picture)
    torch.testing.assert_close(tiles.run(lambda x: F.avg_pool2d(x, 8), picture, (8, 1)), latents)
    assert all(max(shape[2:]) <= 4 for shape in seen[1:])


def test_two_tiles_pass_over_evenly() -> None:
    answers = iter((0.0, 1.0))
    result = Tiles(8, 4).run(lambda x: torch.full_like(x, next(answers)), torch.zeros(1, 1, 1, 12), (1, 1))
    assert result.flatten().tolist() == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
