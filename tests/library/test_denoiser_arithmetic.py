"""Parts of library/attention.py that are computed in few kernels: the same numbers as their formulas, and their
gradients."""

from __future__ import annotations

import pytest
import torch

from library.attention import in_heads, joined_along_tokens, modulate, rms_normed, rotate_pairs, split_query_key_value
from library.components.unet_models import as_picture, as_tokens


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


def test_heads_are_cut_and_tokens_joined_without_a_number_changed() -> None:
    joined = torch.arange(2 * 5 * 3 * 4 * 6.0).view(2, 5, 72)
    parts = split_query_key_value(joined, 4)
    for number, part in enumerate(parts):
        assert torch.equal(part, joined.view(2, 5, 3, 4, 6)[:, :, number].transpose(1, 2))
        assert part.data_ptr() == joined[..., 24 * number :].data_ptr()  # a view
    assert torch.equal(in_heads(joined, 8)[:, 3], joined[..., 27:36])
    both = joined_along_tokens(parts[0], parts[1][:, :, :2])
    assert torch.equal(both, torch.cat((parts[0], parts[1][:, :, :2]), dim=2))
    assert both.stride() == (4 * 6 * 7, 6, 4 * 6, 1)  # [B, L, heads, D] in memory


def test_the_gradient_of_split_projections_is_put_together_once() -> None:
    joined, kernels = torch.randn(2, 5, 72, requires_grad=True), []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kernels.append(str(function))
            return function(*args, **(kwargs or {}))

    query, key, value = split_query_key_value(joined, 4)
    total = (query * 1.0 + key * 2.0 + value * 3.0).sum()
    with Seen():
        total.backward()
    assert [name for name in kernels if "cat" in name or "stack" in name] == ["aten.cat.default"]
    assert not [name for name in kernels if "clone" in name]
    assert torch.equal(joined.grad, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(24).expand(2, 5, 72))


def test_tokens_of_a_picture_and_back_are_views() -> None:
    picture = torch.randn(2, 3, 4, 5)
    tokens = as_tokens(picture)
    assert torch.equal(tokens, picture.permute(0, 2, 3, 1).reshape(2, 20, 3))
    back = as_picture(tokens, 4)
    assert torch.equal(back, picture) and back.data_ptr() == picture.data_ptr()


def test_a_modulation_takes_the_wider_type_and_rounds_once() -> None:
    torch.manual_seed(0)
    x, shift, scale = torch.randn(2, 4, 8), torch.randn(2, 1, 8).bfloat16(), torch.randn(2, 1, 8).bfloat16()
    torch.testing.assert_close(modulate(x, shift, scale), (1 + scale) * x + shift, rtol=1e-6, atol=1e-6)
    narrow = modulate(x.bfloat16(), shift, scale)
    exact = (1 + scale).double() * x.bfloat16().double() + shift.double()
    assert torch.equal(narrow, exact.float().bfloat16())
