"""The exponential moving average of weights, apart from who wants it: for samples and files, or as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from library.components.block_ring import bring_weights_home
from library.core.errors import CheckpointError
from library.core.parts import in_parts
from library.device_utils import copies_are_queued
from library.training.host_copies import HostCopies, Merge

Pair = tuple[torch.Tensor, torch.Tensor]
"""(average, weight)"""
PART_BYTES = 256 * 2**20
"""most memory of weights that are on their way to the average at once"""


class WeightAverage:
    """average = average * (1 - share) + weights * share, float32, of every parameter of `modules()`; frozen ones too,
    because some adapters choose per step what learns. `what` names it in messages.

    `on_cpu`: it is in main memory. What a GPU has learned is copied there and added while the GPU goes on.
    """

    def __init__(
        self, modules: Callable[[], Mapping[str, torch.nn.Module]], *, on_cpu: bool = False, what: str = "the average"
    ) -> None:
        self._modules = modules
        self._on_cpu = on_cpu
        self._what = what
        self._tensors: dict[str, torch.Tensor] = {}
        self._copies = HostCopies()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of the parameters, with all that it was to follow; empty before `begin`."""
        self._copies.settle()
        return self._tensors

    def begin(self) -> None:
        """It is what the weights are now."""
        if self._tensors:
            self._bring(_replace)
        else:
            self._tensors = {name: self._kept(parameter) for name, parameter in self.parameters().items()}

    def follow(self, share: float) -> None:
        """Go by `share` towards the weights."""

        def approach(averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
            torch._foreach_lerp_(averages, [weight.to(torch.float32) for weight in weights], share)

        self._bring(approach)

    @torch.no_grad()
    def _bring(self, into: Merge) -> None:
        """The weights into their averages, in parts."""
        beside: list[Pair] = []
        apart: list[Pair] = []  # the average is in main memory, the weight is not
        for name, parameter in self.parameters().items():
            pair = (self._tensors[name], parameter.detach())
            is_apart = pair[0].device.type == "cpu" and copies_are_queued(pair[1].device)
            (apart if is_apart else beside).append(pair)
        for part in in_parts(beside, _nbytes, PART_BYTES):
            into([average for average, _ in part], [weight.to(average) for average, weight in part])
        for part in in_parts(apart, _nbytes, PART_BYTES):
            self._copies.add([average for average, _ in part], [weight for _, weight in part], into)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{part}.{name}": p for part, module in self._modules().items() for name, p in module.named_parameters()
        }

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu" if self._on_cpu else tensor.device, torch.float32, copy=True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights are the average; afterwards they are as before, to the bit. Where both have one type and
        place their memory is exchanged and nothing is copied, but for weights whose memory block swap gives to
        others."""
        moving = self._brought_home()
        exchanged: dict[torch.nn.Parameter, torch.Tensor] = {}
        copied: dict[torch.nn.Parameter, torch.Tensor] = {}
        for name, parameter in self.parameters().items():
            average, data = self.tensors[name], parameter.data
            if average.dtype == data.dtype and average.device == data.device and parameter not in moving:
                exchanged[parameter], parameter.data = data, average
            else:
                copied[parameter] = data.to("cpu", copy=True)
                data.copy_(average)
        try:
            yield
        finally:
            self._brought_home()
            for parameter, data in exchanged.items():
                parameter.data = data
            for parameter, values in copied.items():
                parameter.data.copy_(values)

    def _brought_home(self) -> set[torch.Tensor]:
        """The weights that block swap moves, after it has put them into their places."""
        return set().union(*(bring_weights_home(module) for module in self._modules().values()))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor.cpu() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """CheckpointError when it is the average of other weights."""
        parameters = self.parameters()
        wrong = [name for name in parameters.keys() | state.keys() if name not in parameters or name not in state]
        wrong += [name for name in parameters.keys() & state.keys() if parameters[name].shape != state[name].shape]
        if wrong:
            raise CheckpointError(
                f"{self._what} in the state does not fit this run: {len(wrong)} weights differ (first: {min(wrong)}); "
                "resume with the options of the interrupted run"
            )
        self._copies.settle()
        self._tensors = {
            name: state[name].to("cpu" if self._on_cpu else p.device, torch.float32) for name, p in parameters.items()
        }


def _replace(averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    torch._foreach_copy_(averages, weights)


def _nbytes(pair: Pair) -> int:
    return pair[1].nbytes
