"""Updates tensor by tensor: weights in bfloat16 with stochastic rounding, and updates inside the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.core.keyed_random import key_seed
from library.training.optimizers.single_steps import only
from library.training.updaters.base import Updater, trained_parameters
from library.training.updaters.ordinary import OrdinaryUpdater

if TYPE_CHECKING:
    from library.training.run import Run

LOW_BITS = 16
"""bits of a float32 that bfloat16 does not have"""


def stochastically_rounded(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16. `random`: whole numbers from 0 to 65535, as many. Each value becomes one of its two
    neighbours, the nearer the likelier: the mean over the random numbers is the value itself."""
    bits = values.contiguous().view(torch.int32) + random
    cut = torch.bitwise_and(bits, -(1 << LOW_BITS)).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


class SingleSteps:
    """Steps the optimizer of a run for some of its parameters. Those in bfloat16 are stepped as float32 copies, whose
    gradients and moments are float32 too, and rounded stochastically with draws that hang on the seed, the step and the
    place of the parameter alone: the order of the updates does not matter."""

    def __init__(self, run: Run) -> None:
        self._run = run
        places = [(group, p) for group in run.optimizer.param_groups for p in group["params"]]
        self._places = {p: (number, group) for number, (group, p) in enumerate(places)}

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Those with a gradient change; gradients stay."""
        optimizer = self._run.optimizer
        copies = {p: self._copied(p) for p in parameters if p.dtype == torch.bfloat16 and p.grad is not None}
        for p, copy in copies.items():
            if p in optimizer.state:
                optimizer.state[copy] = optimizer.state.pop(p)
        groups: dict[int, tuple[dict[str, Any], list[torch.nn.Parameter]]] = {}
        for p in parameters:
            group = self._places[p][1]
            groups.setdefault(id(group), (group, []))[1].append(copies.get(p, p))
        with only(optimizer, groups.values()):
            optimizer.step()
        for p, copy in copies.items():
            if copy in optimizer.state:
                optimizer.state[p] = optimizer.state.pop(copy)
            p.copy_(stochastically_rounded(copy, self._random_bits(p)))

    @staticmethod
    def _copied(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        copy = torch.nn.Parameter(parameter.detach().float())
        copy.grad = parameter.grad.float()
        return copy

    def _random_bits(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Drawn where the parameter is: a large model has too many of them for the CPU."""
        seed = key_seed(
            self._run.step.seed, "stochastic rounding", self._run.progress.global_step, self._places[parameter][0]
        )
        generator = torch.Generator(parameter.device).manual_seed(seed)
        return torch.randint(
            0, 1 << LOW_BITS, parameter.shape, generator=generator, device=parameter.device, dtype=torch.int32
        )


class RoundingUpdater(OrdinaryUpdater):
    """The ordinary way for weights in bfloat16. `singly`: one parameter after the other, which needs no second copy of
    all weights; otherwise all at once, for optimizers that want to see them together."""

    def __init__(self, singly: bool) -> None:
        self._singly = singly
        self._steps: SingleSteps | None = None

    def begin(self, run: Run) -> None:
        self._steps = SingleSteps(run)

    def step(self, run: Run) -> None:
        parameters = trained_parameters(run.optimizer)
        for chosen in [[p] for p in parameters] if self._singly else [parameters]:
            self._steps.step(chosen)


class FusedUpdater(Updater):
    """Each parameter is clipped by its own norm, stepped and freed of its gradient as soon as that is complete, inside
    the backward pass: never are all gradients in memory. For one micro-batch per step, one process and no scaling."""

    gathers_gradients = False

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def begin(self, run: Run) -> None:
        steps = SingleSteps(run)

        def update(parameter: torch.nn.Parameter) -> None:
            if run.max_grad_norm:
                torch.nn.utils.clip_grad_norm_([parameter], run.max_grad_norm)
            steps.step([parameter])
            parameter.grad = None

        self._handles = [p.register_post_accumulate_grad_hook(update) for p in trained_parameters(run.optimizer)]

    def backward(self, run: Run, loss: torch.Tensor) -> None:
        run.runtime.backward(loss)

    def update(self, run: Run) -> None:
        run.lr_scheduler.step()

    def end(self, run: Run) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
