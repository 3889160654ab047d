"""What denoisers ask for while they run: a block on the states of one batch, or of several with sizes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from library.components.packed_tokens import Stream
from library.core.courses import Request, run_together

if TYPE_CHECKING:
    from library.components.block_ring import BlockOffloader
    from library.custom_offloading_utils import BlockStackMixin


@dataclass(frozen=True, eq=False)
class BlockCall(Request):
    """A block of `model` on its hidden states; see `BlockStackMixin.run_block`. A block that is asked for by several at
    once has `packed_context(streams, contexts)`: the further arguments for the row of all their tokens, from the
    streams of its hidden states and the further arguments of each."""

    model: BlockStackMixin
    block: nn.Module
    index: int
    offloader: BlockOffloader | None
    hidden: tuple[Tensor, ...]
    context: tuple

    def alone(self) -> tuple[Tensor, ...]:
        return self.model.run_block(self.block, self.index, self.offloader, self.hidden, self.context)


@dataclass(frozen=True, eq=False)
class DenoiserCall(Request):
    """A forward of a denoiser."""

    denoiser: nn.Module
    args: Sequence[Any] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def alone(self) -> Any:
        return self.denoiser(*self.args, **self.inputs)


def denoise_together(calls: Sequence[DenoiserCall]) -> list[Any]:
    """Forwards of one denoiser on batches of several sizes, whose blocks run on the tokens of all of them at once."""
    if len(calls) == 1:
        return [calls[0].alone()]
    denoiser = calls[0].denoiser
    forward = type(denoiser).forward.course
    with denoiser.as_one_forward():
        return run_together([forward(denoiser, *call.args, **call.inputs) for call in calls], BlocksTogether())


class BlocksTogether:
    """Answers the calls of a block by several batches with one run of it. What a block gave goes on to the next as it
    is, unless something was done with it in between."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, list[Tensor]]] = []
        """what the last block gave: the row, and the parts that were cut of it"""
        self._contexts: list[tuple] = []
        self._streams: list[Stream] = []
        self._context: tuple = ()

    def __call__(self, calls: Sequence[BlockCall]) -> list[tuple[Tensor, ...]]:
        first = calls[0]
        states = [list(parts) for parts in zip(*(call.hidden for call in calls), strict=True)]
        streams = [Stream.of(parts) for parts in states]
        rows = tuple(self._row_of(parts, stream) for parts, stream in zip(states, streams))
        context = self._context_of(first.block, streams, [call.context for call in calls])
        outputs = first.model.run_block(first.block, first.index, first.offloader, rows, context)
        # a block may end streams, the first ones: nothing comes after them
        self._rows = [(row, stream.split(row)) for row, stream in zip(outputs, streams[len(streams) - len(outputs) :])]
        return list(zip(*(parts for _, parts in self._rows)))

    def _row_of(self, parts: list[Tensor], stream: Stream) -> Tensor:
        for row, given in self._rows:
            if len(given) == len(parts) and all(mine is theirs for mine, theirs in zip(parts, given)):
                return row
        return stream.join(parts)

    def _context_of(self, block: nn.Module, streams: list[Stream], contexts: list[tuple]) -> tuple:
        """That of the last block, where nothing of it has changed."""
        known = len(contexts) == len(self._contexts) and self._streams == streams
        if not known or not all(_same(mine, theirs) for mine, theirs in zip(contexts, self._contexts)):
            self._contexts, self._streams = contexts, streams
            self._context = tuple(block.packed_context(streams, contexts))
        return self._context


def _same(mine: tuple, theirs: tuple) -> bool:
    return len(mine) == len(theirs) and all(one is other for one, other in zip(mine, theirs))
