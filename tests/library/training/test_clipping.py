"""Gradients are clipped as torch clips them, to the bit, and are left alone where the factor is 1."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.training.accelerator_setup import Runtime


def parameters_of(scale: float) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    found = [torch.nn.Parameter(torch.zeros(3, size)) for size in (4, 7, 1)]
    for parameter in found[:2]:  # the last has no gradient
        parameter.grad = torch.randn(parameter.shape) * scale
    return found


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, float("inf"), float("nan")])
def test_clipping_is_that_of_torch(scale: float) -> None:
    runtime = SimpleNamespace(unscale_gradients=lambda: None)
    ours, wanted = parameters_of(scale), parameters_of(scale)
    norm, wanted_norm = Runtime.clip_gradients(runtime, ours, 1.0), torch.nn.utils.clip_grad_norm_(wanted, 1.0)
    assert torch.equal(norm, wanted_norm) or (norm.isnan() and wanted_norm.isnan())
    for mine, theirs in zip(ours[:2], wanted[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0, equal_nan=True)


def test_small_gradients_are_not_written() -> None:
    parameters = parameters_of(1e-3)
    norm = Runtime.clip_gradients(SimpleNamespace(unscale_gradients=lambda: None), parameters, 1.0)
    assert 0 < norm < 1
    assert [parameter.grad._version for parameter in parameters[:2]] == [0, 0]
