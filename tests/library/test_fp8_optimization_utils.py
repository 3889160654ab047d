"""Layers that hold their weights in fewer bits: products, gradients, what they keep, and products in 8 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library import fp8_optimization_utils
from library.checkpoints.weight_forms import FORMS, stored
from library.fp8_optimization_utils import (
    can_multiply_fp8,
    hold,
    multiply_in_float32,
    multiply_in_fp8,
    scaled_fp8,
    set_weight,
    store_layers,
    stored_of,
    unscaled,
    weight_of,
    weight_shape,
)

KINDS = [(form, block) for form in FORMS for block in ((None, 64) if form == "fp8_scaled" else (None,))]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_of(form: str, block: int | None = None, size: float = 1.0) -> tuple[nn.Linear, torch.Tensor]:
    """(a layer that holds its weight in a form, that weight in float32)."""
    layer = nn.Linear(128, 48)
    layer.weight.data = size * torch.randn(48, 128, generator=generator(1))
    hold(layer, stored(layer.weight, form, block))
    return layer, stored_of(layer).widened()


@pytest.mark.parametrize("form, block", KINDS)
def test_products_and_gradients_are_those_of_the_weight(form, block):
    layer, weight = layer_of(form, block)
    assert weight_shape(layer) == (48, 128) and torch.equal(weight_of(layer), weight)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]
    x, given = (torch.randn(2, 5, size, generator=generator(size)) for size in (128, 48))
    for dtype, far in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        mine, theirs = (x.clone().to(dtype).requires_grad_() for _ in range(2))
        expected = F.linear(theirs.float(), weight, layer.bias.detach())
        output = layer(mine)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=far, atol=far * float(expected.detach().abs().max()))
        output.backward(given.to(dtype))
        expected.backward(given)
        largest = float(theirs.grad.float().abs().max())
        torch.testing.assert_close(mine.grad.float(), theirs.grad.float(), rtol=far, atol=far * largest)
    layer.bias.grad = None
    layer(x).backward(given)
    torch.testing.assert_close(layer.bias.grad, given.sum((0, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("form, block", KINDS)
def test_the_widened_weight_is_not_kept_for_the_backward_pass(form, block):
    layer, weight = layer_of(form, block)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 128, generator=generator(2)).requires_grad_())
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) <= weight.numel() * 1.1


def test_sums_of_unscaled_numbers_stay_within_float16():
    """In float16 sums of numbers up to 448 or 127 would be infinite before the scale makes them small."""
    for form in ("fp8_scaled", "int8"):
        layer, weight = layer_of(form, size=0.01)
        x = torch.full((1, 128), 40.0) * weight[:1].sign()
        found, expected = layer(x.half()).detach().float(), F.linear(x, weight, layer.bias.detach())
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_a_model_is_stored_layer_by_layer():
    """Norms, embeddings and what is not wanted stay; layers of transformers whose input would be cast to 8-bit floats
    too; int8 and nf4 are no floats, to which nothing is cast."""
    model = nn.Sequential(nn.Embedding(3, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8))
    model.append(nn.Conv2d(64, 2, 1))
    assert store_layers(model, "nf4", wanted=lambda path: path != "3", convolutions=True) == 2
    assert [stored_of(layer) is not None for layer in model] == [False, False, True, False, True]
    data = model[2].weight.data
    assert store_layers(model, "int8") == 3 and model[2].weight.data is data or torch.equal(model[2].weight, data)
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=8, d_model=64, d_kv=8, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    for form, is_stored in (("fp8", False), ("fp8_scaled", False), ("int8", True), ("nf4", True)):
        torch.manual_seed(0)
        encoder = T5EncoderModel(config).requires_grad_(False).eval()
        ids = torch.tensor([[1, 2, 3]])
        full = encoder(ids).last_hidden_state
        store_layers(encoder, form)
        assert (stored_of(encoder.encoder.block[0].layer[1].DenseReluDense.wo) is not None) == is_stored
        error = (encoder(ids).last_hidden_state - full).norm() / full.norm()
        assert 0 < error < (0.2 if form == "nf4" else 0.05), form


@pytest.mark.parametrize("form, block", KINDS)
def test_another_weight_keeps_the_form(form, block):
    layer, weight = layer_of(form, block)
    set_weight(layer, 2 * weight)
    own = stored_of(layer)
    assert own.form == form and (own.scale is None or own.scale.ndim == (2 if block or form == "nf4" else 1))
    torch.testing.assert_close(own.widened(), 2 * weight, rtol=1e-6, atol=0)


def test_products_in_8_bits():
    """By hand: tokens and rows in scaled 8 bits, multiplied in float32; gradients are those of the weight. Sizes that
    are no multiples of 16, scales by blocks and other forms are widened as before."""
    assert can_multiply_fp8(torch.device("cpu"))
    (layer, weight), (blocks, _), (whole, _) = layer_of("fp8_scaled"), layer_of("fp8_scaled", 64), layer_of("int8")
    odd = nn.Linear(40, 48)
    hold(odd, stored(odd.weight, "fp8_scaled"))
    assert multiply_in_fp8(nn.Sequential(layer, blocks, whole, odd)) == 1
    assert [one.multiplies_fp8 for one in (layer, blocks, whole, odd)] == [True, False, False, False]
    x = torch.randn(2, 5, 128, generator=generator(4), requires_grad=True)
    tokens = unscaled(*scaled_fp8(x.detach().flatten(0, 1))).view_as(x)
    output = layer(x)
    expected = F.linear(tokens, weight, layer.bias.detach())
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    assert (expected - F.linear(x.detach(), weight, layer.bias.detach())).abs().max() > 1e-3
    output.backward(torch.ones_like(output))
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_devices_that_cannot_multiply_8_bits_are_known(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    can_multiply_fp8.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert not can_multiply_fp8(torch.device("cpu"))
    can_multiply_fp8.cache_clear()
    monkeypatch.setattr(fp8_optimization_utils, "_fp8_product", lambda x, data, scale, bias: x)  # something else
    assert not can_multiply_fp8(torch.device("cpu"))
    can_multiply_fp8.cache_clear()


@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_multiply_in_float32_and_round_the_result(block, autocast):
    """Against the product of what the numbers of the layer stand for, in float64."""
    layer, _ = layer_of("fp8_scaled", block)
    own, places = stored_of(layer), torch.arange(128) // (block or 128)
    weight = own.data.double() * own.scale.double().view(48, -1)[:, places]
    x = torch.randn(3, 128, generator=generator(6)).bfloat16()
    given = x.float() if autocast else x
    wanted = F.linear(x.double(), weight, layer.bias.detach().double())

    def found() -> tuple[float, float]:
        """Largest distance of output and gradient from the exact ones, in steps of bfloat16."""
        mine = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = layer(mine)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        pairs = ((output.detach(), wanted), (mine.grad, weight.sum(0).expand(3, 128)))
        return tuple(float(((a.double() - b) / b.abs()).abs().max()) * 256 for a, b in pairs)

    plain = found()
    assert multiply_in_float32(nn.Sequential(layer, nn.Linear(2, 2))) == 1
    output, gradient = found()
    assert output <= 1.01 and gradient <= 1.01, "one rounding, of the result"
    assert plain[0] > 2 or plain[1] > 2, "and more of them otherwise"


def test_layers_that_multiply_in_8_bits_stay_so():
    layer, _ = layer_of("fp8_scaled")
    others = [layer_of(form)[0] for form in ("fp8", "int8")]
    model = nn.Sequential(layer, *others)
    assert multiply_in_fp8(model) == 1 and multiply_in_float32(model) == 0
    assert not any(one.multiplies_in_float32 for one in model)
