"""Automagic against its rules written out in float64, SOAP without a schedule against packages; both go on exactly."""

from __future__ import annotations

import io
import math

import pytest
import schedulefree
import torch
from pytorch_optimizer import SOAP

from library.core.errors import ConfigError
from library.training import optimizers, schedulers
from library.training.optimizers import OptimizerOptions
from library.training.optimizers.automagic import Automagic, AutomagicV2
from library.training.optimizers.soap_schedule_free import SOAPScheduleFree
from library.training.schedulers import SchedulerOptions

SHAPE, START = (6, 5), 0.01


def gradients(count: int, shape=SHAPE, seed: int = 0) -> list[torch.Tensor]:
    """With a direction of their own, so that signs stay more often than they turn."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(shape, generator=generator)
    return [direction + torch.randn(shape, generator=generator) for _ in range(count)]


def walk(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: list[torch.Tensor]) -> torch.Tensor:
    for gradient in steps:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().clone()


def by_hand(steps: list[torch.Tensor], of_tensor: bool, start=1e-5, bump=1e-6, decay=0.1, beta=0.9) -> tuple[list, list]:
    """(weights, mean rate of each step) of one matrix, number by number."""
    rows, columns = SHAPE
    weight = [[START] * columns for _ in range(rows)]
    rate = [[start] * columns for _ in range(rows)]
    row, column = [0.0] * rows, [0.0] * columns
    last = [[0] * columns for _ in range(rows)]
    means = []
    for step in steps:
        g = step.double().tolist()
        for i in range(rows):
            row[i] = beta * row[i] + (1 - beta) * sum(v * v for v in g[i]) / columns
        for j in range(columns):
            column[j] = beta * column[j] + (1 - beta) * sum(g[i][j] ** 2 for i in range(rows)) / rows
        mean = sum(row) / rows
        u = [[g[i][j] / math.sqrt(row[i] / mean * column[j]) for j in range(columns)] for i in range(rows)]
        size = math.sqrt(sum(v * v for r in u for v in r) / (rows * columns))
        said = [[(u[i][j] > 0) * 2 - 1 for j in range(columns)] for i in range(rows)]
        kept = [[said[i][j] * last[i][j] for j in range(columns)] for i in range(rows)]
        last = said
        together = sum(sum(r) for r in kept) / (rows * columns)
        for i in range(rows):
            for j in range(columns):
                rate[i][j] = min(1e-3, max(1e-7, rate[i][j] + bump * (together if of_tensor else kept[i][j])))
                weight[i][j] -= rate[i][j] * (u[i][j] / max(1.0, size) + decay * weight[i][j])
        means.append(sum(map(sum, rate)) / (rows * columns))
    return weight, means


@pytest.mark.parametrize("cls", [Automagic, AutomagicV2])
def test_automagic_follows_its_rules(cls) -> None:
    """To 1e-5 with one rate; with a rate of 8 bits for each weight, which rounds at random, nearly."""
    steps = [gradient * 0.95**step for step, gradient in enumerate(gradients(40))]  # some updates are not clipped
    weight = torch.nn.Parameter(torch.full(SHAPE, START))
    optimizer = cls([weight], lr=1e-5, weight_decay=0.1, beta2=0.9)
    found = walk(optimizer, weight, steps)
    expected, means = by_hand(steps, cls is AutomagicV2)
    wanted = torch.tensor(expected, dtype=torch.float64) - START
    assert (found.double() - START - wanted).norm() / wanted.norm() < (1e-5 if cls is AutomagicV2 else 0.02)
    rate = optimizer.group_rate(optimizer.param_groups[0])
    assert rate == pytest.approx(means[-1], rel=1e-5 if cls is AutomagicV2 else 0.02) and means[-1] > 1.2e-5


def test_a_bump_below_the_step_of_8_bits_counts() -> None:
    """At 9e-4 two codes lie 7.6e-6 apart, so that plain rounding would keep every rate where it is."""
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = Automagic([weight], lr=8e-4)
    walk(optimizer, weight, [torch.ones(64, 64)] * 101)
    assert optimizer.group_rate(optimizer.param_groups[0]) == pytest.approx(9e-4, rel=2e-3)
    assert optimizer.state[weight]["codes"].dtype == torch.uint8
    walk(optimizer, weight, [torch.ones(64, 64) * (-1) ** step for step in range(101)])
    assert optimizer.group_rate(optimizer.param_groups[0]) == pytest.approx(8e-4, rel=4e-3)
    walk(optimizer, weight, [torch.ones(64, 64)] * 300)
    assert optimizer.group_rate(optimizer.param_groups[0]) == pytest.approx(1e-3, rel=4e-3), "max_lr ends it"


@pytest.mark.parametrize("options", [
    {}, {"warmup_steps": 5, "r": 1.0, "weight_decay": 0.1}, {"weight_lr_power": 0.0, "betas": (0.9, 0.99)},
])  # fmt: skip
def test_soap_without_a_schedule_is_schedule_free_adam_on_vectors(options) -> None:
    """A vector has no preconditioner, so that SOAP is Adam there, one step later."""
    steps = gradients(25, (7,))
    settings = {"lr": 1e-2, "betas": (0.95, 0.95), "weight_decay": 0.0, **options}
    ours, theirs = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    optimizer, reference = SOAPScheduleFree([ours], **settings), schedulefree.AdamWScheduleFree([theirs], **settings)
    reference.train()
    walk(optimizer, ours, steps)
    walk(reference, theirs, steps[1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for built in (optimizer, reference):
        built.eval()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="train"):
        optimizer.step()
    before = optimizer.state[ours]["z"].clone()
    optimizer.train()
    walk(optimizer, ours, gradients(1, (7,)))
    assert not torch.equal(before, optimizer.state[ours]["z"])


def test_its_fast_weights_take_the_steps_of_soap() -> None:
    steps = gradients(25)
    ours, theirs = (torch.nn.Parameter(torch.ones(SHAPE)) for _ in range(2))
    optimizer = SOAPScheduleFree([ours], lr=1e-2, weight_decay=0.0)
    expected = walk(SOAP([theirs], lr=1e-2, betas=(0.0, 0.95), weight_decay=0.0), theirs, steps)
    walk(optimizer, ours, steps)
    torch.testing.assert_close(optimizer.state[ours]["z"], expected)


@pytest.mark.parametrize("name", ["automagic", "automagic_v2", "soap_sf"])
def test_they_go_on_exactly(name: str) -> None:
    steps = gradients(24)

    def made():
        weight = torch.nn.Parameter(torch.ones(SHAPE))
        group = {"params": [weight], "lr": 1e-3, "name": "unet"}
        return weight, optimizers.build(OptimizerOptions(optimizer_type=name, learning_rate=1e-3), [group]).optimizer

    weight, optimizer = made()
    whole = walk(optimizer, weight, steps)
    first, optimizer = made()
    walk(optimizer, first, steps[:13])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second, again = made()
    with torch.no_grad():
        second.copy_(first)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(walk(again, second, steps[13:]), whole)


def test_no_schedule_is_read_and_the_log_shows_the_rates() -> None:
    options = OptimizerOptions(optimizer_type="automagic", learning_rate=1e-5)
    schedule = SchedulerOptions(lr_scheduler="cosine")
    schedulers.check(schedule, options)
    assert [str(item) for item in schedulers.idle(schedule, options)] == [
        "--lr_scheduler: has no effect: Automagic moves its learning rates itself"
    ]
    weight = torch.nn.Parameter(torch.ones(SHAPE))
    build = optimizers.build(options, [{"params": [weight], "lr": 1e-5, "name": "unet"}])
    shown = schedulers.build(schedule, build, learning_rate=1e-5, max_train_steps=9)
    assert shown.get_last_lr() == [1e-5]
    walk(build.optimizer, weight, [torch.ones(SHAPE)] * 11)
    shown.step()
    assert shown.get_last_lr()[0] == pytest.approx(2e-5, rel=0.02)


def test_a_rate_above_the_largest_starts_low_and_is_told() -> None:
    options = OptimizerOptions(optimizer_type="automagic", learning_rate=1.0)
    assert "--learning_rate is 1.0, above max_lr 0.001" in optimizers.warnings_of(options)[0].text
    weight = torch.nn.Parameter(torch.ones(SHAPE))
    optimizer = optimizers.build(options, [{"params": [weight], "lr": 1.0}]).optimizer
    walk(optimizer, weight, [torch.ones(SHAPE)])
    assert optimizer.group_rate(optimizer.param_groups[0]) == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize("name, given", [
    ("automagic", "min_lr=1"), ("automagic", "beta2=1"), ("automagic", "clip_threshold=0"), ("automagic", "eps=-1"),
    ("soap_sf", "betas=0,0.9"), ("soap_sf", "warmup_steps=-1"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused(name: str, given: str) -> None:
    with pytest.raises(ConfigError, match=f"--optimizer_args is {given.partition('=')[0]}"):
        optimizers.check(OptimizerOptions(optimizer_type=name, optimizer_args=[given]))


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    monkeypatch.delitem(__import__("sys").modules, "library.training.optimizers.soap_schedule_free")
    with pytest.raises(ConfigError, match="SOAP_sf needs the package pytorch-optimizer.*pip install pytorch-optimizer"):
        optimizers.check(OptimizerOptions(optimizer_type="soap_sf"))
