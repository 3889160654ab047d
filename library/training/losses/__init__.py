"""Element-wise losses: the options, the table and `build`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import Problems, TrainingError, did_you_mean
from library.core.options import Ignored, option, without_effect
from library.core.registry import Registry

if TYPE_CHECKING:
    import torch

    from library.training.objective import Objective

ElementLoss = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "Objective"], "torch.Tensor"]
"""(prediction, target [B, C, ...], timesteps [B] on the 0..1000 scale, objective) -> loss [B, C, ...]"""

LOSSES: Registry[Callable] = Registry(
    "loss", option="loss_type", group="losses", takes=("options", "prediction", "target", "timesteps", "objective"),
    wanted="a function of (options, prediction, target, timesteps, objective) that gives the loss of each element",
)
LOSSES.add("l1", "library.training.losses.elementwise:l1_loss")
LOSSES.add("l2", "library.training.losses.elementwise:l2_loss")
LOSSES.add("huber", "library.training.losses.elementwise:huber_loss")
LOSSES.add("smooth_l1", "library.training.losses.elementwise:smooth_l1_loss")

HUBER_SCHEDULES = ("constant", "exponential", "snr")


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Loss of one element."""

    loss_type: str = option(
        "l2",
        help="loss of one element of the prediction: "
        + ", ".join(LOSSES.names())
        + ", or a path package.module:function",
    )
    huber_schedule: str = option(
        "snr", choices=HUBER_SCHEDULES, help="how the threshold of huber and smooth_l1 depends on the timestep"
    )
    huber_c: float = option(0.1, help="threshold of huber and smooth_l1 between quadratic and linear")
    huber_scale: float = option(1.0, help="factor of the threshold, in every schedule")

    def __post_init__(self) -> None:
        problems = Problems()
        unknown = LOSSES.problem(self.loss_type)
        if unknown is not None:
            problems.add(unknown)
        if self.huber_schedule not in HUBER_SCHEDULES:
            problems.add(
                f"--huber_schedule is '{self.huber_schedule}'{did_you_mean(self.huber_schedule, HUBER_SCHEDULES) or '.'}"
                f" Known: {', '.join(HUBER_SCHEDULES)}"
            )
        for name in ("huber_c", "huber_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                problems.add(f"--{name} is {value}; a number above 0 is needed")
        problems.raise_if_any()


def check(options: LossOptions) -> None:
    """ConfigError when the loss cannot be imported or is none."""
    LOSSES.resolve(options.loss_type)


def build(options: LossOptions) -> ElementLoss:
    """The element loss of a run. What one from outside gives is held against the contract."""
    loss = functools.partial(LOSSES.resolve(options.loss_type), options)
    if not LOSSES.entry(options.loss_type).is_outside:
        return loss

    def checked(
        prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor, objective: Objective
    ) -> torch.Tensor:
        losses = loss(prediction, target, timesteps, objective)
        problem = _problem_of(losses, prediction)
        if problem is not None:
            raise TrainingError(f"--loss_type is {options.loss_type}, which gives {problem}")
        return losses

    return checked


def _problem_of(losses: object, prediction: torch.Tensor) -> str | None:
    """What keeps `losses` from being the loss of each element of the prediction [B, C, ...]."""
    shape = tuple(prediction.shape)
    given = getattr(losses, "shape", None)
    if given is None:
        return f"a value of the type {type(losses).__name__}; needed: a tensor {shape}, the loss of each element"
    if len(given) != len(shape) or given[0] != shape[0]:
        return f"a tensor {tuple(given)}; needed: {shape}, the loss of each element, without a mean over them"
    if prediction.requires_grad and not losses.requires_grad:
        return "a loss without a gradient, from which nothing can be learned; needed: one that follows the prediction"
    return None


def notices(options: LossOptions, is_flow: bool) -> list[str]:
    """Lines for the log at start: where numbers differ from what people know."""
    if options.loss_type not in ("huber", "smooth_l1") or options.huber_schedule != "snr":
        return []
    lines = []
    if is_flow:
        lines.append("--huber_schedule snr for a flow model has the threshold (1 - huber_c) (1 - sigma)^2 + huber_c")
    if options.huber_scale != 1:
        lines.append("--huber_scale applies under --huber_schedule snr as well (known trainers ignore it there)")
    return lines


def idle(options: LossOptions) -> list[Ignored]:
    """Settings that the chosen loss does not read."""
    if LOSSES.problem(options.loss_type) or options.loss_type.lower() not in ("l1", "l2"):
        return []  # a loss from outside may read them
    default = LossOptions()
    unused = [n for n in ("huber_schedule", "huber_c", "huber_scale") if getattr(options, n) != getattr(default, n)]
    return without_effect(unused, f"--loss_type is {options.loss_type}")
