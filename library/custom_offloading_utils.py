"""Where the blocks of a denoiser are kept, and what of them: checkpoints, and blocks that wait in main memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.components.activation_offload import run_checkpointed
from library.components.block_ring import RING_SIZE, BlockOffloader, swapped_bytes
from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    homes(
        "library.compat.offloading", "Offloader", "ModelOffloader", "create_cpu_offloading_wrapper", "weighs_to_device",
        "swap_weight_devices_cuda", "swap_weight_devices_no_cuda",
    ),
)  # fmt: skip


class CheckpointedBlocks:
    """The switches of gradient checkpointing. A module calls `init_checkpointing` in its constructor and runs its
    blocks through `checkpointed`."""

    training: bool
    gradient_checkpointing: bool
    cpu_offload_checkpointing: bool

    def init_checkpointing(self) -> None:
        self.disable_gradient_checkpointing()

    def enable_gradient_checkpointing(self, cpu_offload: bool = False) -> None:
        """Recompute blocks in the backward pass while in train mode; `cpu_offload` keeps the block inputs on the
        CPU."""
        self.gradient_checkpointing = True
        self.cpu_offload_checkpointing = cpu_offload

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False
        self.cpu_offload_checkpointing = False

    @property
    def checkpoints(self) -> bool:
        """Whether a block that runs now is to be computed again in the backward pass."""
        return torch.is_grad_enabled() and self.gradient_checkpointing and self.training

    def checkpointed(self, compute: Callable[..., Any], hidden: Sequence[Tensor]) -> Any:
        """compute(*hidden), with a checkpoint where that is switched on."""
        if self.checkpoints:
            return run_checkpointed(compute, hidden, self.cpu_offload_checkpointing)
        return compute(*hidden)


BLOCKS_THAT_STAY = 2
"""of a row of blocks, where a family does not say otherwise"""


class BlockStackMixin(CheckpointedBlocks):
    """What a denoiser made of rows of equal blocks does with its memory: checkpoints, and blocks that wait on the CPU.

    A module calls `init_block_stack` in its constructor, names its `swapped_rows` and runs their blocks through
    `run_block` with the offloader of their row.
    """

    offloaders: tuple[BlockOffloader | None, ...]
    """one per row, None = that row stays"""
    blocks_that_stay: ClassVar[int] = BLOCKS_THAT_STAY
    """of each row, with block swap"""

    def init_block_stack(self, num_rows: int) -> None:
        self.init_checkpointing()
        self.offloaders = (None,) * num_rows
        self._has_begun = False

    def swapped_rows(self) -> tuple[nn.ModuleList, ...]:
        """The rows whose blocks can be swapped, in the order of `offloaders`."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of blocks of these rows, as `feature_layer` counts them."""
        return sum(len(row) for row in self.swapped_rows())

    def split_swap(self, blocks_to_swap: int) -> tuple[int, ...]:
        """How many blocks of each row `--blocks_to_swap` stands for."""
        return (blocks_to_swap,)

    def swap_problem(self, blocks_to_swap: int) -> str | None:
        """What is wrong with a number of blocks to swap, or None."""
        (row,) = self.swapped_rows()
        return row_swap_problem(blocks_to_swap, len(row), self.blocks_that_stay)

    @property
    def most_blocks_to_swap(self) -> int:
        most = 0
        while self.swap_problem(most + 1) is None:
            most += 1
        return most

    def enable_block_swap(self, blocks_to_swap: int, device: torch.device, ring_size: int = RING_SIZE) -> None:
        """Keep the weights of some blocks on the CPU while others compute, with so many places of each row on the
        device for them. On a CPU `device` nothing moves.

        ValueError when more blocks are asked for than `swap_problem` allows.
        """
        problem = self.swap_problem(blocks_to_swap)
        if problem:
            raise ValueError(problem)
        self.offloaders = tuple(
            BlockOffloader(row, count, device, ring_size) if count else None
            for row, count in zip(self.swapped_rows(), self.split_swap(blocks_to_swap), strict=True)
        )

    def swapped_bytes(self, blocks_to_swap: int, ring_size: int = RING_SIZE) -> tuple[int, int]:
        """(bytes of weights that would lie in main memory, bytes on the device for those of them that compute)."""
        rows = zip(self.swapped_rows(), self.split_swap(blocks_to_swap), strict=True)
        sizes = [swapped_bytes(row, count, ring_size) for row, count in rows]
        return sum(home for home, _ in sizes), sum(places for _, places in sizes)

    def run_block(
        self, block: nn.Module, index: int, offloader: BlockOffloader | None, hidden: tuple[Tensor, ...], context: tuple
    ) -> tuple[Tensor, ...]:
        """One block on its hidden states, checkpointed and with its weights fetched where that is switched on."""
        travels = offloader is not None and offloader.travels(index)

        def compute(*states: Tensor) -> Any:
            if travels:
                offloader.before_block(index)
            return block(*states, *context)

        if travels and torch.is_grad_enabled() and not self.checkpoints:
            with offloader.keeping(index):
                output = compute(*hidden)
        else:
            output = self.checkpointed(compute, hidden)
        outputs = output if isinstance(output, tuple) else (output,)
        if offloader is not None:
            offloader.after_block(index, outputs)
        return outputs

    def prepare_block_swap_before_forward(self) -> None:
        """A forward pass begins: what it needs first of the swapped blocks sets out for the device."""
        for offloader in self.offloaders if not self._has_begun else ():
            if offloader is not None:
                offloader.arm()

    @contextmanager
    def as_one_forward(self) -> Iterator[None]:
        """Inside, forwards of several batches go through the blocks together, and begin as one."""
        self.prepare_block_swap_before_forward()
        self._has_begun = True
        try:
            yield
        finally:
            self._has_begun = False

    def move_to_device_except_swap_blocks(self, device: torch.device) -> None:
        """Move everything but the weights that block swap keeps on the CPU."""
        offloaders = [one for one in self.offloaders if one is not None]
        travelling = {id(tensor) for offloader in offloaders for tensor in offloader.travellers()}
        for module in self.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if id(tensor) not in travelling:
                    tensor.data = tensor.data.to(device)


class StreamStackMixin(BlockStackMixin):
    """Block swap of a denoiser with a row of double stream blocks and a row of single stream blocks."""

    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList

    def repeated_blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def swapped_rows(self) -> tuple[nn.ModuleList, ...]:
        return self.double_blocks, self.single_blocks

    def split_swap(self, blocks_to_swap: int) -> tuple[int, ...]:
        return split_blocks_to_swap(blocks_to_swap)

    def swap_problem(self, blocks_to_swap: int) -> str | None:
        return stream_swap_problem(
            blocks_to_swap, len(self.double_blocks), len(self.single_blocks), self.blocks_that_stay
        )


def split_blocks_to_swap(blocks_to_swap: int) -> tuple[int, int]:
    """(double, single) blocks of a denoiser with both that `--blocks_to_swap` stands for; a double block weighs as much
    as two single ones."""
    num_double = blocks_to_swap // 2
    return num_double, (blocks_to_swap - num_double) * 2


def stream_swap_problem(
    blocks_to_swap: int, num_double: int, num_single: int, staying: int = BLOCKS_THAT_STAY
) -> str | None:
    """What is wrong with `--blocks_to_swap` for a denoiser with that many double and single blocks, or None. So many of
    each must stay."""
    if blocks_to_swap < 0:
        return f"--blocks_to_swap is {blocks_to_swap}; it cannot be negative (0 = off)"
    most_double, most_single, allowed = max(num_double - staying, 0), max(num_single - staying, 0), 0
    while (split := split_blocks_to_swap(allowed + 1))[0] <= most_double and split[1] <= most_single:
        allowed += 1
    if blocks_to_swap <= allowed:
        return None
    return (
        f"--blocks_to_swap is {blocks_to_swap}; a model with {num_double} double and {num_single} single blocks"
        f" allows at most {allowed}"
    )


def row_swap_problem(blocks_to_swap: int, num_blocks: int, staying: int = BLOCKS_THAT_STAY) -> str | None:
    """What is wrong with `--blocks_to_swap` for a model of one row of blocks, or None. So many must stay."""
    if blocks_to_swap < 0:
        return f"--blocks_to_swap is {blocks_to_swap}; it cannot be negative (0 = off)"
    allowed = max(num_blocks - staying, 0)
    if blocks_to_swap <= allowed:
        return None
    return f"--blocks_to_swap is {blocks_to_swap}; this model has {num_blocks} blocks, at most {allowed} can be swapped"
