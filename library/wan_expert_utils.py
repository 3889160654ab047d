"""The two experts of Wan 2.2: one tree of modules, to which adapters are hooked once, and two sets of weights that it
holds by turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from library.components.block_ring import bring_weights_home
from library.core.errors import CheckpointError


class TwoExperts:
    """The weights that a model holds are those for little noise at first; `use` exchanges them with those of `other`, a
    model of the same sizes, whose modules are given up.

    Tensors change places, nothing is copied, and hooks, adapters and block swap see the modules that they know: with
    block swap both sets lie at the same places. `offload`: the idle set waits on the CPU. CheckpointError when the two
    files do not fit each other.
    """

    def __init__(self, model: nn.Module, other: nn.Module, *, offload: bool = False) -> None:
        self.model = model
        self.offload = offload
        self.high_noise = False
        """which of them the modules hold"""
        self.listeners: list[Callable[[bool], None]] = []
        """called at every exchange, with whether the modules hold the weights for much noise now"""
        self._idle = dict(_tensors(other))
        for name, mine in _tensors(model):
            theirs = self._idle.get(name)
            if theirs is None or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
                told = "nothing" if theirs is None else f"{list(theirs.shape)} of {theirs.dtype}"
                raise CheckpointError(
                    f"the two experts do not fit each other: {name} is {list(mine.shape)} of {mine.dtype} in the one"
                    f" for little noise, {told} in the one for much"
                )
        if offload:
            self._idle = {name: tensor.to("cpu") for name, tensor in self._idle.items()}

    def use(self, *, high_noise: bool) -> None:
        """Between forwards: what a backward pass still needs must not be exchanged."""
        if high_noise == self.high_noise:
            return
        bring_weights_home(self.model)
        for name, tensor in _tensors(self.model):
            incoming = self._idle[name]
            self._idle[name] = tensor.data.to("cpu") if self.offload else tensor.data
            tensor.data = incoming.to(tensor.device) if self.offload else incoming
        self.high_noise = high_noise
        for listener in self.listeners:
            listener(high_noise)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and scales of weights in 8 bits."""
    yield from model.named_parameters()
    yield from model.named_buffers()
