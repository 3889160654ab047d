"""Updates tensor by tensor: weights in bfloat16 through float32 copies, and updates inside the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from library.components.block_ring import bring_weights_home
from library.training.optimizers.host_states import waits_on_host
from library.training.optimizers.single_steps import COMPENSATION, GroupCounts, only
from library.training.updaters.base import Updater, trained_parameters
from library.training.updaters.bf16_weights import BF16_UPDATES, exact_value
from library.training.updaters.ordinary import OrdinaryUpdater

if TYPE_CHECKING:
    from library.training.run import Run


class SingleSteps:
    """Steps the optimizer of a run for some of its parameters. Those in bfloat16 are stepped as float32 copies, whose
    gradients and moments are float32 too; `bf16_update` names in BF16_UPDATES how they take the copies' values."""

    def __init__(self, run: Run, bf16_update: str) -> None:
        self._run = run
        self._write = BF16_UPDATES[bf16_update]
        self._counts = GroupCounts()
        places = [(group, p) for group in run.optimizer.param_groups for p in group["params"]]
        self._places = {p: (number, group) for number, (group, p) in enumerate(places)}

    @torch.no_grad()
    def step(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Those with a gradient change; gradients stay."""
        state = self._run.optimizer.state
        kept: dict[torch.nn.Parameter, torch.Tensor | None] = {}
        copies: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for p in parameters:
            if p.dtype != torch.bfloat16 or p.grad is None:
                continue
            entry = state.pop(p, {})
            kept[p] = entry.pop(COMPENSATION, None)
            copies[p] = torch.nn.Parameter(exact_value(p, kept[p]))
            copies[p].grad = p.grad.float()
            if entry:
                state[copies[p]] = entry
        self._step_optimizer([copies.get(p, p) for p in parameters], parameters)
        for p, copy in copies.items():
            if copy in state:
                state[p] = state.pop(copy)
            key = (self._run.step.seed, self._run.progress.global_step, self._places[p][0])
            remainder = self._write(p, copy, kept[p], key)
            if remainder is not None:
                state[p][COMPENSATION] = remainder

    def _step_optimizer(
        self, stepped: Sequence[torch.nn.Parameter], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """`stepped` stand in the places of `parameters`."""
        groups: dict[int, tuple[dict[str, Any], list[torch.nn.Parameter]]] = {}
        for parameter, place in zip(stepped, parameters, strict=True):
            group = self._places[place][1]
            groups.setdefault(id(group), (group, []))[1].append(parameter)
        for group, _ in groups.values():
            self._counts.begin(group, self._run.progress.global_step)
        with only(self._run.optimizer, groups.values()):
            self._run.optimizer.step()


class RoundingUpdater(OrdinaryUpdater):
    """The ordinary way for weights in bfloat16. `singly`: one parameter after the other, which needs no second copy of
    all weights; otherwise all at once, for optimizers that want to see them together."""

    def __init__(self, singly: bool, bf16_update: str = "stochastic") -> None:
        self._singly = singly
        self._bf16_update = bf16_update
        self._steps: SingleSteps | None = None

    def begin(self, run: Run) -> None:
        self._steps = SingleSteps(run, self._bf16_update)

    def step(self, run: Run) -> None:
        parameters = trained_parameters(run.optimizer)
        for chosen in [[p] for p in parameters] if self._singly else [parameters]:
            self._steps.step(chosen)


def bring_states(run: Run) -> None:
    """What was resumed for weights that wait in main memory (block swap) goes to the device, where they are when they
    are updated. Paged states of bitsandbytes travel by themselves, those of --offload_optimizer with their step."""
    for group in run.optimizer.param_groups:
        counts_too = bool(group.get("fused"))  # the fused kernel reads them with the weights
        for parameter in group["params"]:
            entry = run.optimizer.state.get(parameter, {}) if parameter.device.type == "cpu" else {}
            for key, value in entry.items():
                is_moved = isinstance(value, torch.Tensor) and (value.ndim or counts_too)
                if is_moved and not (getattr(value, "is_paged", False) or waits_on_host(run.optimizer, value)):
                    entry[key] = value.to(run.runtime.device)


class FusedUpdater(Updater):
    """Each parameter is clipped by its own norm, stepped and freed of its gradient as soon as that is complete, inside
    the backward pass: never are all gradients in memory. For one micro-batch per step, one process and no scaling."""

    gathers_gradients = False

    def __init__(self, bf16_update: str = "stochastic") -> None:
        self._bf16_update = bf16_update
        self._handles: list[Any] = []

    def begin(self, run: Run) -> None:
        steps = SingleSteps(run, self._bf16_update)
        bring_states(run)

        def update(parameter: torch.nn.Parameter) -> None:
            if run.max_grad_norm:
                torch.nn.utils.clip_grad_norm_([parameter], run.max_grad_norm)
            steps.step([parameter])
            parameter.grad = None

        self._handles = [p.register_post_accumulate_grad_hook(update) for p in trained_parameters(run.optimizer)]

    def backward(self, run: Run, loss: torch.Tensor) -> None:
        run.runtime.backward(loss)

    def update(self, run: Run) -> None:
        for part in run.models.of_step:
            bring_weights_home(part)  # hooks find every weight in its place, and none on its way
        run.lr_scheduler.step()

    def end(self, run: Run) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
