"""A device in main memory whose copies take as long as they are allowed to: they are done when somebody waits for them
and not before, and until then their targets hold garbage. While it watches, it sees every operation of torch, and
raises RaceError for one that a real device might have run too early, or on memory that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.components import activation_offload, block_ring
from library.components.device_transfers import Transfers


class RaceError(AssertionError):
    """Work of one queue that depends on another's, without having waited for it."""


@dataclass
class Copy:
    number: int
    pairs: list[tuple[Tensor, Tensor]]


@dataclass
class SimulatedDevice(Transfers):
    """`copies` and `buffers` tell what was asked of it."""

    device: torch.device = torch.device("cpu")
    copies: list[Copy] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    sent: int = 0
    """copies of single tensors to main memory"""

    def __post_init__(self) -> None:
        self._home: dict[int, Tensor] = {}
        self._unseen: set[int] = set()
        """memory that the host may not look at, as copies to it may not be done"""
        self._awaited: set[int] = set()
        """targets of copies for which the computation has not waited"""
        self._read: set[int] = set()
        """their sources"""
        self._done = 0
        """how many of the copies are done"""
        self._finished = 0
        """how many of them the host has seen done"""
        self._touched: dict[int, int] = {}
        self._clock = 0
        self._kept: set[int] = set()
        self._works = False

    def memory_of(self, tensor: Tensor) -> int:
        """What tells one memory from others: on the device that of a whole buffer; in main memory the place of a tensor
        in it, as copies to one do not disturb its neighbours."""
        whole = tensor.untyped_storage().data_ptr()
        return tensor.data_ptr() if whole in self._home else whole

    def is_home(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._home

    # -- what a device does --------------------------------------------------------------------------------------------

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.empty(nbytes, dtype=torch.uint8))
        self.keep(self.buffers[-1])
        return self.buffers[-1]

    def host_buffer(self, nbytes: int) -> Tensor:
        room = torch.empty(nbytes, dtype=torch.uint8)
        self._home[room.data_ptr()] = room
        return room

    def is_fast(self, tensor: Tensor) -> bool:
        return self.is_home(tensor)

    def computed(self) -> int:
        return self._clock

    @torch.no_grad()
    def copy(self, pairs, after: int) -> Copy:
        copy = Copy(len(self.copies), [(target, source) for target, source in pairs])
        with self._at_work():
            for target, source in copy.pairs:
                self._check_copy(target, source, after)
                if self.memory_of(target) in self._awaited | self._read:
                    self._do(len(self.copies) - 1)  # one queue works in order
                target.view(torch.uint8).fill_(255) if target.is_contiguous() else target.fill_(0)
        self.copies.append(copy)
        self._follow()
        return copy

    def _check_copy(self, target: Tensor, source: Tensor, after: int) -> None:
        for tensor in (target, source):
            if self._touched.get(self.memory_of(tensor), -1) >= after:
                raise RaceError("a copy does not wait for the computation with its memory")
        if self.is_home(target) == self.is_home(source):
            raise RaceError("a copy begins and ends at the same place, or in memory that makes it slow")
        if self.is_home(target):
            self.sent += 1
            self._unseen.add(self.memory_of(target))

    def keep(self, tensor: Tensor) -> None:
        self._kept.add(self.memory_of(tensor))

    def wait(self, event: Copy) -> None:
        with self._at_work():
            self._do(event.number)

    def finish(self, event: Copy) -> None:
        self.wait(event)
        self._finished = max(self._finished, event.number + 1)
        self._unseen = {self.memory_of(target) for one in self.copies[self._finished :] for target, _ in one.pairs}

    def _do(self, last: int) -> None:
        """All copies up to this number."""
        for one in self.copies[self._done : last + 1]:
            for target, source in one.pairs:
                if not all(self.is_home(one) or self.memory_of(one) in self._kept for one in (target, source)):
                    raise RaceError("nothing keeps the memory of a copy from others")
                target.copy_(source)
        self._done = max(self._done, last + 1)
        self._follow()

    def _follow(self) -> None:
        pairs = [pair for one in self.copies[self._done :] for pair in one.pairs]
        self._awaited = {self.memory_of(target) for target, _ in pairs}
        self._read = {self.memory_of(source) for _, source in pairs}

    # -- what it watches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        before, self._works = self._works, True
        try:
            yield
        finally:
            self._works = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        with Watch(self.saw):
            yield

    def saw(self, func: Any, tensors: list[Tensor], written: list[Tensor]) -> None:
        """The computation was given an operation, which changes those that are `written`."""
        if self._works:
            return
        if func is torch.ops.aten.copy_.default and self.is_home(tensors[0]):
            return  # the host, filling its own memory before anything is copied from it
        self._clock += 1
        if any(self.is_home(tensor) for tensor in tensors):
            raise RaceError(f"{func} computes with main memory")
        for memory in {self.memory_of(tensor) for tensor in tensors}:
            if memory in self._awaited or memory in self._read and memory in map(self.memory_of, written):
                raise RaceError(f"{func} does not wait for a copy")
            self._touched[memory] = self._clock - 1

    def host_writes(self, tensor: Tensor) -> None:
        """The host is going to change a tensor in main memory."""
        copied = {self.memory_of(one) for copy in self.copies[self._finished :] for pair in copy.pairs for one in pair}
        if self.memory_of(tensor) in copied:
            raise RaceError("the host does not wait for a copy of what it changes")

    def host_reads(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor that the host looks at."""
        if self.memory_of(tensor) in self._unseen:
            raise RaceError("the host does not wait for a copy")
        with self._at_work():
            return tensor.detach().clone()


class Watch(TorchDispatchMode):
    def __init__(self, saw: Callable[[Any, list[Tensor], list[Tensor]], None]) -> None:
        super().__init__()
        self._saw = saw

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func._schema.name):  # which read nothing
            schema = zip(args, func._schema.arguments)
            written = [one for one, told in schema if told.alias_info is not None and told.alias_info.is_write]
            self._saw(func, [*tensors_in(args), *tensors_in((result,))], list(tensors_in(written)))
        return result


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for one in values:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from tensors_in(one)


@contextmanager
def simulated_device() -> Iterator[SimulatedDevice]:
    """Inside, what block swap and activation offload make for the CPU uses this device."""
    device = SimulatedDevice()
    with pytest.MonkeyPatch.context() as patch:
        for module in (block_ring, activation_offload):
            patch.setattr(module, "transfers_to", lambda place: device if place.type == "cpu" else None)
        yield device
