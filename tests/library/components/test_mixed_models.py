"""Models whose tensors are of several types: each layer against its formula, written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.components.mixed_models import compute_as_stored, entry_dtype
from library.fp8_optimization_utils import store_layers, stored_of


class Mixed(nn.Module):
    """fp16 matrices, one with a float32 bias, and a float32 rest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(12, 24).half()
        self.first.bias.data = self.first.bias.data.float() + 1e-3
        self.norm = nn.LayerNorm(24)
        self.norm.weight.data = torch.randn(24)
        self.conv = nn.Conv2d(2, 3, 3, padding=1).half()
        self.conv.bias.data = torch.randn(3)
        self.last = nn.Linear(24, 5)
        self.same = nn.Linear(5, 300).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(self.last(self.norm(self.first(x.to(entry_dtype(self, self.last.bias))))))


def by_hand(model: Mixed, x: torch.Tensor) -> torch.Tensor:
    x = x.half()
    x = (F.linear(x, model.first.weight).float() + model.first.bias).half()
    x = F.layer_norm(x.float(), (24,), model.norm.weight, model.norm.bias).half()
    x = F.linear(x.float(), model.last.weight, model.last.bias).half()
    return F.linear(x, model.same.weight, model.same.bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_each_layer_computes_in_its_own_type(autocast):
    model, x = Mixed(), torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    expected = by_hand(model, x)
    found = compute_as_stored(model, torch.bfloat16)
    assert found.computed == torch.float16 and found.tensors == {torch.float32: 6, torch.float16: 4}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model(x), expected) and expected.dtype == torch.float16
    assert torch.equal(copy.deepcopy(model)(x), expected)
    picture = torch.randn(1, 2, 4, 4).half()
    plain = F.conv2d(picture, model.conv.weight, padding=1).float() + model.conv.bias[:, None, None]
    assert torch.equal(model.conv(picture), plain.half())


def test_inside_autocast_layers_in_float32_alone_are_changed():
    """As in training: bfloat16 between layers, whatever the file has."""
    model, x = Mixed(), torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    model.half()
    model.norm.float()
    model.last.float()
    found = compute_as_stored(model, torch.bfloat16, in_autocast=True)
    assert found.computed == torch.bfloat16 and "forward" not in vars(model.first)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    narrow = torch.bfloat16
    wanted = F.linear(x.to(narrow), model.first.weight.to(narrow), model.first.bias.to(narrow))
    wanted = F.layer_norm(wanted.float(), (24,), model.norm.weight, model.norm.bias).to(narrow)
    wanted = F.linear(wanted.float(), model.last.weight, model.last.bias).to(narrow)
    wanted = F.linear(wanted, model.same.weight.to(narrow), model.same.bias.to(narrow))
    assert torch.equal(got, wanted)


def test_gradients_pass(tmp_path):
    model, x = Mixed(), torch.randn(4, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    by_hand(model, x).float().sum().backward()
    expected, x.grad = x.grad, None
    compute_as_stored(model, torch.bfloat16)
    model(x).float().sum().backward()
    assert torch.equal(x.grad, expected)


def test_weights_in_8_bits_compute_in_the_type_that_is_said():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    store_layers(model, "fp8_scaled")
    found = compute_as_stored(model, torch.bfloat16)
    assert found.computed == torch.bfloat16 and stored_of(model[0]) is not None
    x = torch.randn(2, 64)
    middle = F.linear(x.bfloat16(), model[0].weight.bfloat16()).mul_(model[0].weight_scale)
    middle = middle.add_(model[0].bias.bfloat16())
    middle = F.layer_norm(middle.float(), (64,), model[1].weight, model[1].bias).bfloat16()
    wanted = F.linear(middle, model[2].weight.bfloat16()).mul_(model[2].weight_scale).add_(model[2].bias.bfloat16())
    assert torch.equal(model(x), wanted)
