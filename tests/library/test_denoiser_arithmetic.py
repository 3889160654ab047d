"""Parts of library/attention.py that are computed in few kernels: the same numbers as their formulas, and their
gradients."""

from __future__ import annotations

import pytest
import torch

from library.attention import modulate, rms_normed, rotate_pairs


def states_of(layout: str) -> torch.Tensor:
    """[2, 3, 5, 8] as projections of several widths leave it in memory."""
    if layout == "joined projection":
        return torch.randn(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)[1]
    if layout == "odd rows":
        return torch.randn(2, 5, 25)[..., :24].unflatten(-1, (3, 8)).transpose(1, 2)
    if layout == "odd start":
        return torch.randn(2 * 3 * 5 * 8 + 1)[1:].view(2, 3, 5, 8)
    return torch.randn(2, 3, 8, 5).mT


@pytest.mark.parametrize("layout", ["joined projection", "odd rows", "odd start", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_turned_as_the_formula_says(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    states, angles = states_of(layout).to(dtype).requires_grad_(), torch.rand(1, 5, 4) * 6
    rope, weights = (angles.cos(), angles.sin()), torch.randn(2, 3, 5, 8)
    turned = rotate_pairs(states, rope)
    (gradient,) = torch.autograd.grad((turned * weights).sum(), states)
    first, second = states.float()[..., 0::2], states.float()[..., 1::2]
    cos, sin = rope[0][:, None], rope[1][:, None]
    wanted = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    torch.testing.assert_close(turned, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad((wanted * weights).sum(), states)[0])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(rotate_pairs(states, rope), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_and_its_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 16) * torch.tensor([1e-3, 1.0, 1e3])[:, None]).to(dtype).requires_grad_()
    weights = torch.randn(2, 3, 16)
    normed = rms_normed(x, 1e-6)
    (gradient,) = torch.autograd.grad((normed * weights).sum(), x)
    exact = x.detach().double().requires_grad_()
    wanted = exact / (exact.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    (wanted_gradient,) = torch.autograd.grad((wanted * weights).sum(), exact)
    assert normed.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(normed.double(), wanted, rtol=1e-6, atol=1e-6)
    rounding = 1e-5 if dtype != torch.bfloat16 else 5e-3
    size = wanted_gradient.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(gradient.double() / size, wanted_gradient / size, rtol=rounding, atol=rounding)


def test_a_modulation_takes_the_wider_type_and_rounds_once() -> None:
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 4, 8), torch.randn(2, 1, 8).bfloat16(), torch.randn(2, 1, 8).bfloat16()
    torch.testing.assert_close(modulate(x, shift, scale), (1 + scale) * x + shift, rtol=1e-6, atol=1e-6)
    narrow = modulate(x.bfloat16(), shift, scale)
    exact = (1 + scale).double() * x.bfloat16().double() + shift.double()
    assert torch.equal(narrow, exact.float().bfloat16())
