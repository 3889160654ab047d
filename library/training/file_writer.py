"""Files of a run that are written while it goes on: their content is copied to main memory, then a thread writes, with
one occasion on its way at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from library.components.device_transfers import CHUNK, pieces, room_for, transfers_to
from library.core.memory_room import available_memory
from library.core.write_errors import HeldFileError

Write = Callable[[], None]
SHARE = 0.5
"""of the main memory that is free, which copies of what is to be written may take"""


class FileWriter:
    """A thread that does the writes of one occasion. What they raise comes out of the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, occasion: Occasion) -> None:
        """Returns when the occasion before this one is done; the thread then has this one."""
        self.settle()
        # no pool: a process that is forked later would believe that it has its thread. Not a daemon: an end waits
        self._thread = threading.Thread(target=self._work, args=(occasion,), name="files", daemon=False)
        self._thread.start()

    def _work(self, occasion: Occasion) -> None:
        try:
            occasion.write_now()
        except BaseException as error:  # raised where it is asked for
            self._error = error

    def settle(self) -> None:
        """All is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def has_ended(self) -> bool:
        """The thread has nothing left to do: `settle` waits for nothing, and raises what was raised."""
        return self._thread is not None and not self._thread.is_alive()


class Occasion:
    """The writes of one occasion, in their order; see postponed_writes.Postponed.

    What another program keeps from its place is kept under another name, told in `held`, and the rest is written.
    `may_wait`: whether it takes files of weights, which are then copied.
    """

    def __init__(self, may_wait: bool = True) -> None:
        self._may_wait = may_wait
        self._writes: list[Write] = []
        self.held: list[HeldFileError] = []

    def takes(self, nbytes: int) -> bool:
        room = available_memory() if self._may_wait else None
        if room is not None and nbytes <= SHARE * room:
            return True
        self.write_now()
        return False

    def add(self, write: Write) -> None:
        self._writes.append(write)

    def write_now(self) -> None:
        """All that was added so far is written when the call returns."""
        while self._writes:
            try:
                self._writes.pop(0)()  # what a write holds goes with it
            except HeldFileError as error:
                self.held.append(error)

    @torch.no_grad()
    def copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What comes from a device does so in the order of the device's work, which need not be done."""
        copies: dict[str, torch.Tensor] = {}
        for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
            part = {key: tensor.detach() for key, tensor in tensors.items() if tensor.device == device}
            copies |= self._from_device(device, part)
        return {key: copies[key] for key in tensors}

    def _from_device(self, device: torch.device, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        transfers = transfers_to(device)
        if transfers is None:
            return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in part.items()}
        sources = list(part.values())
        size = room_for(sources)  # page-locked memory is never given back: none for whole models
        room = transfers.host_buffer(size) if size <= CHUNK else torch.empty(size, dtype=torch.uint8)
        rooms = pieces(room, sources)
        made = transfers.copy(list(zip(rooms, sources, strict=True)), transfers.computed())
        transfers.wait(made)  # the weights change, and their memory goes to others, only then
        self.add(lambda: transfers.finish(made))
        return dict(zip(part, rooms, strict=True))
