"""What formulas from outside give is held against their contract, in one message each."""

from __future__ import annotations

import pytest
import torch

from library.core.errors import ConfigError, TrainingError
from library.core.registry import Registry, import_outside
from library.training import loss_weights, losses, optimizers
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.optimizers import OptimizerOptions

SHAPE = (2, 4, 8, 8)


def squares(options, prediction, target, timesteps, objective):
    return (prediction - target) ** 2


def mean(*args):
    return squares(*args).mean()


def mean_of_sample(*args):
    return squares(*args).flatten(1).mean(dim=1)


def nothing(*args):
    return None


def without_gradient(*args):
    return squares(*args).detach()


def loss_of(name: str, learns: bool = True) -> torch.Tensor:
    prediction, target = torch.randn(SHAPE, requires_grad=learns), torch.zeros(SHAPE)
    return losses.build(LossOptions(loss_type=f"{__name__}:{name}"))(prediction, target, torch.zeros(2), None)


@pytest.mark.parametrize(
    "name, told",
    [
        ("mean", r"gives a tensor \(\); needed: \(2, 4, 8, 8\)"),
        ("mean_of_sample", r"gives a tensor \(2,\); needed"),
        ("nothing", "gives a value of the type NoneType; needed: a tensor"),
        ("without_gradient", "gives a loss without a gradient"),
    ],
)
def test_a_loss_is_one_number_for_each_element(name: str, told: str) -> None:
    assert loss_of("squares").shape == SHAPE
    with pytest.raises(TrainingError, match=rf"--loss_type is {__name__}:{name}, which {told}"):
        loss_of(name)


def test_a_validation_needs_no_gradient() -> None:
    assert loss_of("without_gradient", learns=False).shape == SHAPE


def constant(snr, value, is_v):
    return 0.5


def column(snr, value, is_v):
    return torch.ones(len(snr), 1)


def needs_a_value(snr, value, is_v):
    return snr * value


def check_weight(item: str) -> None:
    loss_weights.check(LossWeightOptions(loss_weight=[f"{__name__}:{item}"]), False)


def test_a_weight_is_tried_on_two_samples_at_start() -> None:
    check_weight("constant")
    check_weight("needs_a_value=2")
    with pytest.raises(ConfigError, match=r"column, which gives \(2, 1\) for two samples; needed: a tensor \[2\]"):
        check_weight("column")
    with pytest.raises(ConfigError, match=r"fails for two samples; a value can be given as .*needs_a_value=5 \(TypeErr"):
        check_weight("needs_a_value")


@pytest.mark.parametrize("path", ["mine.py", "./mine.py", "/anywhere/mine.py", "sub\\mine.py"])
def test_a_path_of_a_file_is_no_module(path: str) -> None:
    with pytest.raises(ConfigError, match="a path of a file; write the name of the module, mine, of the current folder"):
        import_outside(path, "--plugins")


def test_known_names_stand_apart_from_what_is_unlike_all_of_them() -> None:
    registry: Registry = Registry("formula", option="formula_type")
    registry.add("ratio", "fractions:Fraction")
    assert registry.problem("quartic") == "--formula_type is 'quartic'. Known: ratio"


class NoOptimizer:
    def __init__(self, params, lr):
        pass


class WithoutRate(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params)


@pytest.mark.parametrize(
    "name, told",
    [("NoOptimizer", "has no param_groups, step, zero_grad, state_dict"), ("WithoutRate", "cannot be made of parameter")],
)
def test_an_optimizer_is_like_those_of_torch(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"--optimizer_type {__name__}[.:]{name} {told}.*a class like those of torch"):
        optimizers.check(OptimizerOptions(optimizer_type=f"{__name__}:{name}"))
