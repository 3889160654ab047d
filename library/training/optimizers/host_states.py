"""States of an optimizer in main memory between its steps (--offload_optimizer).

A step brings those of a few parameters to the device at a time, the next ones while these are stepped, and sends them
back. Small tensors, counts and paged states stay where the optimizer has them, and so does what bfloat16 weights lack
(`--bf16_update kahan`), which is read beside the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from library.components.device_transfers import Event, HostMemory, Transfers, pieces, room_for, transfers_to
from library.training.optimizers import OptimizerOptions
from library.training.optimizers.single_steps import COMPENSATION, GroupCounts, only, steps_singly

LEAST_BYTES = 2**14
"""smaller states stay on the device: they take no room, and bringing them would take longer than using them"""
ROOM = 2**28
"""bytes of states that are on the device for one piece of a step; the next piece is on its way meanwhile"""
Groups = list[tuple[dict[str, Any], list[Parameter]]]
"""groups of an optimizer, with some of their parameters each"""


class HostStates:
    """Replaces `step` of an optimizer by one in pieces, and lets `state_dict` wait for copies under way. `singly`:
    whether pieces give the same as one step of all parameters (`steps_singly`); if not, all are one piece."""

    def __init__(
        self, optimizer: Any, transfers: Transfers, *, singly: bool, least: int | None = None, room: int = ROOM
    ) -> None:
        self._optimizer = optimizer
        self._transfers = transfers
        self._singly = singly
        self._least = LEAST_BYTES if least is None else least
        self._room = room
        self._counts = GroupCounts()
        self._calls = 0
        self._sent: Event | None = None
        total = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        self._memory = HostMemory(transfers, 2 * 4 * total)  # two moments in float32, as most have them
        self._homes: dict[int, Tensor] = {}
        """id of a state that waits in main memory -> itself"""
        optimizer.host_states = self
        self._plain_step = optimizer.step
        optimizer.step = MethodType(lambda _, *words, **more: self.step(*words, **more), optimizer)
        self._plain_state_dict = optimizer.state_dict
        optimizer.state_dict = MethodType(lambda _, *words, **more: self.state_dict(*words, **more), optimizer)

    def step(self, *words: Any, **more: Any) -> Any:
        self._calls += 1
        parts, result = self._pieces(), None
        fetched = [self._fetch(parts[0])] if parts else []
        for number, part in enumerate(parts):
            if number + 1 < len(parts):
                fetched.append(self._fetch(parts[number + 1]))
            event, homes = fetched.pop(0)
            if event is not None:
                self._transfers.wait(event)
            for group, _ in part:
                self._counts.begin(group, self._calls)
            with only(self._optimizer, part):
                result = self._plain_step(*words, **more)
            self._send(part, homes)
        return result

    def state_dict(self, *words: Any, **more: Any) -> dict[str, Any]:
        self.settle()
        return self._plain_state_dict(*words, **more)

    def send_all(self) -> None:
        """What was loaded goes to main memory."""
        self._send([(group, group["params"]) for group in self._optimizer.param_groups], {})

    def holds(self, value: Tensor) -> bool:
        """Whether a state waits in main memory."""
        return id(value) in self._homes

    def settle(self) -> None:
        """The host waits until every state is in main memory."""
        if self._sent is not None:
            self._transfers.finish(self._sent)
            self._sent = None

    # -- pieces of a step ----------------------------------------------------------------------------------------------

    def _pieces(self) -> list[Groups]:
        """Every parameter that moves, in the order of the groups; a piece has states of at most `room` bytes, or those
        of one parameter."""
        groups: Groups = [(group, list(group["params"])) for group in self._optimizer.param_groups]
        if not self._singly:
            return [groups]
        found: list[Groups] = []
        left = 0
        for group, parameters in groups:
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                size = sum(value.nbytes for _, value in self._large(parameter)) or 2 * 4 * parameter.numel()
                if not found or size > left:
                    found.append([])
                    left = self._room
                left -= size
                if not found[-1] or found[-1][-1][0] is not group:
                    found[-1].append((group, []))
                found[-1][-1][1].append(parameter)
        return found

    def _large(self, parameter: Parameter) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the states that move."""
        for name, value in self._optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.nbytes < self._least or name == COMPENSATION:
                continue
            if not getattr(value, "is_paged", False):
                yield name, value

    def _fetch(self, part: Groups) -> tuple[Event | None, dict[tuple[Parameter, str], Tensor]]:
        """Bring the states of a piece; the event of their arrival, and where each is at home."""
        homes = {
            (parameter, name): value
            for parameter in _parameters(part)
            for name, value in self._large(parameter)
            if self.holds(value)
        }
        if not homes:
            return None, homes
        values = list(homes.values())
        there = pieces(self._transfers.buffer(room_for(values)), values)
        event = self._transfers.copy(list(zip(there, values, strict=True)), self._transfers.computed())
        for (parameter, name), value in zip(homes, there, strict=True):
            self._optimizer.state[parameter][name] = value
        return event, homes

    def _send(self, part: Groups, homes: dict[tuple[Parameter, str], Tensor]) -> None:
        """Send the states of a piece home; a new one gets a home first."""
        pairs = []
        for parameter in _parameters(part):
            for name, value in list(self._large(parameter)):
                if self.holds(value):
                    continue
                home = homes.get((parameter, name))
                if home is None or home.shape != value.shape or home.dtype != value.dtype:
                    home = self._memory.hold(value)
                    self._homes[id(home)] = home
                else:
                    self._transfers.keep(value)
                    pairs.append((home, value))
                self._optimizer.state[parameter][name] = home
        if pairs:
            self._sent = self._transfers.copy(pairs, self._transfers.computed())


def keep_on_host(options: OptimizerOptions, optimizer: Any, device: torch.device) -> HostStates | None:
    """With --offload_optimizer, where the device is not main memory itself."""
    transfers = transfers_to(device) if options.offload_optimizer else None
    return None if transfers is None else HostStates(optimizer, transfers, singly=steps_singly(options))


def waits_on_host(optimizer: Any, value: Tensor) -> bool:
    """Whether a state waits in main memory until a step brings it."""
    states = getattr(optimizer, "host_states", None)
    return states is not None and states.holds(value)


def _parameters(part: Groups) -> Sequence[Parameter]:
    return [parameter for _, parameters in part for parameter in parameters]
