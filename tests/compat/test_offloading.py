"""Block swap by the known calls: the results of a model that swaps nothing, whichever blocks are away."""

import pytest
import torch

from library import custom_offloading_utils as known
from tests.simulated_device import simulated_device


class Row(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(6))

    def forward(self, x, offloader=None):
        for index, block in enumerate(self.blocks):
            if offloader is not None:
                offloader.wait_for_block(index)
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                offloader.submit_move_blocks(self.blocks, index)
            else:
                x = block(x)
        return x


def gradients(model, offloader=None):
    x = torch.ones(2, 4, requires_grad=True)
    if offloader is not None:
        offloader.prepare_block_devices_before_forward(model.blocks)
    out = model(x, offloader)
    out.square().sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("swapped", [1, 3, 5])
def test_swapped_blocks_give_the_same_result(swapped):
    expected = gradients(Row())
    with simulated_device() as device, device.watching():
        model = Row().requires_grad_(False)
        offloader = known.ModelOffloader(model.blocks, swapped, torch.device("cpu"))
        for number in (1, 2):
            for value, wanted in zip(gradients(model, offloader), expected, strict=True):
                assert torch.equal(value, wanted)
            assert len(device.copies) == number * (2 * swapped + offloader.ring_size)
        assert offloader.blocks_to_swap == swapped
        offloader.set_forward_only(True)
        with torch.no_grad():
            for _ in range(2):
                offloader.prepare_block_devices_before_forward(model.blocks)
                assert torch.equal(model(torch.ones(2, 4), offloader), expected[0])


def test_the_four_arguments_and_a_cpu_that_moves_nothing():
    model = Row()
    offloader = known.ModelOffloader(model.blocks, 2, torch.device("cpu"), True)
    assert isinstance(offloader, known.Offloader) and offloader.num_blocks == 6 and offloader.debug
    for value, wanted in zip(gradients(model, offloader), gradients(Row()), strict=True):
        assert torch.equal(value, wanted)


def test_single_exchanges_and_moves():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    weight = second.weight.detach().clone()
    offloader = known.Offloader(2, 1, torch.device("cpu"))
    offloader.swap_weight_devices(first, second)
    known.swap_weight_devices_cuda(torch.device("cpu"), second, first)
    known.swap_weight_devices_no_cuda(torch.device("cpu"), first, second)
    known.weighs_to_device(second, torch.device("cpu"))
    assert torch.equal(second.weight, weight)


def test_inputs_that_wait_on_the_cpu():
    double = known.create_cpu_offloading_wrapper(lambda x, kept: (x * 2, kept), torch.device("cpu"))
    out, kept = double(torch.ones(2), "text")
    assert torch.equal(out, torch.full((2,), 2.0)) and kept == "text"
