"""Steps of an optimizer for some of its parameters alone, and which optimizers give the same result that way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from library.training.optimizers import OptimizerOptions, build, choose

COMPENSATION = "kahan_compensation"
"""in the state of a parameter, beside what its optimizer keeps there: what its bfloat16 value lacks"""
PROBE_STEPS = 3


@contextmanager
def only(optimizer: Any, groups: Iterable[tuple[dict[str, Any], list[torch.nn.Parameter]]]) -> Iterator[None]:
    """Inside, the optimizer knows these of its groups alone, with these parameters in them."""
    chosen = [(group, group["params"], parameters) for group, parameters in groups]
    every = optimizer.param_groups
    optimizer.param_groups = [group for group, _, _ in chosen]
    try:
        for group, _, parameters in chosen:
            group["params"] = parameters
        yield
    finally:
        for group, before, _ in chosen:
            group["params"] = before
        optimizer.param_groups = every


class GroupCounts:
    """What an optimizer counts by group, as steps, counts once for a step of all parameters, however many calls make
    it."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, dict[str, Any]]] = {}
        """id of a group -> (the last step that it took part in, its settings before that)"""

    def begin(self, group: dict[str, Any], step: int) -> None:
        """Before each call for parameters of a group; `step`: of which step it is a part. The settings of the group are
        then those before the first call."""
        last, before = self._before.get(id(group), (None, {}))
        if last != step:
            self._before[id(group)] = (step, {key: value for key, value in group.items() if key != "params"})
            return
        parameters = group["params"]
        group.clear()
        group.update(before, params=parameters)


def steps_singly(options: OptimizerOptions) -> bool:
    """Whether stepping one parameter after the other is the same to the bit as one step of all. Tried out on two small
    matrices; an optimizer that does not run on the CPU is judged by its name."""
    choice = choose(options)
    if choice.one_rate_for_all_groups or choice.named_schedule_free:  # what they keep by group moves slowly at first
        return False
    try:
        together, apart = (_probe(options, singly) for singly in (False, True))
    except Exception:  # whatever an optimizer of a GPU raises; what is wrong with it is told by its own check
        return True
    return all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def _probe(options: OptimizerOptions, singly: bool) -> list[torch.Tensor]:
    rate = options.learning_rate or 1e-3
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 16).reshape(4, 4) * (i + 1)) for i in range(3)]
    groups = [{"params": weights[:2], "lr": rate, "name": "a"}, {"params": weights[2:], "lr": rate, "name": "b"}]
    optimizer = build(options, groups).optimizer
    counts = GroupCounts()
    for step in range(PROBE_STEPS):
        for i, weight in enumerate(weights):
            weight.grad = torch.sin(torch.arange(16.0).reshape(4, 4) * (step + 2) + i) * 10.0**-i
        if not singly:
            optimizer.step()
            continue
        for group in list(optimizer.param_groups):
            for weight in list(group["params"]):
                counts.begin(group, step)
                with only(optimizer, [(group, [weight])]):
                    optimizer.step()
    return [weight.detach() for weight in weights]
