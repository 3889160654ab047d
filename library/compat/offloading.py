"""Block swap as other code drives it: by hand, around each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from library.custom_offloading_utils import BlockOffloader, swap_weight_devices_cuda, swap_weight_devices_no_cuda


class Offloader:
    """Exchanges the weights of two blocks between the CPU and a device."""

    def __init__(self, num_blocks: int, blocks_to_swap: int, device: torch.device, debug: bool = False) -> None:
        self.num_blocks = num_blocks
        self.blocks_to_swap = blocks_to_swap
        self.device = torch.device(device)
        self.debug = debug

    def swap_weight_devices(self, block_to_cpu: nn.Module, block_to_cuda: nn.Module) -> None:
        exchange = swap_weight_devices_cuda if self.device.type == "cuda" else swap_weight_devices_no_cuda
        exchange(self.device, block_to_cpu, block_to_cuda)


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
        """Without a backward pass nothing has to come back; the next forward starts from its own layout anyway."""
        self.forward_only = forward_only

    def prepare_block_devices_before_forward(self, blocks: Sequence[nn.Module]) -> None:
        self.arm()

    def wait_for_block(self, block_idx: int) -> None:
        self.before_block(block_idx)

    def submit_move_blocks(self, blocks: Sequence[nn.Module], block_idx: int) -> None:
        self.after_block(block_idx, ())


def create_cpu_offloading_wrapper(func: Callable[..., Any], device: torch.device | str) -> Callable[..., Any]:
    """`func` for inputs that wait on the CPU: they go to `device`, and what comes out goes back."""

    def wrapped(*inputs: Any) -> Any:
        outputs = func(*tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))
        return tree_map_only(Tensor, lambda tensor: tensor.to("cpu"), outputs)

    return wrapped
