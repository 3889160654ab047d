"""Losses, weights, noising and masks against the reference files loss.json and loss.safetensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.core.keyed_random import StepDraws
from library.training import loss_weights, losses, timesteps
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.losses.reduction import loss_mask, per_sample_loss
from library.training.objective import DdpmObjective, FlowMatchingObjective, Objective, clean_estimate
from library.training.timestep_samplers import TimestepOptions
from tests.golden_dir import BEHAVIOUR_DIR, behaviour_cases

FILE = "loss.json"
FLOW_FAMILIES = ("sd3", "flux", "chroma", "lumina", "hunyuan_image", "anima")
WITH_PREDICTION_TYPE = ("flux", "chroma", "lumina", "hunyuan_image")
FLOW_TARGET = {"lumina": "reverse_velocity", "sd3": "latents"}


@pytest.fixture(scope="module")
def tensors():
    path = BEHAVIOUR_DIR / "loss.safetensors"
    if not path.exists():
        pytest.fail(f"reference file {path} is missing")
    return load_file(path)


def picked(options_class, case):
    """The options of a case that belong to one class."""
    return options_class(**{k: v for k, v in case["options"].items() if k in options_class.__dataclass_fields__})


def objective_of(case) -> Objective:
    families = case.get("families", [])
    if case.get("objective") == "flow" or any(family in FLOW_FAMILIES for family in families):
        target = FLOW_TARGET.get(families[0], "velocity") if families and case["kind"] != "noisy" else "velocity"
        return FlowMatchingObjective(picked(TimestepOptions, case), target=target, weigh=True)
    prediction_type = "v" if case["options"].get("v_parameterization") else "epsilon"
    return DdpmObjective(
        TimestepOptions(), prediction_type=prediction_type,
        zero_terminal_snr=case["options"].get("zero_terminal_snr", False),
    )


def noised(objective, tensors):
    times = tensors["input/sigmas"] if objective.is_flow else tensors["input/timesteps"]
    draws = StepDraws(0, 0, tuple(range(len(times))))
    return objective.corrupt(tensors["input/latents"], tensors["input/noise"], times, draws)


def mask_of(case, tensors, shape):
    alpha_masks = conditioning_images = None
    if "alpha_masks" in case.get("uses", []):
        alpha_masks = tensors["input/alpha_masks"].clone()
        alpha_masks[case.get("without_mask", [])] = 1.0
    if "conditioning_images" in case.get("uses", []):
        conditioning_images = tensors["input/conditioning_images"]
    return loss_mask(conditioning_images, alpha_masks, shape, masked_loss=case["options"].get("masked_loss", False))


def reduced(case, tensors) -> torch.Tensor:
    """The losses [B] of a case through the whole chain."""
    objective = objective_of(case)
    sample = noised(objective, tensors)
    prediction, target = tensors["input/prediction"], tensors["input/target"]
    weight = objective.loss_weight(sample)
    family = case.get("families", [None])[0]
    if family is not None:
        raw = family in WITH_PREDICTION_TYPE and case["options"].get("model_prediction_type", "raw") == "raw"
        if family == "sd3" or (family in WITH_PREDICTION_TYPE and not raw):
            velocity = -prediction if family == "lumina" else prediction
            prediction, target = clean_estimate(velocity, sample.noisy_latents, sample.sigmas), sample.latents
        else:
            target = sample.target
        weight = None if raw else weight
    element = losses.build(picked(LossOptions, case))(prediction, target, sample.timesteps, objective)
    factor = loss_weights.build(picked(LossWeightOptions, case))
    return per_sample_loss(
        element,
        flow_weight=weight,
        mask=mask_of(case, tensors, element.shape),
        sample_weights=tensors["input/loss_weights"] if "loss_weights" in case.get("uses", []) else None,
        factors=factor(sample.timesteps, objective) if factor else None,
    )


def computed(case, tensors) -> torch.Tensor:
    kind, objective = case["kind"], objective_of(case)
    if kind == "element":
        times = tensors["input/sigmas"] * 1000 if objective.is_flow else tensors["input/timesteps"]
        loss = losses.build(picked(LossOptions, case))
        return loss(tensors["input/prediction"], tensors["input/target"], times, objective)
    if kind == "factor":
        times = tensors["input/" + case.get("timesteps", "timesteps")]
        return loss_weights.build(picked(LossWeightOptions, case))(times, objective)
    if kind == "flow_weight":
        return timesteps.flow_weights(case["options"]["weighting_scheme"], tensors["input/sigmas"])
    if kind in ("noisy", "target"):
        sample = noised(objective, tensors)
        return sample.noisy_latents if kind == "noisy" else sample.target
    if kind == "prediction":
        sample = noised(objective, tensors)
        return clean_estimate(tensors["input/prediction"], sample.noisy_latents, sample.sigmas)
    losses_of_samples = reduced(case, tensors)
    return losses_of_samples.mean() if kind == "scalar" else losses_of_samples


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_loss(case, tensors):
    expected = tensors["output/" + case["name"]]
    result = computed(case, tensors)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-7)


def test_the_weighting_of_a_schedule_is_left_out_where_it_is_one(tensors):
    objective = FlowMatchingObjective(TimestepOptions(weighting_scheme="logit_normal"), weigh=True)
    assert objective.loss_weight(SimpleNamespace(sigmas=tensors["input/sigmas"])) is None
