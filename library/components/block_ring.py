"""Block swap: of a row of blocks, some lie in main memory and come to the device for as long as they compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.components.device_transfers import Event, HostMemory, pieces, room_for, transfers_to

RING_SIZE = 2
"""places on the device for blocks that travel: one computes, the next arrives meanwhile"""


NO_PASS = -1
"""instead of the number of a backward pass"""


@dataclass
class Traveller:
    """A block whose matrices travel. `homes` are those in main memory and `here` those in its place on the device, while
    it has one."""

    number: int
    """in its row"""
    tensors: list[Tensor]
    homes: list[Tensor] = field(default_factory=list)
    here: list[Tensor] = field(default_factory=list)
    is_used: bool = False
    """whether its tensors are the ones on the device"""
    has_learned: bool = False
    """whether those that learn may have changed there"""


@dataclass
class Place:
    """Memory on the device for one block at a time."""

    buffer: Tensor
    holds: Traveller | None = None
    arrived: Event = None
    """when the copies of what it holds are complete"""


@dataclass(frozen=True)
class Lent:
    """A tensor that autograd keeps, in the memory of a place: which block and which part of it. Other blocks come to
    lie there before the backward pass wants it."""

    traveller: Traveller
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class BlockOffloader:
    """Moves the matrices of a row of equal blocks to the device and away while the row runs forward and backward.

    Of N blocks, N - S are on the device at most. Some stay there; the others travel, spread evenly over the row, so
    that blocks that stay compute while others arrive. A travelling block has a place in a ring of R on the device, by
    its number among them modulo R: N - S - R blocks stay, S + R travel. The copy in main memory stays valid, so that a
    frozen block only ever goes to the device, and is simply overwritten there; matrices that learn are copied back when
    a backward pass is through with them.

    When a block is done, its place gets the one that is needed next in the direction of the pass: the last R blocks of
    a forward pass stay for the backward pass behind it. Copies wait for the computation that has read their place, and
    blocks for their copies, by events; the host waits for neither. Between passes all matrices lie in main memory, where
    they are read and written like others, after `bring_home`: the host runs ahead of the device, whose copies may still
    be under way. Whatever a pass leaves behind (no backward, an exception, a second forward), `arm` begins anew, and a
    block that is needed out of turn is fetched. On a CPU device every method does nothing.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], num_swapped: int, device: torch.device, ring_size: int = RING_SIZE
    ) -> None:
        self.device = torch.device(device)
        self.blocks = list(blocks)
        self.num_swapped = num_swapped
        self._transfers = transfers_to(self.device) if num_swapped > 0 else None
        self.ring_size, travel = travelling(len(self.blocks), num_swapped, ring_size) if self.active else (0, [])
        self._travellers = [Traveller(number, matrices_of(self.blocks[number])) for number in travel]
        self._ordinals = {number: ordinal for ordinal, number in enumerate(travel)}
        self._places: list[Place] = []
        self._copied: Event = None
        """the end of all copies so far"""
        self._backward_pass = NO_PASS

    @property
    def active(self) -> bool:
        return self._transfers is not None

    def travellers(self) -> Iterator[Tensor]:
        """Those that lie in main memory between passes."""
        return (tensor for traveller in self._travellers for tensor in traveller.tensors)

    # -- the pass ------------------------------------------------------------------------------------------------------

    def arm(self) -> None:
        """A forward pass begins: the first blocks set out."""
        if not self.active:
            return
        self._leave_all()
        if not self._places:
            self._make_places()
        self._expect(self._travellers[: self.ring_size])

    def before_block(self, index: int) -> None:
        """Block `index` is about to compute, in a forward pass or when it computes again in a backward pass."""
        if index in self._ordinals:
            self._use(self._travellers[self._ordinals[index]])

    def after_block(self, index: int, outputs: Sequence[Tensor]) -> None:
        """A block has computed, or has been left out: its place is free for the next. `outputs`: what the backward pass
        comes by, if there is to be one."""
        if not self.active:
            return
        comes_back = [output for output in outputs if output.requires_grad]
        for output in comes_back:
            output.register_hook(lambda grad, index=index: self.before_backward(index))
        self.release(index, comes_back=bool(comes_back))

    def release(self, index: int, *, comes_back: bool) -> None:
        """`after_block`, told whether there is to be a backward pass."""
        if not self.active:
            return
        self._expect([one for one in self._travellers if one.number > index][: self.ring_size])
        if index == len(self.blocks) - 1 and not comes_back:
            self._leave_all()

    def before_backward(self, index: int) -> None:
        """Gradients have reached the output of a block: those behind it are done."""
        if not self.active:
            return
        self.before_block(index)  # its weights may be updated here, without being read before
        self._expect([one for one in reversed(self._travellers) if one.number <= index][: self.ring_size])

    def bring_home(self) -> None:
        """Between passes: all matrices lie in main memory, complete, and no copy works on them. The host waits for
        that."""
        if not self.active:
            return
        self._leave_all()
        if self._copied is not None:
            self._transfers.finish(self._copied)
            self._copied = None

    def keeping(self, index: int) -> AbstractContextManager[Any]:
        """Inside, a block computes without a checkpoint: what autograd would keep of its matrices is looked up again in
        the backward pass, as others come to lie in their memory. By whatever way gradients come to a block, also
        beside its outputs, it is fetched for them."""
        traveller = self._travellers[self._ordinals[index]]
        memory = self._place_of(traveller).buffer.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> Tensor | Lent:
            if tensor.untyped_storage().data_ptr() != memory:
                return tensor.detach()
            return Lent(traveller, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

        return saved_tensors_hooks(pack, self._unpack)

    def travels(self, index: int) -> bool:
        return index in self._ordinals

    # -- the ring ------------------------------------------------------------------------------------------------------

    def _make_places(self) -> None:
        room = max(room_for(one.tensors) for one in self._travellers)
        self._places = [Place(self._transfers.buffer(room)) for _ in range(self.ring_size)]
        self._host = HostMemory(self._transfers, sum(room_for(one.tensors) for one in self._travellers))

    def _place_of(self, traveller: Traveller) -> Place:
        return self._places[self._ordinals[traveller.number] % self.ring_size]

    def _expect(self, wanted: Sequence[Traveller]) -> None:
        """Let these set out; they follow each other, so each has a place of its own."""
        for traveller in wanted:
            if self._place_of(traveller).holds is not traveller:
                self._load(traveller)

    def _load(self, traveller: Traveller) -> None:
        place = self._place_of(traveller)
        self._leave(place)
        traveller.homes = [self._host.hold(tensor.data) for tensor in traveller.tensors]
        for tensor, home in zip(traveller.tensors, traveller.homes):
            tensor.data = home
        traveller.here = pieces(place.buffer, traveller.tensors)
        pairs = list(zip(traveller.here, traveller.homes))
        # what has been queued so far may still read the block that lay there
        place.arrived = self._copied = self._transfers.copy(pairs, after=self._transfers.computed())
        place.holds = traveller

    def _use(self, traveller: Traveller) -> None:
        place = self._place_of(traveller)
        if place.holds is not traveller:
            self._load(traveller)
        traveller.has_learned |= self._in_backward()
        if traveller.is_used:
            return
        self._transfers.wait(place.arrived)
        for tensor, here in zip(traveller.tensors, traveller.here):
            tensor.data = here
        traveller.is_used = True

    def _leave(self, place: Place) -> None:
        """Empty a place. What has learned goes home first; the copies behind it wait for that, being of one queue."""
        traveller, place.holds = place.holds, None
        if traveller is None or not traveller.is_used:
            return
        if traveller.has_learned:
            pairs = [
                (home, tensor.data)
                for tensor, home in zip(traveller.tensors, traveller.homes)
                if tensor.requires_grad
            ]
            if pairs:
                self._copied = self._transfers.copy(pairs, after=self._transfers.computed())
        for tensor, home in zip(traveller.tensors, traveller.homes):
            tensor.data = home
        traveller.is_used = traveller.has_learned = False

    def _leave_all(self) -> None:
        for place in self._places:
            self._leave(place)

    def _in_backward(self) -> bool:
        """Whether autograd is computing gradients. All leave when it is through."""
        current = torch._C._current_graph_task_id()  # by which torch's own checkpoints tell, too
        if current not in (NO_PASS, self._backward_pass):
            self._backward_pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_all)
        return current != NO_PASS

    def _unpack(self, kept: Tensor | Lent) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._use(kept.traveller)
        memory = self._place_of(kept.traveller).buffer.view(kept.dtype)
        return memory.as_strided(kept.size, kept.stride, kept.offset)


def travelling(total: int, num_swapped: int, ring_size: int) -> tuple[int, list[int]]:
    """(places in the ring, the numbers of the blocks that travel) of a row of `total` blocks."""
    places = max(min(ring_size, total - num_swapped), 1)
    return places, spread_evenly(min(num_swapped + places, total), total)


def swapped_bytes(blocks: Sequence[nn.Module], num_swapped: int, ring_size: int) -> tuple[int, int]:
    """(bytes of the matrices that lie in main memory, bytes on the device for those of them that compute) of a row, of
    which nothing need be loaded."""
    if not num_swapped:
        return 0, 0
    places, numbers = travelling(len(blocks), num_swapped, ring_size)
    rooms = [room_for(matrices_of(blocks[number])) for number in numbers]
    return sum(rooms), places * max(rooms)


def spread_evenly(count: int, total: int) -> list[int]:
    """`count` of the numbers below `total`, in the middles of stretches of equal length."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def matrices_of(block: nn.Module) -> list[Tensor]:
    """What travels of a block: parameters and buffers of two or more dimensions, so weights in any format and with the
    scales of their rows and blocks. Biases, norms and single numbers are small and stay."""
    found = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    return [tensor for tensor in found.values() if tensor.ndim >= 2 and tensor.numel()]


def bring_weights_home(module: nn.Module) -> set[Tensor]:
    """For those who read or write the weights of a denoiser between its passes: those that travel lie in main memory,
    complete, until it runs again. Returns them."""
    offloaders = [one for one in getattr(module, "offloaders", ()) if one is not None]
    for one in offloaders:
        one.bring_home()
    return {tensor for one in offloaders for tensor in one.travellers()}
