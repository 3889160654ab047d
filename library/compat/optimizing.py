"""Optimizer, schedule and what is logged of them, for a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from library.compat.namespace import options_of
from library.training import optimizers, schedulers
from library.training.hooks.losses import learning_rates_of


def get_optimizer(args: Any, trainable_params: Iterable[Any]) -> tuple[str, str, torch.optim.Optimizer]:
    """(name as module.Class, arguments as k=v,..., the optimizer). `trainable_params`: parameters, or groups with
    `params`."""
    items = list(trainable_params)
    groups = items if items and isinstance(items[0], Mapping) else [{"params": items}]
    built = optimizers.build(options_of(args, optimizers.OptimizerOptions), groups)
    return built.class_path, built.args_text, built.optimizer


def is_schedulefree_optimizer(optimizer: torch.optim.Optimizer, args: Any = None) -> bool:
    return optimizers.switches_weights(optimizer)


def get_optimizer_train_eval_fn(optimizer: torch.optim.Optimizer, args: Any = None) -> tuple[Callable, Callable]:
    """(train, eval): what puts the weights to train, or those to save and sample with, in place; empty for most
    optimizers."""
    if optimizers.switches_weights(optimizer):
        return optimizer.train, optimizer.eval
    return (lambda: None), (lambda: None)


def get_scheduler_fix(args: Any, optimizer: torch.optim.Optimizer, num_processes: int) -> Any:
    """The learning rate schedule over max_train_steps * num_processes calls of step(), as a prepared scheduler makes
    them."""
    options = options_of(args, optimizers.OptimizerOptions)
    built = optimizers.OptimizerBuild(optimizer, optimizers.choose(options), type(optimizer).__name__, "")
    return schedulers.build(
        options_of(args, schedulers.SchedulerOptions), built,
        learning_rate=options.learning_rate, max_train_steps=args.max_train_steps * num_processes,
    )  # fmt: skip


def append_lr_to_logs(
    logs: dict[str, Any], lr_scheduler: Any, optimizer_type: str, including_unet: bool = True
) -> None:
    """`lr/unet`, `lr/text_encoder1` and so on of the schedule's optimizer into `logs`, as far as it has groups."""
    names = (["unet"] if including_unet else []) + ["text_encoder1", "text_encoder2", "text_encoder3"]
    append_lr_to_logs_with_names(logs, lr_scheduler, optimizer_type, names)


def append_lr_to_logs_with_names(
    logs: dict[str, Any], lr_scheduler: Any, optimizer_type: str, names: list[str]
) -> None:
    """`optimizer_type` is taken for compatibility: whether an optimizer estimates its step size stands in its
    groups."""
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # of accelerate's wrapper
    groups = scheduler.optimizer.param_groups
    rates = learning_rates_of([{**group, "name": name} for group, name in zip(groups, names)])
    logs.update({key: float(rate) for key, rate in rates.items()})


class LossRecorder:
    """The mean loss over the last epoch: each step takes the place that it had in the epoch before."""

    def __init__(self) -> None:
        self.loss_list: list[float] = []
        self.loss_total = 0.0

    def add(self, *, epoch: int, step: int, loss: float) -> None:
        """`step` counts within its epoch; the first epoch (0) may have any number of them."""
        if epoch == 0:
            self.loss_list.append(loss)
            self.loss_total += loss
            return
        self.loss_list += [0.0] * (step + 1 - len(self.loss_list))
        self.loss_total += loss - self.loss_list[step]
        self.loss_list[step] = loss

    @property
    def moving_average(self) -> float:
        return self.loss_total / len(self.loss_list)
