"""Weights in bfloat16 under updates smaller than their last digit, for every optimizer that is installed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.core.errors import ConfigError
from library.training.optimizers import OPTIMIZERS, OptimizerOptions, build, choose
from library.training.optimizers.single_steps import COMPENSATION
from library.training.updaters.single import SingleSteps

STEPS, RATE = 30, 1e-5


def options_of(name: str) -> OptimizerOptions:
    choice = choose(OptimizerOptions(optimizer_type=name))
    more = ["relative_step=False", "scale_parameter=False"] if choice.is_adafactor else None
    rate = 1.0 if choice.one_rate_for_all_groups else RATE
    return OptimizerOptions(optimizer_type=name, learning_rate=rate, optimizer_args=more)


def moved(options: OptimizerOptions, way: str, seed: int = 0, side: int = 8) -> tuple[torch.Tensor, dict[str, Any]]:
    """(how far a matrix of weights between 0.5 and 1 went, its state). `way`: a value of --bf16_update, float32, or
    plain for bfloat16 alone."""
    dtype = torch.float32 if way == "float32" else torch.bfloat16
    start = torch.linspace(0.5, 1, side * side).reshape(side, side).bfloat16()
    weight = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = build(options, [{"params": [weight], "lr": options.learning_rate, "name": "a"}]).optimizer
    run = SimpleNamespace(
        optimizer=optimizer, step=SimpleNamespace(seed=seed), progress=SimpleNamespace(global_step=0)
    )
    steps = SingleSteps(run, way) if way in ("stochastic", "kahan") else None
    drawn = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        run.progress.global_step = step
        weight.grad = (torch.randn(side, side, generator=drawn) + 1).bfloat16().to(dtype)
        if steps is None:
            optimizer.step()
        else:
            steps.step([weight])
    state = optimizer.state[weight]
    end = weight.detach().float() + (state[COMPENSATION].float() if way == "kahan" else 0)
    return end - start.float(), state


def test_a_kahan_sum_follows_float32_with_every_optimizer() -> None:
    """Plain bfloat16 stands still, but where an optimizer takes long steps."""
    wrong, tried = [], 0
    for name in OPTIMIZERS.names():
        options = options_of(name)
        if choose(options).named_schedule_free:
            continue  # refused
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wanted, _ = moved(options, "float32")
            except ConfigError:
                continue  # not installed
            found, state = moved(options, "kahan")
            plain, _ = moved(options, "plain")
        tried += 1
        far = (found - wanted).norm() / wanted.norm()
        if not far < 0.03 or state[COMPENSATION].dtype != torch.bfloat16:
            wrong.append((name, far.item()))
        if wanted.abs().max() < 1e-3 and bool(plain.any()):  # half the distance of bfloat16 numbers at 0.5
            wrong.append((name, "plain bfloat16 moved"))
    assert not wrong and tried > 10


@pytest.mark.parametrize("name", ["AdamW", "AdaFactor"])
def test_stochastic_rounding_follows_float32_in_the_mean_over_seeds(name: str) -> None:
    options = options_of(name)
    wanted, _ = moved(options, "float32", side=32)
    means = torch.stack([moved(options, "stochastic", seed, side=32)[0].mean() for seed in range(64)])  # [seeds]
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - wanted.mean()) < 3 * error < 0.1 * wanted.mean().abs()
    assert not moved(options, "plain")[0].any()


def test_a_compensation_is_no_business_of_the_optimizer() -> None:
    """An optimizer without a state of its own sees none; after a run with compensations, rounding forgets them."""
    options = OptimizerOptions(optimizer_type="SGD", learning_rate=RATE)
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = build(options, [{"params": [weight], "lr": RATE, "name": "a"}]).optimizer
    seen: list[set[str]] = []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append({key for own in opt.state.values() for key in own}))
    run = SimpleNamespace(optimizer=optimizer, step=SimpleNamespace(seed=0), progress=SimpleNamespace(global_step=0))
    for way, kept in (("kahan", {COMPENSATION}), ("kahan", {COMPENSATION}), ("stochastic", set())):
        weight.grad = torch.ones_like(weight)
        SingleSteps(run, way).step([weight])
        assert COMPENSATION in optimizer.state[weight] if kept else COMPENSATION not in optimizer.state.get(weight, {})
    assert all(COMPENSATION not in keys for keys in seen) and len(seen) == 3
