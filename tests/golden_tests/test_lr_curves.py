"""Learning rates of every optimizer step against the reference file lr_curves.json."""

from __future__ import annotations

import re

import pytest
import torch

from library.core.errors import ConfigError
from library.training import optimizers, schedulers
from library.training.optimizers import OptimizerBuild, OptimizerOptions
from library.training.schedulers import SchedulerOptions
from library.training.schedulers.adafactor import adafactor_rate
from tests.golden_dir import behaviour_cases

FILE = "lr_curves.json"


class SwitchingSgd(torch.optim.SGD):
    """Has what makes an optimizer schedule-free here, whatever its name: train and eval."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def options_of(case) -> tuple[SchedulerOptions, OptimizerOptions]:
    pick = lambda cls: cls(**{k: v for k, v in case["options"].items() if k in cls.__dataclass_fields__})  # noqa: E731
    return pick(SchedulerOptions), pick(OptimizerOptions)


def build_optimizer(options: OptimizerOptions, rates) -> OptimizerBuild:
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate, "name": f"group {i}"}
        for i, rate in enumerate(rates)
    ]
    if optimizers.choose(options).named_schedule_free:
        return OptimizerBuild(SwitchingSgd(groups, lr=options.learning_rate), optimizers.choose(options), "", "")
    return optimizers.build(options, groups)


def rates_of_run(case) -> list[list[float]]:
    """Rates [group][step] that the optimizer has when it takes step k."""
    options, optimizer_options = options_of(case)
    schedulers.check(options, optimizer_options, case["options"]["max_train_steps"])
    build = build_optimizer(optimizer_options, case.get("group_lrs", [optimizer_options.learning_rate]))
    scheduler = schedulers.build(
        options, build, learning_rate=optimizer_options.learning_rate,
        max_train_steps=case["options"]["max_train_steps"]
    )
    used = []
    for _ in case["lr"]:
        assert scheduler.get_last_lr() == [group["lr"] for group in build.optimizer.param_groups]
        used.append([group["lr"] for group in build.optimizer.param_groups])
        for group in build.optimizer.param_groups:
            group["params"][0].grad = torch.zeros(2)
        build.optimizer.step()
        scheduler.step()
    return [list(column) for column in zip(*used)]


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: case.get("kind") != "adafactor_effective"))
def test_rates(case):
    alone = rates_of_run({key: value for key, value in case.items() if key != "group_lrs"})
    assert alone[0] == pytest.approx(case["lr"], rel=1e-5, abs=1e-13)
    rates = rates_of_run(case)
    for computed, expected in zip(rates, case.get("lr_by_group", rates), strict=True):
        assert computed == pytest.approx(expected, rel=1e-5, abs=1e-13)


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: case.get("kind") == "adafactor_effective"))
def test_rates_that_adafactor_finds(case):
    options, optimizer_options = options_of(case)
    build = build_optimizer(optimizer_options, [optimizer_options.learning_rate])
    group = build.optimizer.param_groups[0]
    for rms, expected in zip(case["parameter_rms"], case["lr_by_rms"], strict=True):
        computed = [adafactor_rate(k, rms, group) for k in range(1, len(expected) + 1)]
        assert computed == pytest.approx(expected, rel=1e-5)
        own = [build.optimizer._get_lr(group, {"step": k, "RMS": rms}) for k in range(1, len(expected) + 1)]
        assert own == pytest.approx(expected, rel=1e-5), "the optimizer itself uses these rates"


def test_adafactor_shows_the_asked_rate_before_the_first_step_and_its_own_after():
    options = OptimizerOptions(optimizer_type="AdaFactor", learning_rate=1e-4)
    parameter = torch.nn.Parameter(torch.full((4,), 0.5))
    build = optimizers.build(options, [{"params": [parameter], "lr": 1e-4, "name": "unet"}])
    scheduler = schedulers.build(SchedulerOptions(), build, learning_rate=1e-4, max_train_steps=5)
    assert scheduler.get_last_lr() == [1e-4]
    parameter.grad = torch.ones(4)
    build.optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.5 * 1e-2])


@pytest.mark.parametrize("case", behaviour_cases(FILE, "warmup_values"))
def test_step_counts(case):
    text, expected = case
    if "error" in expected:
        with pytest.raises(ValueError):
            schedulers.parse_step_count(text)
        with pytest.raises(ConfigError, match="lr_warmup_steps"):
            SchedulerOptions(lr_warmup_steps=text)
        return
    count = schedulers.parse_step_count(text)
    assert count.steps == expected.get("steps")
    assert count.fraction == pytest.approx(expected["fraction"]) if "fraction" in expected else count.fraction is None


@pytest.mark.parametrize("case", behaviour_cases(FILE, "errors"))
def test_errors(case):
    with pytest.raises(ConfigError) as error:
        schedulers.check(*options_of(case))
    text = str(error.value)
    assert any(str(word) in text for item in case["options"].items() for word in item)
    for word in re.findall(r"\w+", case["error"]):
        if (
            word in schedulers.SCHEDULERS
            or word in SchedulerOptions.__dataclass_fields__
            or word in ("step_rules", "metric", "AdaFactor")
        ):
            assert word in text
