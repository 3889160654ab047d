"""Making the scheduler object of a run."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.optim import lr_scheduler as torch_schedulers

from library.core.errors import ConfigError, did_you_mean
from library.training.keyword_args import parse_keyword_args
from library.training.optimizers import OptimizerBuild
from library.training.schedulers.adafactor import AdafactorRates

if TYPE_CHECKING:
    from library.training.protocols import LrSchedule
    from library.training.schedulers import SchedulerOptions

logger = logging.getLogger(__name__)


class FixedRates:
    """For schedule-free optimizers: no schedule, nothing to save."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Nothing."""

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


class OwnRates(FixedRates):
    """For optimizers that move their rates themselves: the log shows the mean rate of each group's first weights."""

    def get_last_lr(self) -> list[float]:
        return [self.optimizer.group_rate(group) for group in self.optimizer.param_groups]


def build_scheduler(
    options: SchedulerOptions, optimizer: OptimizerBuild, make_curve: Callable[[], Callable[[int], float]], *,
    learning_rate: float
) -> LrSchedule:
    """A torch scheduler, or one of our stand-ins that have no state. `make_curve` gives the multipliers of
    --lr_scheduler."""
    if optimizer.schedule_free:
        if not optimizer.choice.named_schedule_free:  # the name did not tell at start; see schedulers.notices
            logger.warning("%s is schedule-free: --lr_scheduler and its options have no effect", optimizer.choice.name)
        return FixedRates(optimizer.optimizer)
    if optimizer.choice.moves_own_rates:
        return OwnRates(optimizer.optimizer)
    if optimizer.choice.finds_own_rate:
        return AdafactorRates(optimizer.optimizer, learning_rate if options.first_rate is None else options.first_rate)
    if options.lr_scheduler_type:
        cls = scheduler_class(options.lr_scheduler_type)
        args = parse_keyword_args(options.lr_scheduler_args, "lr_scheduler_args")
        try:
            return cls(optimizer.optimizer, **args)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"--lr_scheduler_type {options.lr_scheduler_type} with {args} is refused: {error}"
            ) from error
    return torch_schedulers.LambdaLR(optimizer.optimizer, make_curve())


def scheduler_class(name: str) -> type:
    """A class of torch.optim.lr_scheduler, or of a dotted path; ConfigError when there is none."""
    module_name, _, class_name = name.replace(":", ".").rpartition(".")
    module_name = module_name or torch_schedulers.__name__
    top = module_name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise ConfigError(f"--lr_scheduler_type {name} needs the package {top}, which is not installed")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:  # whatever a module of the user's raises
        raise ConfigError(f"--lr_scheduler_type {name}: {module_name} cannot be imported ({error})") from error
    if not isinstance(found, type):
        classes = [n for n, value in vars(importlib.import_module(module_name)).items() if isinstance(value, type)]
        raise ConfigError(
            f"--lr_scheduler_type is '{name}'; {module_name} has no class "
            f"{class_name}{did_you_mean(class_name, classes)}"
        )
    if issubclass(found, torch_schedulers.ReduceLROnPlateau):
        raise ConfigError(f"--lr_scheduler_type {name} needs a metric after every step, which training does not have")
    return found
