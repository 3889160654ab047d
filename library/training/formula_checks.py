"""What the formulas of a run (optimizer, schedule, losses, noise levels) have to say before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from library.core.errors import ConfigError, Problems
from library.core.options import Config, Ignored
from library.training import loss_weights, losses, optimizers, schedulers, timestep_samplers
from library.training.alignment import SelfFlowOptions
from library.training.computing_options import PrecisionOptions
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.optimizers import OptimizerOptions
from library.training.option_groups import EmaOptions, LoopOptions, ModelOptions, NoiseOptions
from library.training.schedulers import SchedulerOptions
from library.training.timestep_samplers import TimestepOptions


def formula_problems(config: Config) -> list[str]:
    """Names, packages, arguments and pairs that cannot work; imports the chosen optimizer's package."""
    loop, optimizer = config[LoopOptions], config[OptimizerOptions]
    steps = None if loop.max_train_epochs else loop.max_train_steps
    checks: tuple[Callable[[], Any], ...] = (
        lambda: _check_optimizer(config),
        lambda: _check_average(config),
        lambda: optimizers.check_float16(optimizer) if _trains_in_float16(config) else None,
        lambda: schedulers.check(config[SchedulerOptions], optimizer, steps),
        lambda: losses.check(config[LossOptions]),
        lambda: loss_weights.check(
            config[LossWeightOptions], config[ModelOptions].v_parameterization,
            NoiseOptions in config and config[NoiseOptions].zero_terminal_snr,
        ),
    )
    problems = Problems()
    for check in checks:
        problems.attempt(check)
    return problems.messages


def _check_optimizer(config: Config) -> None:
    built = optimizers.check(config[OptimizerOptions])
    optimizers.check_offload(config[OptimizerOptions], built)
    if EmaOptions in config and config[EmaOptions].ema and built.schedule_free:
        raise ConfigError(
            f"--ema is set with --optimizer_type {built.choice.name}, which keeps an average of the weights itself "
            "(schedule-free);"
            " leave --ema out, or choose another optimizer"
        )


def _check_average(config: Config) -> None:
    """The decay of an average is that of --ema or of the teacher of Self-Flow."""
    if EmaOptions not in config or config[EmaOptions].ema or config[EmaOptions].ema_decay == EmaOptions().ema_decay:
        return
    if not (SelfFlowOptions in config and config[SelfFlowOptions].self_flow):
        raise ConfigError("--ema_decay is set without --ema, which it belongs to; add it")


def _trains_in_float16(config: Config) -> bool:
    return PrecisionOptions in config and config[PrecisionOptions].full_fp16


def formula_warnings(config: Config) -> list[str]:
    """Settings that are doubtful with the chosen optimizer."""
    from library.training.adapters import NetworkOptions

    rates: dict[str, Any] = {}
    if NetworkOptions in config:
        network = config[NetworkOptions]
        rates = {"unet_lr": network.unet_lr, "text_encoder_lr": network.text_encoder_lr}
    found = optimizers.warnings_of(
        config[OptimizerOptions], lr_scheduler=config[SchedulerOptions].lr_scheduler, **rates
    )
    return [warning.text for warning in found]


def formula_notices(config: Config, objective: Any) -> list[str]:
    """Lines for the log at start: numbers that differ from what people know. `objective` is the run's Objective."""
    lines = optimizers.log_lines(optimizers.choose(config[OptimizerOptions]))
    lines += schedulers.notices(config[SchedulerOptions])
    lines += losses.notices(config[LossOptions], objective.is_flow)
    lines += timestep_samplers.notices(config[TimestepOptions]) if objective.is_flow else []
    return lines + objective.notices()


def idle_formulas(config: Config) -> list[Ignored]:
    """Settings that the chosen formulas do not read. Those of noise levels are known to flow families only, so that
    nothing is `explicit` elsewhere."""
    found = losses.idle(config[LossOptions]) + timestep_samplers.idle(config[TimestepOptions], config.explicit)
    found += loss_weights.idle(config[LossWeightOptions], config.explicit)
    try:
        own = optimizers.idle(config[OptimizerOptions])
        return [*own, *schedulers.idle(config[SchedulerOptions], config[OptimizerOptions]), *found]
    except ConfigError:  # an unknown optimizer, which `formula_problems` tells
        return found
