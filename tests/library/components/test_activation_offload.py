"""Inputs of checkpoints in main memory: gradients of every denoiser are those without, and what leaves a device comes
back in time and in order."""

from __future__ import annotations

import pytest
import torch

from library.components.activation_offload import AHEAD, ActivationStore
from tests.library.components.deep_denoisers import DEPTHS, MOST, Denoiser
from tests.library.components.test_block_ring import assert_equal, learn_beside, step
from tests.networks.tiny_denoisers import tiny_denoiser
from tests.simulated_device import RaceError, SimulatedDevice, simulated_device


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in ("flux", "sd3") else pytest.mark.full) for name in DEPTHS]
)
def test_gradients_are_those_without(family: str) -> None:
    """With block swap at the same time in one; twice, as graphs are dropped in between."""
    plain = Denoiser(family)
    expected = step(plain, learn_beside(plain))
    with simulated_device() as device:
        denoiser = Denoiser(family)
        if family == "flux":
            denoiser.model.enable_block_swap(MOST[family], device.device)
        trained = learn_beside(denoiser)
        denoiser.model.enable_gradient_checkpointing(cpu_offload=True)
        for _ in range(2):
            before = device.sent
            with device.watching():
                assert_equal(step(denoiser, trained), expected)
            assert device.sent - before >= len(denoiser.model.repeated_blocks())


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def test_those_of_u_nets_too(family: str) -> None:
    results = []
    for offload in (False, True):
        model, inputs = tiny_denoiser(family)
        model.train().enable_gradient_checkpointing(cpu_offload=offload)
        parameters = [p.requires_grad_() for p in list(model.parameters())[-4:]]
        parameters.append(model.conv_in.weight.requires_grad_() if hasattr(model, "conv_in") else parameters[0])
        with simulated_device() as device, device.watching():
            model(*inputs).square().mean().backward()
        assert bool(device.sent) == offload
        results.append([p.grad for p in parameters])
    assert_equal(*results)


def chain(store: ActivationStore, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a leaf, the end of a chain of products, of which the store keeps all factors)."""
    leaf = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value = leaf
    with store.keeping():
        for _ in range(length):
            value = value.T.exp()
            value = (value * 0.1).sin()
    return leaf, value


def test_they_come_back_in_reverse_a_few_ahead() -> None:
    expected, end = chain(ActivationStore(), 3)
    end.sum().backward()
    with simulated_device() as device, device.watching():
        store = ActivationStore()
        leaf, end = chain(store, 3)
        sent = [pairs[0][0].data_ptr() for pairs in (copy.pairs for copy in device.copies)]
        assert len(sent) == 6 == device.sent
        assert all(copy.pairs[0][0].stride() == copy.pairs[0][1].stride() for copy in device.copies)
        end.sum().backward(retain_graph=True)
        back = [copy.pairs[0][1].data_ptr() for copy in device.copies[6:]]
        assert back == sent[::-1]
        assert torch.equal(leaf.grad, expected.grad)
        end.sum().backward()
        assert torch.equal(leaf.grad, 2 * expected.grad)
    del end
    assert all(reference() is None for reference in store._away) and AHEAD == 2


def test_a_tensor_that_is_used_before_it_has_arrived_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fault in (("wait", lambda device, event: None), ("keep", lambda device, tensor: None)):
        with simulated_device() as device, device.watching(), monkeypatch.context() as patch:
            patch.setattr(SimulatedDevice, name, fault)
            _, end = chain(ActivationStore(), 2)
            with pytest.raises(RaceError):
                end.sum().backward()
