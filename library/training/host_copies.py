"""What a device has learned comes to main memory while the device goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from library.components.device_transfers import Event, Transfers, pieces, room_for, transfers_to

Merge = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""changes its first tensors by the second ones, all in main memory"""
MOST_ON_THE_WAY = 2
"""parts whose page-locked memory is held at once"""


class HostCopies:
    """Copies of tensors of a device, merged into tensors of main memory by one thread, in the order of the calls.

    Who reads the merged tensors calls `settle` before; what was raised on the way is raised there, or by the next
    `add`.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[None]] = deque()

    def add(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], merge: Merge) -> None:
        """merge(targets, sources) with the sources as they are now in the order of the device's work. It waits only
        where MOST_ON_THE_WAY are not merged yet."""
        while len(self._pending) >= MOST_ON_THE_WAY:
            self._pending.popleft().result()
        transfers = transfers_to(sources[0].device) or Transfers(sources[0].device)
        rooms = pieces(transfers.host_buffer(room_for(sources)), sources)
        made = transfers.copy(list(zip(rooms, sources, strict=True)), transfers.computed())
        transfers.wait(made)  # the sources change only then
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "copies to main memory")
        self._pending.append(self._pool.submit(_merge, transfers, made, targets, rooms, merge))

    def settle(self) -> None:
        """All that was added is merged."""
        while self._pending:
            self._pending.popleft().result()


@torch.no_grad()
def _merge(
    transfers: Transfers, made: Event, targets: Sequence[torch.Tensor], rooms: Sequence[torch.Tensor], merge: Merge
) -> None:
    transfers.finish(made)
    merge(targets, rooms)
