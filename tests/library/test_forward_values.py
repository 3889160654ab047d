"""What is computed again in a backward pass reads the values of its own forward."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from library.core.forward_values import AsNow, ForwardValue, checkpoint_contexts


def test_every_forward_is_computed_again_with_its_own_value() -> None:
    factor: ForwardValue[float] = ForwardValue()
    weight = torch.tensor(3.0, requires_grad=True)

    def forward(value: float) -> torch.Tensor:
        factor.value = value
        return checkpoint(
            lambda w: (w * factor.value).sin(), weight, use_reentrant=False, context_fn=checkpoint_contexts
        )

    loss = forward(2.0) + forward(5.0)
    factor.value = 7.0
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * torch.tensor(6.0).cos() + 5 * torch.tensor(15.0).cos())
    assert factor.value == 7.0


def test_values_are_as_before_after_an_error() -> None:
    one: ForwardValue[int] = ForwardValue()
    one.value = 1
    then, one.value = AsNow(), 2
    try:
        with then:
            assert one.value == 1
            raise ValueError
    except ValueError:
        pass
    assert one.value == 2
