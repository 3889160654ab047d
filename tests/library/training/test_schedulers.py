"""Schedules: notices, start-up checks, and going on from a saved state."""

from __future__ import annotations

import io

import pytest
import torch

from library.core.errors import ConfigError
from library.training import optimizers, schedulers
from library.training.optimizers import OptimizerOptions
from library.training.schedulers import SchedulerOptions

NAMES = [entry.name for entry in schedulers.SCHEDULERS if entry.name not in ("adafactor", "none")]
NEEDED = {"lr_scheduler_min_lr_ratio": 0.1}


def made(options: SchedulerOptions, total: int = 12):
    build = optimizers.build(
        OptimizerOptions(learning_rate=1e-3), [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 1e-3}]
    )
    return build.optimizer, schedulers.build(options, build, learning_rate=1e-3, max_train_steps=total)


def advance(optimizer, scheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def options_named(name: str) -> SchedulerOptions:
    if name == "piecewise_constant":
        return SchedulerOptions(lr_scheduler=name, lr_scheduler_args=["step_rules=1:3,0.5:8,0.1"])
    if name == "cosine_with_warm_restarts":
        return SchedulerOptions(lr_scheduler=name, lr_warmup_steps="3", lr_scheduler_args=["T_0=4"])
    return SchedulerOptions(lr_scheduler=name, lr_warmup_steps="3", lr_decay_steps="25%", **NEEDED)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_schedule_equals_the_uninterrupted_one(name):
    optimizer, scheduler = made(options_named(name))
    whole = advance(optimizer, scheduler, 12)
    optimizer, scheduler = made(options_named(name))
    first = advance(optimizer, scheduler, 5)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    optimizer, scheduler = made(options_named(name))
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    assert first + advance(optimizer, scheduler, 7) == whole
    assert len(set(whole)) > 1, "the curve moves"


def rates_of(total: int, **options) -> list[float]:
    optimizer, scheduler = made(SchedulerOptions(**options), total)
    return advance(optimizer, scheduler, total)


def test_cosines_end_at_eta_min():
    """Against torch's own schedules, behind the warm-up."""
    torch_options = {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=12", "eta_min=2e-4"]}
    expected = rates_of(12, **torch_options)
    for name in ("cosine", "cosine_with_warmup"):
        found = rates_of(15, lr_scheduler=name, lr_warmup_steps=3, lr_scheduler_args=["eta_min=2e-4"])
        assert found[:3] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3]) and found[3:] == pytest.approx(expected), name
    assert rates_of(9, lr_scheduler="cosine_with_warmup")[-1] > rates_of(9, lr_scheduler="cosine")[-1] > 0
    assert rates_of(4, lr_scheduler="none") == [1e-3] * 4


@pytest.mark.parametrize("factor", [1, 2])
def test_warm_restarts_are_those_of_torch(factor):
    args = ["T_0=3", f"T_mult={factor}", "eta_min=1e-5"]
    expected = rates_of(20, lr_scheduler_type="CosineAnnealingWarmRestarts", lr_scheduler_args=args)
    found = rates_of(22, lr_scheduler="cosine_with_warm_restarts", lr_warmup_steps=2, lr_scheduler_args=args)
    assert found[2:] == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_rates_stay_between_zero_and_the_rate(name):
    optimizer, scheduler = made(options_named(name))
    assert all(0 <= rate <= 1e-3 * (1 + 1e-12) for rate in advance(optimizer, scheduler, 20))


@pytest.mark.parametrize(
    ("options", "optimizer", "total", "words"),
    [
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:9,0.5:3,0.1"]},
            {},
            None,
            "step_rules",
        ),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules=1:9,1"], "lr_warmup_steps": 3},
            {},
            None,
            "lr_warmup_steps",
        ),
        ({"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 6, "lr_decay_steps": 6}, {}, 10, "lr_decay_steps"),
        ({"lr_scheduler": "warmup_stable_decay", "lr_scheduler_args": ["decay_type=line"]}, {}, None, "decay_type"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["T_max=3"]}, {}, None, "T_max"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, {}, None, "T_max"),
        (
            {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=3"], "lr_warmup_steps": "5%"},
            {},
            None,
            "lr_warmup_steps",
        ),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, {}, None, "metric"),
        ({"lr_scheduler_type": "no_such_package.Thing"}, {}, None, "no_such_package"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ["min_lr=1"]}, {"learning_rate": 1e-3}, None, "min_lr"),
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ["eta_min=1"]}, {"learning_rate": 1e-3}, None, "eta_min"),
        ({"lr_scheduler": "none", "lr_warmup_steps": 5}, {}, None, "none has no warm-up"),
        ({"lr_scheduler": "cosine_with_warm_restarts", "lr_scheduler_args": ["T_mult=1.5"]}, {}, None, "whole number"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": ["lr_end=1"]}, {"learning_rate": 1e-3}, None, "lr_end"),
        (
            {"lr_scheduler": "adafactor"},
            {"optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False"]},
            None,
            "relative_step",
        ),
    ],
)
def test_refused(options, optimizer, total, words):
    with pytest.raises(ConfigError, match=words):
        schedulers.check(SchedulerOptions(**options), OptimizerOptions(**optimizer), total)


@pytest.mark.parametrize(("options", "optimizer", "words"), [
    ({"lr_warmup_steps": 5}, {}, "constant_with_warmup"),
    ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3}, {}, "lr_scheduler_num_cycles"),
    ({"lr_scheduler": "cosine"}, {"optimizer_type": "AdamWScheduleFree"}, "lr_scheduler"),
    ({"lr_scheduler": "linear", "lr_scheduler_type": "StepLR"}, {}, "--lr_scheduler: has no effect"),
    ({"lr_scheduler": "linear"}, {"optimizer_type": "AdaFactor"}, "own schedule"),
])
def test_one_notice(options, optimizer, words):
    options = SchedulerOptions(**options)
    lines = [*schedulers.notices(options), *map(str, schedulers.idle(options, OptimizerOptions(**optimizer)))]
    assert len(lines) == 1 and words in lines[0]


def test_no_notice_without_reason():
    for options in (SchedulerOptions(), SchedulerOptions(lr_scheduler="cosine", lr_warmup_steps="10%")):
        assert schedulers.notices(options) == [] and schedulers.idle(options, OptimizerOptions()) == []


def test_arguments_of_a_curve_are_finite():
    for text in ("rex_alpha=1e400", f"min_lr={10**40}"):
        with pytest.raises(ConfigError, match="is needed"):
            schedulers.check(SchedulerOptions(lr_scheduler="rex", lr_scheduler_args=[text]), OptimizerOptions())
