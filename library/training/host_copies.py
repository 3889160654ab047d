"""What a device has learned comes to main memory while the device goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Merge = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""changes its first tensors by the second ones, all in main memory"""
MOST_ON_THE_WAY = 2
"""parts whose page-locked memory is held at once"""


def copies_made(device: torch.device) -> Callable[[], None]:
    """Waits until the device has made all copies that were asked for before this call."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


class HostCopies:
    """Copies of tensors of a device, merged into tensors of main memory by one thread, in the order of the calls.

    `mark(device)` gives what waits for the copies. Who reads the merged tensors calls `settle` before; what was raised on
    the way is raised there, or by the next `add`.
    """

    def __init__(self, mark: Callable[[torch.device], Callable[[], None]] = copies_made) -> None:
        self._mark = mark
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()

    def add(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], merge: Merge) -> None:
        """merge(targets, sources) with the sources as they are now in the order of the device's work. It waits only where
        MOST_ON_THE_WAY are not merged yet."""
        while len(self._pending) >= MOST_ON_THE_WAY:
            self._pending.popleft().result()
        device = sources[0].device
        # torch gives page-locked memory to others only when the copies into it were made
        rooms = [torch.empty_like(source, device="cpu", pin_memory=device.type == "cuda") for source in sources]
        for room, source in zip(rooms, sources, strict=True):
            room.copy_(source, non_blocking=True)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "copies to main memory")
        self._pending.append(self._pool.submit(_merge, self._mark(device), targets, rooms, merge))

    def settle(self) -> None:
        """All that was added is merged."""
        while self._pending:
            self._pending.popleft().result()


@torch.no_grad()
def _merge(
    wait: Callable[[], None], targets: Sequence[torch.Tensor], rooms: Sequence[torch.Tensor], merge: Merge
) -> None:
    wait()
    merge(targets, rooms)
