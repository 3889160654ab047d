"""Keeping weights and activations off the device: swapped blocks and checkpoints stored on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(
    __name__, homes("library.compat.offloading", "Offloader", "ModelOffloader", "create_cpu_offloading_wrapper")
)


def run_checkpointed(function: Callable[..., Any], hidden: Sequence[Tensor], cpu_offload: bool = False) -> Any:
    """function(*hidden), recomputed in the backward pass; with `cpu_offload` the kept inputs wait on the CPU.

    Only `hidden` counts as input: what `function` captured (conditioning, positions) is shared by all blocks and stays.
    """
    # the inputs of a non-reentrant checkpoint are ordinary saved tensors, so the saved-tensor hooks of torch apply to
    # them
    place = torch.autograd.graph.save_on_cpu() if cpu_offload else nullcontext()
    with place:
        return checkpoint(function, *hidden, use_reentrant=False)


def weighs_to_device(layer: nn.Module, device: torch.device) -> None:
    """Move the `weight` of every sub-module; biases, norms and buffers stay where they are."""
    for weight in swappable_weights(layer).values():
        weight.data = weight.data.to(device)


def swappable_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> the parameters that block swap moves: `weight` of each linear or convolution inside."""
    return {
        name: module.weight
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and isinstance(module.weight, nn.Parameter)
    }


class BlockOffloader:
    """Swaps the weights of a row of equal blocks between CPU and device while the row runs forward and backward.

    Of N blocks, S are away at any time. A forward starts with blocks 0..N-S-1 on the device; as soon as block i < S has
    run, its place is given to block N-S+i. The backward pass goes the same way back. A transfer runs in one worker
    thread on a stream of its own and is awaited before the block is used. Whatever layout a pass leaves behind (no
    backward, an exception, a second forward), `arm` restores the start layout, and a block that is needed is fetched.
    On a CPU device every method does nothing.
    """

    def __init__(self, blocks: Sequence[nn.Module], num_swapped: int, device: torch.device) -> None:
        self.device = torch.device(device)
        self.active = num_swapped > 0 and self.device.type != "cpu"
        self.blocks = list(blocks)
        self.weights = [swappable_weights(block) for block in self.blocks]
        self.num_swapped = num_swapped
        self.pending: dict[int, Future] = {}
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-swap") if self.active else None
        self.stream = torch.cuda.Stream(self.device) if self.active and self.device.type == "cuda" else None

    @property
    def first_away(self) -> int:
        return len(self.blocks) - self.num_swapped

    def cpu_weights(self) -> list[nn.Parameter]:
        """The weights that are on the CPU when a forward starts."""
        return [weight for block in self.weights[self.first_away :] for weight in block.values()] if self.active else []

    def is_here(self, index: int) -> bool:
        return all(weight.device.type == self.device.type for weight in self.weights[index].values())

    def bring(self, index: int) -> None:
        weighs_to_device(self.blocks[index], self.device)

    def send_away(self, index: int) -> None:
        weighs_to_device(self.blocks[index], torch.device("cpu"))

    def swap(self, outgoing: int, incoming: int, ready: torch.cuda.Event | None) -> None:
        """Exchange the places of two blocks; runs in the worker thread."""
        if self.stream is None:
            swap_weight_devices_no_cuda(self.device, self.blocks[outgoing], self.blocks[incoming])
        else:
            swap_weight_devices_cuda(self.device, self.blocks[outgoing], self.blocks[incoming], self.stream, ready)

    def arm(self) -> None:
        """Restore the layout that a forward starts with."""
        if not self.active:
            return
        self._wait_all()
        for index in range(self.first_away, len(self.blocks)):  # first make room, then fetch
            self.send_away(index)
        for index in range(self.first_away):
            self._fetch(index)

    def before_block(self, index: int) -> None:
        if self.active:
            self._fetch(index)

    def after_block(self, index: int, outputs: Sequence[Tensor]) -> None:
        """Start the transfer that block `index` makes room for, and arrange its return for the backward pass."""
        if not self.active:
            return
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda grad, index=index: self.before_backward(index))
        if index < self.num_swapped:
            self._exchange(index, self.first_away + index)

    def before_backward(self, index: int) -> None:
        """Gradients have reached the output of a block: the one after it is done, the next ones will be needed."""
        done = len(self.blocks) - 1 - index
        if 0 < done <= self.num_swapped:
            self._exchange(index + 1, self.num_swapped - done)
        self._fetch(index)

    def _fetch(self, index: int) -> None:
        if index in self.pending:
            self.pending.pop(index).result()
        if not self.is_here(index):
            self.bring(index)

    def _exchange(self, outgoing: int, incoming: int) -> None:
        if (
            self._is_moving(outgoing)
            or self._is_moving(incoming)
            or self.is_here(incoming)
            or not self.is_here(outgoing)
        ):
            return
        # the transfer may overwrite the outgoing weights only after the work queued so far has read them
        ready = torch.cuda.current_stream(self.device).record_event() if self.stream is not None else None
        self.pending[outgoing] = self.pending[incoming] = self.worker.submit(self.swap, outgoing, incoming, ready)

    def _is_moving(self, index: int) -> bool:
        return index in self.pending and not self.pending[index].done()

    def _wait_all(self) -> None:
        for index in list(self.pending):
            self.pending.pop(index).result()


def moving_weights(module: nn.Module) -> set[nn.Parameter]:
    """Those of a denoiser that change their memory while it runs."""
    active = (one for one in getattr(module, "offloaders", ()) if one is not None and one.active)
    return {weight for offloader in active for block in offloader.weights for weight in block.values()}


BLOCKS_THAT_STAY = 2
"""of a row of blocks, where a family does not say otherwise"""


class BlockStackMixin:
    """What a denoiser made of rows of equal blocks does with its memory: checkpoints, and blocks that wait on the CPU.

    A module calls `init_block_stack` in its constructor, runs its blocks through `run_block`, and fills `offloaders`
    (one per row of blocks, None = that row stays) in its own `enable_block_swap`.
    """

    training: bool
    gradient_checkpointing: bool
    cpu_offload_checkpointing: bool
    offloaders: tuple[BlockOffloader | None, ...]
    blocks_that_stay: ClassVar[int] = BLOCKS_THAT_STAY
    """of each row, with block swap"""

    def init_block_stack(self, num_rows: int) -> None:
        self.gradient_checkpointing = False
        self.cpu_offload_checkpointing = False
        self.offloaders = (None,) * num_rows

    def swap_row(self, blocks: nn.ModuleList, blocks_to_swap: int, device: torch.device) -> None:
        """`enable_block_swap` where one row of blocks takes part. ValueError when more are asked for than
        `row_swap_problem` allows."""
        problem = row_swap_problem(blocks_to_swap, len(blocks), self.blocks_that_stay)
        if problem:
            raise ValueError(problem)
        self.offloaders = (BlockOffloader(blocks, blocks_to_swap, device) if blocks_to_swap else None,)

    def run_block(
        self, block: nn.Module, index: int, offloader: BlockOffloader | None, hidden: tuple[Tensor, ...], context: tuple
    ) -> tuple[Tensor, ...]:
        """One block on its hidden states, checkpointed and with its weights fetched where that is switched on."""
        if offloader is not None:
            offloader.before_block(index)
        # autograd keeps the weights that a block ran with; where they move meanwhile, the block has to run again
        moving = offloader is not None and offloader.active
        if torch.is_grad_enabled() and (moving or (self.gradient_checkpointing and self.training)):
            output = run_checkpointed(lambda *states: block(*states, *context), hidden, self.cpu_offload_checkpointing)
        else:
            output = block(*hidden, *context)
        outputs = output if isinstance(output, tuple) else (output,)
        if offloader is not None:
            offloader.after_block(index, outputs)
        return outputs

    def enable_gradient_checkpointing(self, cpu_offload: bool = False) -> None:
        """Recompute blocks in the backward pass while in train mode; `cpu_offload` keeps the block inputs on the
        CPU."""
        self.gradient_checkpointing = True
        self.cpu_offload_checkpointing = cpu_offload

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False
        self.cpu_offload_checkpointing = False

    def prepare_block_swap_before_forward(self) -> None:
        """Bring the swapped blocks into the layout a forward starts with; costs nothing when they are in it."""
        for offloader in self.offloaders:
            if offloader is not None:
                offloader.arm()

    def move_to_device_except_swap_blocks(self, device: torch.device) -> None:
        """Move everything but the weights that block swap keeps on the CPU."""
        swapped = {
            id(weight) for offloader in self.offloaders if offloader is not None for weight in offloader.cpu_weights()
        }
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in swapped:
                    parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self.prepare_block_swap_before_forward()


class StreamStackMixin(BlockStackMixin):
    """Block swap of a denoiser with a row of double stream blocks and a row of single stream blocks."""

    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList

    def repeated_blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def enable_block_swap(self, blocks_to_swap: int, device: torch.device) -> None:
        """Keep the weights of some blocks on the CPU while others compute. On a CPU `device` nothing moves.

        ValueError when more blocks are asked for than `stream_swap_problem` allows.
        """
        numbers = (len(self.double_blocks), len(self.single_blocks))
        problem = stream_swap_problem(blocks_to_swap, *numbers, self.blocks_that_stay)
        if problem:
            raise ValueError(problem)
        num_double, num_single = split_blocks_to_swap(blocks_to_swap)
        self.offloaders = (
            BlockOffloader(self.double_blocks, num_double, device) if num_double else None,
            BlockOffloader(self.single_blocks, num_single, device) if num_single else None,
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


def swap_weight_devices_no_cuda(device: torch.device, layer_to_cpu: nn.Module, layer_to_cuda: nn.Module) -> None:
    """Weights of `layer_to_cpu` go to the CPU, those of `layer_to_cuda` to the device."""
    weighs_to_device(layer_to_cpu, torch.device("cpu"))
    weighs_to_device(layer_to_cuda, device)


def swap_weight_devices_cuda(
    device: torch.device, layer_to_cpu: nn.Module, layer_to_cuda: nn.Module, stream: torch.cuda.Stream | None = None,
    ready: torch.cuda.Event | None = None,
) -> None:
    """Exchange the storages of two equal blocks on `stream` (the present one when None), so that no new device memory
    is taken.

    Weights without a partner of the same name, shape and type are moved on their own.
    """
    stream = torch.cuda.current_stream(device) if stream is None else stream
    leaving, arriving = swappable_weights(layer_to_cpu), swappable_weights(layer_to_cuda)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        if ready is not None:
            stream.wait_event(ready)
        for name, parameter in arriving.items():
            partner = leaving.pop(name, None)
            if partner is None or partner.shape != parameter.shape or partner.dtype != parameter.dtype:
                if partner is not None:
                    partner.data = partner.data.to("cpu")
                parameter.data = parameter.data.to(device)
                continue
            place, source = partner.data, parameter.data
            partner.data = place.to("cpu")
            place.copy_(source)
            parameter.data = place
        for parameter in leaving.values():
            parameter.data = parameter.data.to("cpu")
    stream.synchronize()
