"""Gradient checkpointing, and inputs of checkpoints that wait in main memory until the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from library.components.device_transfers import Event, transfers_to
from library.core.forward_values import checkpoint_contexts

AHEAD = 2
"""how many tensors are on their way back when the backward pass asks for one: those of the block before it, which has
one of pictures and one of text"""


class Away:
    """A tensor of a device that waits in main memory."""

    def __init__(self, device: torch.device, home: Tensor) -> None:
        self.device = device
        self.home = home
        self.back: Tensor | None = None
        """on the device again, once `arrived` has come"""
        self.arrived: Event = None


class ActivationStore:
    """Takes what autograd keeps to page-locked main memory while the computation goes on, and back in reverse order, a
    few tensors ahead of the backward pass. The host waits for neither."""

    def __init__(self) -> None:
        self._away: list[weakref.ref[Away]] = []
        """in the order in which they left; autograd holds them, and drops them with its graph"""

    def keeping(self) -> saved_tensors_hooks:
        """Inside, what autograd keeps of operations waits in main memory. On a CPU it stays as it is."""
        return saved_tensors_hooks(self._send, self._fetch)

    def _send(self, tensor: Tensor) -> Tensor | Away:
        transfers = transfers_to(tensor.device)
        tensor = tensor.detach()
        if transfers is None or not tensor.numel():
            return tensor
        # with the strides of the tensor, where it has no gaps: what is computed of it again takes the same way
        strides = torch.empty_like(tensor, device="meta").stride()
        room = transfers.host_buffer(tensor.numel() * tensor.itemsize)
        home = room.view(tensor.dtype).as_strided(tensor.shape, strides)
        transfers.copy([(home, tensor)], after=transfers.computed())
        transfers.keep(tensor)
        away = Away(tensor.device, home)
        self._away = [*(one for one in self._away if one() is not None), weakref.ref(away)]
        return away

    def _fetch(self, kept: Tensor | Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        waiting = [one for one in (reference() for reference in self._away) if one is not None]
        place = waiting.index(kept)
        for one in reversed(waiting[max(place - AHEAD, 0) : place + 1]):
            if one.back is None:
                self._set_out(one)
        transfers_to(kept.device).wait(kept.arrived)
        back, kept.back = kept.back, None
        return back

    def _set_out(self, one: Away) -> None:
        transfers = transfers_to(one.device)
        one.back = torch.empty_like(one.home, device=one.device)
        # its memory may have been another tensor's, with which the computation is not through yet
        one.arrived = transfers.copy([(one.back, one.home)], after=transfers.computed())
        transfers.keep(one.back)


_STORE = ActivationStore()


def run_checkpointed(function: Callable[..., Any], hidden: Sequence[Tensor], cpu_offload: bool = False) -> Any:
    """function(*hidden), recomputed in the backward pass; with `cpu_offload` the kept inputs wait in main memory.

    Only `hidden` counts as input: what `function` captured (conditioning, positions) is shared by all blocks and stays.
    """
    # the inputs of a non-reentrant checkpoint are ordinary saved tensors, so the saved-tensor hooks of torch apply to
    # them
    with _STORE.keeping() if cpu_offload else nullcontext():
        return checkpoint(function, *hidden, use_reentrant=False, context_fn=checkpoint_contexts)
