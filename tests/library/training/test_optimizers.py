"""Optimizers: what is found out at start, and what is told by the instance rather than by its name."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from library.core.errors import ConfigError
from library.training import optimizers
from library.training.optimizers import OptimizerOptions
from library.training.resumed_optimizer import place_counts
from library.training.updaters.single import bring_states


class QuietSgd(torch.optim.SGD):
    """Keeps two sets of weights, and no part of its name says so."""

    is_training = False

    def train(self) -> None:
        self.is_training = True

    def eval(self) -> None:
        self.is_training = False


def group(**values):
    return {"params": [torch.nn.Parameter(torch.ones(3))], "lr": 1e-3, "name": "unet", **values}


def test_packages_of_options_import_no_torch():
    packages = (
        "optimizers",
        "schedulers",
        "losses",
        "loss_weights",
        "timestep_samplers",
        "inference_samplers",
        "sampling_prompts",
        "checkpoint",
        "keyword_args",
    )
    code = "import sys\n" + "".join(f"import library.training.{name}\n" for name in packages)
    code += (
        "heavy = {'torch', 'numpy', 'transformers', 'bitsandbytes', 'toml'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_are_switched_by_capability_not_by_name():
    options = OptimizerOptions(optimizer_type=f"{__name__}.QuietSgd")
    build = optimizers.build(options, [group()])
    assert build.schedule_free and not build.choice.named_schedule_free
    assert build.optimizer.is_training, "made ready for training"
    assert not optimizers.build(OptimizerOptions(), [group()]).schedule_free


def test_groups_keep_their_rates_and_names():
    groups = [group(lr=1e-5), group(lr=1e-3, name="unet plus"), {"params": [], "lr": 1.0}]
    build = optimizers.build(OptimizerOptions(learning_rate=1e-4), groups)
    assert [(g["lr"], g["name"]) for g in build.optimizer.param_groups] == [(1e-5, "unet"), (1e-3, "unet plus")]


def moved(build: optimizers.OptimizerBuild) -> torch.Tensor:
    """The first weights after three steps."""
    weight = build.optimizer.param_groups[0]["params"][0]
    for step in range(3):
        weight.grad = torch.tensor([0.1, -2.0, 3.0]) / (step + 1)
        build.optimizer.step()
    return weight.detach()


def test_one_kernel_moves_all_weights_where_nothing_else_is_asked_for():
    plain = optimizers.build(OptimizerOptions(), [group()])
    fused = optimizers.build(OptimizerOptions(), [group()], fused=True)
    assert (plain.optimizer.param_groups[0]["fused"], fused.optimizer.param_groups[0]["fused"]) == (None, True)
    assert fused.metadata_text == plain.metadata_text, "no setting of the run"
    torch.testing.assert_close(moved(fused), moved(plain), rtol=3e-7, atol=0)
    for words in ({"optimizer_args": ["foreach=True"]}, {"optimizer_args": ["fused=False"]}, {"optimizer_type": "SGD"}):
        assert not optimizers.build(OptimizerOptions(**words), [group()], fused=True).optimizer.param_groups[0]["fused"]
    elsewhere = {"params": [torch.nn.Parameter(torch.ones(3, device="meta"))]}
    assert not optimizers.build(OptimizerOptions(), [elsewhere], fused=True).optimizer.param_groups[0]["fused"]


def test_counts_of_the_one_kernel_stand_with_the_weights():
    weight = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.AdamW([{"params": [weight], "fused": True}])
    optimizer.state[weight] = {"step": torch.ones(()), "exp_avg": torch.ones(3)}
    place_counts(optimizer)
    assert optimizer.state[weight]["step"].device.type == "meta"
    waiting = torch.nn.Parameter(torch.ones(3))  # in main memory, and updated on the device
    run = SimpleNamespace(
        optimizer=torch.optim.AdamW([{"params": [waiting], "fused": True}]),
        runtime=SimpleNamespace(device=torch.device("meta")),
    )
    run.optimizer.state[waiting] = {"step": torch.ones(()), "exp_avg": torch.ones(3)}
    bring_states(run)
    assert {value.device.type for value in run.optimizer.state[waiting].values()} == {"meta"}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="nothing to train"):
        optimizers.build(OptimizerOptions(), [{"params": [], "lr": 1.0}])


@pytest.mark.parametrize(("options", "words"), [
    ({"optimizer_args": ["lr=1e-3"]}, "lr"),
    ({"optimizer_type": "LBFGS"}, "LBFGS"),
    ({"optimizer_type": "lr_scheduler"}, "unknown optimizer"),
    ({"optimizer_type": "torch.optim.AdamX"}, "has no class AdamX"),
    ({"optimizer_args": ["betas=0.9"]}, "betas"),
])
def test_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        optimizers.check(OptimizerOptions(**options))
        optimizers.build(OptimizerOptions(**options), [group()])


def test_problems_of_the_options_are_reported_together():
    with pytest.raises(ConfigError) as error:
        OptimizerOptions(use_8bit_adam=True, use_lion_optimizer=True, learning_rate=-1.0, optimizer_args=["x", "=1"])
    assert len(error.value.problems) == 4


def test_adafactor_with_its_own_rates_ignores_those_of_groups():
    build = optimizers.build(OptimizerOptions(optimizer_type="adafactor", learning_rate=0.3), [group(lr=0.5)])
    assert build.optimizer.param_groups[0]["lr"] is None
    assert build.args_text == "relative_step=True"
    assert any("--learning_rate" in line for line in build.notices)
    fixed = optimizers.build(
        OptimizerOptions(optimizer_type="adafactor", optimizer_args=["relative_step=false"]), [group(lr=0.5)]
    )
    assert fixed.optimizer.param_groups[0]["lr"] == 0.5
