"""Weights in 8 bits with scales by rows and by blocks of inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.fp8_optimization_utils import scaled_fp8, unscaled, use_scales


def weight_of(rows: int = 6, inputs: int = 128) -> torch.Tensor:
    """One input of each row is a hundred times as large as the others."""
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    weight[:, 3] *= 100
    return weight


def test_each_block_uses_the_whole_range():
    """By hand: the largest number of a block becomes 448, its scale is that number / 448; a block of zeros stays zero."""
    weight = weight_of()
    weight[2, 64:] = 0
    stored, scale = scaled_fp8(weight, 64)
    assert stored.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (6, 2)
    for row in range(6):
        for block in range(2):
            part = weight[row, 64 * block : 64 * block + 64]
            assert scale[row, block] == max(part.abs().max() / 448, torch.tensor(1e-8))
            largest = stored[row, 64 * block : 64 * block + 64].float().abs().max()
            assert largest == (448 if part.any() else 0)
    assert torch.equal(unscaled(stored, scale)[2, 64:], torch.zeros(64))


def test_blocks_beside_a_large_number_keep_theirs():
    """Float8 has 3 bits behind the first one: an error of at most 1/16 of each number, down to where numbers are 2^-9 of
    the scale; scales by rows lose what is small beside the large one, in the other block too."""
    weight = weight_of()
    far = weight[:, 64:]
    by_block, by_row = (unscaled(*scaled_fp8(weight, block))[:, 64:] for block in (64, None))
    errors = [float(((found - far) / far).abs().median()) for found in (by_block, by_row)]
    assert errors[0] < 1 / 16 and errors[1] > 1.2 * errors[0]
    assert ((by_block - far).abs() <= far.abs() / 16 + far.abs().amax(1, keepdim=True) / 448 * 2**-9).all()


@pytest.mark.parametrize("inputs", [128, 100])
def test_a_layer_computes_with_its_scales(inputs):
    """100 inputs are no multiple of 64: such a layer has scales by rows."""
    layer, x = nn.Linear(inputs, 6), torch.randn(3, inputs, generator=torch.Generator().manual_seed(2))
    weight, scale = scaled_fp8(weight_of(6, inputs), 64)
    assert scale.ndim == (2 if inputs == 128 else 1)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    use_scales(layer, scale)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, unscaled(weight, scale), layer.bias), rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_convolutions_have_scales_by_rows():
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(3))
    stored, scale = scaled_fp8(weight.flatten(1))
    found = unscaled(stored.view(4, 3, 3, 3), scale)
    assert found.shape == weight.shape and ((found - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-9).all()
