"""Weights in 8 and 4 bits: numbers and scales, and what is between a file and a layer."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints.layout_rules import Rule, from_original, to_original
from library.checkpoints.weight_forms import FORMS, StoredWeight, holds_nf4, scaled_fp8, stored, unscaled
from library.core.errors import CheckpointError


def weight_of(rows: int = 6, inputs: int = 128) -> torch.Tensor:
    """One input of each row is a hundred times as large as the others."""
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    weight[:, 3] *= 100
    return weight


def test_each_block_uses_the_whole_range():
    """By hand: the largest number of a block becomes 448, its scale is that number / 448; a block of zeros stays zero."""
    weight = weight_of()
    weight[2, 64:] = 0
    numbers, scale = scaled_fp8(weight, 64)
    assert numbers.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (6, 2)
    for row in range(6):
        for block in range(2):
            part = weight[row, 64 * block : 64 * block + 64]
            assert scale[row, block] == max(part.abs().max() / 448, torch.tensor(1e-8))
            largest = numbers[row, 64 * block : 64 * block + 64].float().abs().max()
            assert largest == (448 if part.any() else 0)
    assert torch.equal(unscaled(numbers, scale)[2, 64:], torch.zeros(64))


def test_blocks_beside_a_large_number_keep_theirs():
    """Float8 has 3 bits behind the first one: an error of at most 1/16 of each number, down to where numbers are 2^-9 of
    the scale; scales by rows lose what is small beside the large one, in the other block too."""
    weight = weight_of()
    far = weight[:, 64:]
    by_block, by_row = (unscaled(*scaled_fp8(weight, block))[:, 64:] for block in (64, None))
    errors = [float(((found - far) / far).abs().median()) for found in (by_block, by_row)]
    assert errors[0] < 1 / 16 and errors[1] > 1.2 * errors[0]
    assert ((by_block - far).abs() <= far.abs() / 16 + far.abs().amax(1, keepdim=True) / 448 * 2**-9).all()


def test_whole_numbers_are_the_nearest():
    """By hand: the largest number of a row becomes 127 or -127, and each is off by half a step at most."""
    weight = weight_of()
    own = stored(weight, "int8")
    assert own.data.dtype == torch.int8 and own.data.abs().amax(1).tolist() == [127] * 6
    assert torch.equal(own.data, (weight / (weight.abs().amax(1, keepdim=True) / 127)).round().to(torch.int8))
    assert ((own.widened() - weight).abs() <= own.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("inputs, block", [(128, 64), (96, 32)])
def test_four_bits_are_those_of_bitsandbytes(inputs, block):
    """The same numbers as its own functions give for the whole weight, and by hand: the nearest of the 16 quantiles."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weight_of(6, inputs)
    own = stored(weight, "nf4")
    assert own.data.shape == (6, inputs // 2) and own.scale.shape == (6, inputs // block) and own.shape == weight.shape
    packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    assert torch.equal(own.widened(), functional.dequantize_4bit(packed, state))
    quantiles = functional.get_4bit_type("nf4", device="cpu")  # [16]
    full = weight.unflatten(1, (-1, block))
    shares = full / full.abs().amax(2, keepdim=True)
    nearest = quantiles[(shares[..., None] - quantiles).abs().argmin(-1)] * full.abs().amax(2, keepdim=True)
    torch.testing.assert_close(own.widened(), nearest.flatten(1), rtol=1e-6, atol=0)


def test_forms_that_do_not_fit():
    """Rows that cannot be divided into blocks of 32 are in 8 bits; numbers beyond 448 are named instead of cut off."""
    assert stored(weight_of(6, 100), "nf4").form == "int8" and holds_nf4("cpu")
    with pytest.raises(CheckpointError, match="blocks.0.weight reaches 1000; float8_e4m3fn holds numbers up to 448"):
        stored(torch.full((2, 4), 1000.0), "fp8", name="blocks.0.weight")
    with pytest.raises(ValueError, match="'int4' is no form of weights"):
        stored(weight_of(), "int4")


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_joined_divided_and_swapped(form):
    """By the rules between layouts, as the weights that they stand for."""
    whole = stored(weight_of(12), form, 64)
    rules = [Rule("qkv", ("q", "k", "v")), Rule("mod", ("norm",), swap_halves=True)]
    parts = from_original({"qkv": whole, "mod": whole}, rules)
    assert all(isinstance(part, StoredWeight) for part in parts.values())
    assert parts["q"].shape == (4, 128) and torch.equal(parts["k"].widened(), whole.widened()[4:8])
    assert torch.equal(parts["norm"].widened(), whole.widened().roll(6, 0))
    back = to_original(parts, rules)
    assert all(torch.equal(part.data, whole.data) and part.shape == whole.shape for part in back.values())
    mixed = torch.cat([whole, torch.ones(1, 128)])
    assert isinstance(mixed, torch.Tensor) and torch.equal(mixed[:12], whole.widened())


def test_convolutions():
    weight = torch.randn(4, 32, 3, 3, generator=torch.Generator().manual_seed(3))
    for form in FORMS:
        own = stored(weight, form)
        assert own.shape == own.widened().shape == weight.shape
        assert (own.widened() - weight).norm() < (0.12 if form == "nf4" else 0.03) * weight.norm(), form
