"""Every short name of --optimizer_type builds and steps, with the real package, on matrices as adapters have them."""

from __future__ import annotations

import pytest
import torch

from library.core.errors import ConfigError
from library.training import optimizers
from library.training.optimizers import OPTIMIZERS, OptimizerOptions

NEEDS_GPU = {"PagedAdEMAMix8bit"} | {entry.name for entry in OPTIMIZERS if entry.name.startswith("Paged")}
"""paged memory belongs to CUDA"""
SHORT = sorted({entry.name for entry in OPTIMIZERS} - NEEDS_GPU)


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_builds_and_steps(name: str) -> None:
    """A linear fit with a low-rank pair comes closer to its target; the second matrix starts at zero, as adapters
    do."""
    torch.manual_seed(0)
    down, up = torch.nn.Parameter(torch.randn(4, 32) / 6), torch.nn.Parameter(torch.zeros(32, 4))
    options = OptimizerOptions(
        optimizer_type=name.swapcase(), learning_rate=1.0 if "rodigy" in name or name.startswith("DAdapt") else 1e-2
    )
    optimizers.check(options)
    build = optimizers.build(options, [{"params": [down, up], "lr": options.learning_rate, "name": "unet"}])
    target, x, losses = torch.randn(32, 32) / 6, torch.randn(64, 32), []
    for _ in range(30):
        build.optimizer.zero_grad()
        loss = (x @ down.T @ up.T - x @ target.T).square().mean()
        loss.backward()
        build.optimizer.step()
        losses.append(float(loss.detach()))
    assert up.detach().abs().sum() > 0, "the second matrix left zero"
    assert min(losses) < losses[0] and all(value == value for value in losses)
    state = build.optimizer.state_dict()
    again = optimizers.build(options, [{"params": [down, up], "lr": options.learning_rate, "name": "unet"}]).optimizer
    again.load_state_dict(state)


@pytest.mark.parametrize(
    "given, name",
    [
        ("prodigyplus.ProdigyPlusScheduleFree", "ProdigyPlusScheduleFree"),
        ("schedulefree.AdamWScheduleFree", "AdamWScheduleFree"),
        ("pytorch_optimizer.CAME", "CAME"), ("came_pytorch.CAME", "CAME"),
        ("pytorch_optimizer.ScheduleFreeAdamW", "ScheduleFreeAdamW"),
    ],
)
def test_dotted_names_of_front_ends_work(given: str, name: str) -> None:
    options = OptimizerOptions(optimizer_type=given, learning_rate=1e-3)
    optimizers.check(options)
    assert optimizers.choose(options).class_name == name


def test_schedule_free_optimizers_switch_their_weights() -> None:
    for name in (
        "ProdigyPlusScheduleFree",
        "ScheduleFreeAdamW",
        "ScheduleFreeRAdam",
        "ScheduleFreeSGD",
        "AdamWScheduleFree",
    ):
        build = optimizers.build(
            OptimizerOptions(optimizer_type=name), [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 1.0}]
        )
        assert build.schedule_free and build.choice.named_schedule_free, name


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptLion"])
def test_different_rates_are_named_at_start_where_the_optimizer_refuses_them(name: str) -> None:
    options = OptimizerOptions(optimizer_type=name, learning_rate=1.0)
    with pytest.raises(ConfigError, match=f"{name} takes one learning rate for all parts.* 0.5 and 1.0"):
        optimizers.check_rates(options, [1.0, 0.5])
    optimizers.check_rates(options, [1.0, 1.0])
    optimizers.check_rates(options, [1.0, 0.0])
    optimizers.check_rates(OptimizerOptions(optimizer_type="AdamW"), [1.0, 0.5])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS.names() if OPTIMIZERS.entry(name).package != "bitsandbytes"])
def test_an_argument_that_nothing_reads_is_refused(name: str) -> None:
    """Some packages swallow every keyword."""
    with pytest.raises(ConfigError, match="sets nonesuch, which"):
        optimizers.check(OptimizerOptions(optimizer_type=name, optimizer_args=["nonesuch=1"]))


def test_arguments_that_are_read_without_a_name_of_their_own_are_taken() -> None:
    for name, given in (("Adan", "clip_global_grad_norm=1"), ("ScheduleFreeAdamW", "use_palm=True")):
        optimizers.check(OptimizerOptions(optimizer_type=name, optimizer_args=[given]))


def test_the_extra_is_named_for_packages_that_it_has() -> None:
    def told(name: str) -> str:
        choice = optimizers.choose(OptimizerOptions(optimizer_type=name))
        return optimizers._lacks_package(choice, choice.package)

    assert "[optimizers]" in told("Lion") and "[optimizers]" in told("pytorch_optimizer.Lion")
    assert "[optimizers]" not in told("AdamW8bit") and "[optimizers]" not in told("nowhere.Adam")
