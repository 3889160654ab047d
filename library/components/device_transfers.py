"""Copies between main memory and a device that run beside the computation there: streams, events and page-locked
memory, apart from what is copied."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""bytes: where pieces of a buffer begin, so that kernels find every matrix as aligned as one of its own"""
CHUNK = 2**28
"""bytes of page-locked memory that are asked for at once, at most"""

Event = Any
"""a point in the work of a queue, which another queue or the host can wait for"""
Pairs = Sequence[tuple[Tensor, Tensor]]
"""(target, source) of copies"""


class Transfers:
    """Copies to and from a device without queues: each is done when the call returns, so there is nothing to wait for.

    The computation and the copies are two queues of work. Each works in order; between them only events order
    anything.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes] bytes on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_buffer(self, nbytes: int) -> Tensor:
        """[nbytes] bytes of main memory, such that copies with it run beside the computation."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def is_fast(self, tensor: Tensor) -> bool:
        """Whether copies from this tensor in main memory run beside the computation, as far as any do."""
        return True

    def computed(self) -> Event:
        """What the computation has been given so far."""
        return None

    @torch.no_grad()
    def copy(self, pairs: Pairs, after: Event) -> Event:
        """Queue copies behind the event `after` of the computation, and all copies before; the event of their end."""
        for target, source in pairs:
            target.copy_(source)

    def keep(self, tensor: Tensor) -> None:
        """The memory of a tensor on the device goes to others only when the copies queued so far are done."""

    def wait(self, event: Event) -> None:
        """The computation goes on when the event has come; the host does not wait."""

    def finish(self, event: Event) -> None:
        """The host waits for the event."""


class StreamTransfers(Transfers):
    """Copies on a stream of their own, of devices that have streams (CUDA, XPU)."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._backend = torch.get_device_module(device)
        self._stream = self._backend.Stream(device)
        self._may_lock = True

    def buffer(self, nbytes: int) -> Tensor:
        buffer = super().buffer(nbytes)
        self.keep(buffer)
        return buffer

    def host_buffer(self, nbytes: int) -> Tensor:
        if self._may_lock:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._may_lock = False
                told = str(error).partition("\n")[0]
                logger.warning(
                    "main memory cannot be page-locked (%s): what waits there is copied more slowly, and the host waits"
                    " for it", told
                )  # fmt: skip
        return super().host_buffer(nbytes)

    def is_fast(self, tensor: Tensor) -> bool:
        return not self._may_lock or tensor.is_pinned()

    def computed(self) -> Event:
        return self._backend.current_stream(self.device).record_event()

    @torch.no_grad()
    def copy(self, pairs: Pairs, after: Event) -> Event:
        self._stream.wait_event(after)
        with self._backend.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def wait(self, event: Event) -> None:
        self._backend.current_stream(self.device).wait_event(event)

    def finish(self, event: Event) -> None:
        event.synchronize()


@cache
def transfers_to(device: torch.device) -> Transfers | None:
    """The copies to a device; None where it computes in main memory, or does not compute at all."""
    if device.type in ("cpu", "meta"):
        return None
    return StreamTransfers(device) if hasattr(torch.get_device_module(device), "Stream") else Transfers(device)


def pieces(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Room for tensors of these shapes and types in a buffer of at least `room_for(like)` bytes, one behind the
    other."""
    found, begin = [], 0
    for tensor in like:
        part = buffer[begin : begin + tensor.numel() * tensor.itemsize]
        found.append(part.view(tensor.dtype).view(tensor.shape))
        begin += _aligned(tensor)
    return found


def room_for(tensors: Sequence[Tensor]) -> int:
    """Bytes of a buffer that holds all of them."""
    return sum(_aligned(tensor) for tensor in tensors)


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT


class HostMemory:
    """Page-locked main memory for many tensors. torch rounds every request of it up to a power of two, half of which
    matrices would waste; here they are put into chunks of such a size. `expected`: bytes that it will hold."""

    def __init__(self, transfers: Transfers, expected: int) -> None:
        self._transfers = transfers
        self._chunk = min(CHUNK, 1 << max(expected - 1, 0).bit_length())
        self._open: list[tuple[Tensor, int]] = []
        """chunks with the number of bytes that are taken"""

    def hold(self, tensor: Tensor) -> Tensor:
        """The tensor itself where it lies in main memory so that copies from it run beside the computation, or a copy
        that does."""
        if tensor.device.type == "cpu" and tensor.is_contiguous() and self._transfers.is_fast(tensor):
            return tensor
        (room,) = pieces(self._take(_aligned(tensor)), [tensor])
        return room.copy_(tensor.detach())

    def _take(self, nbytes: int) -> Tensor:
        if nbytes > self._chunk:
            return self._transfers.host_buffer(nbytes)
        for number, (chunk, taken) in enumerate(self._open):
            if taken + nbytes <= self._chunk:
                self._open[number] = (chunk, taken + nbytes)
                return chunk[taken : taken + nbytes]
        chunk = self._transfers.host_buffer(self._chunk)
        self._open.append((chunk, nbytes))
        return chunk[:nbytes]
