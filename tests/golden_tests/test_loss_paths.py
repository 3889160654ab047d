"""From prediction and target to the loss of a batch, for everything that is trained beside adapters: by the options of
each script, the objective of its family and the one loss function of all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.core.options import Config
from library.core.registry import import_target
from library.dataset import DatasetOptions
from library.families.registry import FAMILIES, record_of
from library.training import loss_weights, losses, parser_common
from library.training.loss import LossFunction
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.run import DiTOutput
from tests.golden_dir import behaviour, behaviour_cases

FILE = "loss_paths.json"
OF_DATA = ("alpha_mask", "prior_loss_weight")
"""options that the data set turns into masks and weights of samples"""


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    given = behaviour(FILE)["input"]
    shapes = {"prediction": given["shape"], "target": given["shape"], "alpha_masks": given["mask_shape"]}
    return {
        **{name: torch.tensor(given[name]).reshape(shape) for name, shape in shapes.items()},
        **{name: torch.tensor(given[name]) for name in ("timesteps", "sigmas")},
    }


def loss_of(config: Config, family: str) -> LossFunction:
    return LossFunction(
        losses.build(config[LossOptions]), loss_weights.build(config[LossWeightOptions]),
        import_target(record_of(family).family)(config).objective(), config[DatasetOptions].masked_loss,
    )


def command(options: dict[str, Any]) -> list[str]:
    given = {name: value for name, value in options.items() if name not in OF_DATA}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_loss_paths(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """One script after the other."""
    options, wanted = case["options"], torch.tensor([*case["per_sample"], case["loss"]])
    is_prior = [weight != 1 for weight in behaviour(FILE)["input"]["sample_weights"]]
    weights = [options.get("prior_loss_weight", 1.0) if prior else 1.0 for prior in is_prior]
    batch = SimpleNamespace(
        conditioning_images=torch.full((3, 3, 8, 12), -1.0),  # of a ControlNet: no mask
        alpha_masks=tensors["alpha_masks"] if options.get("alpha_mask") else None,
        loss_weights=torch.tensor(weights),
    )
    wrong = []
    for family in case["families"]:
        for trainable in FAMILIES[family].scripts:
            words = command(options)
            if record_of(family).variant_of:
                words.append("--{1}={2}".format(*record_of(family).variant_of))
            loss = loss_of(parser_common.parse(words, family, trainable), family)
            times = tensors["sigmas"] * 1000 if loss.objective.is_flow else tensors["timesteps"]
            sample: Any = SimpleNamespace(timesteps=times, sigmas=tensors["sigmas"])
            found = loss(DiTOutput(tensors["prediction"], tensors["target"]), sample, batch)
            found = torch.cat([found, found.mean()[None]])
            if not torch.allclose(found, wanted, rtol=2e-5, atol=0):
                wrong.append((family, trainable, found.tolist()))
    assert not wrong
