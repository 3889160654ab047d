"""Block swap as other code drives it: by hand, around each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from library.components.block_ring import BlockOffloader


def swappable_weights(layer: nn.Module) -> list[nn.Parameter]:
    """`weight` of each linear layer or convolution inside."""
    return [
        module.weight
        for module in layer.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and isinstance(module.weight, nn.Parameter)
    ]


def weighs_to_device(layer: nn.Module, device: torch.device) -> None:
    """Move these weights; biases, norms and buffers stay where they are."""
    for weight in swappable_weights(layer):
        weight.data = weight.data.to(device)


def swap_weight_devices_no_cuda(device: torch.device, layer_to_cpu: nn.Module, layer_to_cuda: nn.Module) -> None:
    """Weights of `layer_to_cpu` go to the CPU, those of `layer_to_cuda` to the device, and are there on return."""
    weighs_to_device(layer_to_cpu, torch.device("cpu"))
    weighs_to_device(layer_to_cuda, device)


swap_weight_devices_cuda = swap_weight_devices_no_cuda  # the memory that the one frees is what the other gets


class Offloader:
    """Exchanges the weights of two blocks between the CPU and a device."""

    def __init__(self, num_blocks: int, blocks_to_swap: int, device: torch.device, debug: bool = False) -> None:
        self.num_blocks = num_blocks
        self.blocks_to_swap = blocks_to_swap
        self.device = torch.device(device)
        self.debug = debug

    def swap_weight_devices(self, block_to_cpu: nn.Module, block_to_cuda: nn.Module) -> None:
        swap_weight_devices_no_cuda(self.device, block_to_cpu, block_to_cuda)


class ModelOffloader(BlockOffloader, Offloader):
    """Swaps a row of blocks: `prepare_block_devices_before_forward` before a forward, `wait_for_block` before each
    block and `submit_move_blocks` after it. The backward pass brings the blocks back by itself; `debug` is taken and
    changes nothing. The work is that of BlockOffloader, which has the blocks: the row that the methods get is the one
    given here."""

    def __init__(
        self, blocks: Sequence[nn.Module], blocks_to_swap: int, device: torch.device, debug: bool = False
    ) -> None:
        Offloader.__init__(self, len(blocks), blocks_to_swap, device, debug)
        BlockOffloader.__init__(self, blocks, blocks_to_swap, device)
        self.forward_only = False
        for index, block in enumerate(self.blocks if self.active else ()):
            block.register_full_backward_pre_hook(lambda module, gradients, index=index: self._on_backward(index))

    def _on_backward(self, index: int) -> None:
        if not self.forward_only:
            self.before_backward(index)

    def set_forward_only(self, forward_only: bool) -> None:
        """Without a backward pass nothing has to come back; the next forward begins anew anyway."""
        self.forward_only = forward_only

    def prepare_block_devices_before_forward(self, blocks: Sequence[nn.Module]) -> None:
        if self.active:
            travelling = {id(tensor) for tensor in self.travellers()}
            for block in self.blocks:
                for tensor in (*block.parameters(), *block.buffers()):
                    if id(tensor) not in travelling:
                        tensor.data = tensor.data.to(self.device)
        self.arm()

    def wait_for_block(self, block_idx: int) -> None:
        self.before_block(block_idx)

    def submit_move_blocks(self, blocks: Sequence[nn.Module], block_idx: int) -> None:
        self.release(block_idx, comes_back=torch.is_grad_enabled() and not self.forward_only)


def create_cpu_offloading_wrapper(func: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """`func` for inputs that wait on the CPU: they go to `device`, and what comes out goes back."""

    def wrapped(*inputs: Any) -> Any:
        outputs = func(*tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))
        return tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), outputs)

    return wrapped
