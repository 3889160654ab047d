"""Every sampler against the reference files samplers.json and samplers.safetensors: states, times, noise levels and
draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training.inference_samplers import INFERENCE_SAMPLERS, discrete, linear_multistep
from library.training.inference_samplers.common import alpha_flow
from library.training.inference_samplers.flow import euler, flow_sampler, flow_schedule
from tests.golden_dir import BEHAVIOUR_DIR, behaviour, behaviour_cases

FILE = "samplers.json"
SCHEDULERS = {
    "DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "PNDMScheduler": "pndm", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a", "HeunDiscreteScheduler": "heun", "KDPM2DiscreteScheduler": "dpm_2",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_a", "DPMSolverSinglestepScheduler": "dpmsingle",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "euler", "FlowMatchHeunDiscreteScheduler": "heun",
}  # fmt: skip
ALGORITHMS = {"dpmsolver": "dpmsolver", "dpmsolver++": "dpmsolver++", "sde-dpmsolver++": "dpmsolver++_sde"}
SIGMA_TOLERANCE = 1e-5
"""the references subtract a float32 product near 1 from 1: five digits of sigma_min, and of levels spaced from it, are
left"""
EXTRA_CALLS = {"pndm": 9, "plms": 1}
"""network calls of a run beyond one per step"""


@pytest.fixture(scope="module")
def tensors():
    path = BEHAVIOUR_DIR / "samplers.safetensors"
    if not path.exists():
        pytest.fail(f"reference file {path} is missing")
    return load_file(path)


@dataclass
class Record:
    """What a sampler asked for: the state, sigma and timestep of each network call; how many noise tensors."""

    latents: list[torch.Tensor]
    sigmas: list[float]
    timesteps: list[float]
    draws: int = 0


def sampler_name(case: dict[str, Any]) -> str:
    if case["reference"].startswith("formula"):
        return case["name"].split("_stage")[0]
    scheduler = case["reference"].removeprefix("diffusers ")
    if scheduler == "DPMSolverMultistepScheduler":
        return ALGORITHMS[case["config"]["algorithm_type"]]
    if case["config"].get("skip_prk_steps"):
        return "plms"
    return "ddpm" if case["name"].endswith("_eta1") else SCHEDULERS[scheduler]


def clean_of(latents: torch.Tensor, alpha: float, scale: float, tensors) -> torch.Tensor:
    """The exact data estimate for Gaussian data."""
    mean, variance = tensors["data_mean"], tensors["data_variance"]
    return mean + alpha * variance / (alpha**2 * variance + scale**2) * (latents - alpha * mean)


def recorded_noise(case: dict[str, Any], tensors, record: Record) -> Callable[[], torch.Tensor]:
    def noise() -> torch.Tensor:
        record.draws += 1
        return tensors[f"{case['name']}/noise"][record.draws - 1]

    return noise


def compare(case: dict[str, Any], states: torch.Tensor, record: Record, tensors) -> None:
    tolerance = behaviour(FILE)["relative_tolerance"]
    recorded = tensors[f"{case['name']}/latents"]
    assert len(states) == len(recorded)
    torch.testing.assert_close(states.float(), recorded, rtol=tolerance, atol=tolerance * 0.01)
    assert record.sigmas == pytest.approx(case["sigma_of_call"], rel=SIGMA_TOLERANCE, abs=1e-6)
    noise = tensors.get(f"{case['name']}/noise")
    assert record.draws <= (0 if noise is None else len(noise))


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: case["space"] != "flow"))
def test_sampler_of_sd_models(case, tensors):
    name, config, calls = sampler_name(case), case["config"], len(case["timesteps"])
    num_steps = len(case["sigmas"]) - 1 if "sigmas" in case and name not in ("heun", "dpm_2", "dpm_2_a") else calls
    if name in ("heun", "dpm_2", "dpm_2_a"):
        num_steps = (calls + 1) // 2
    num_steps -= EXTRA_CALLS.get(name, 0)
    if name == "plms":
        schedule, sampler = discrete.schedule_of("pndm", num_steps, steps_offset=0), linear_multistep.plms
    elif config.get("use_karras_sigmas"):
        schedule = discrete.make_schedule(num_steps, "linspace_inner", table="karras")
        sampler = INFERENCE_SAMPLERS.resolve(name)
    else:
        schedule = discrete.schedule_of(name, num_steps, steps_offset=0)
        sampler = discrete.sampler_of(name, schedule)
    record, is_ve = Record([], [], []), case["space"] == "ve"
    prediction_type = "v" if config.get("prediction_type") == "v_prediction" else "epsilon"

    def predict(inputs: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = record.sigmas[-1]
        alpha = 1 / math.sqrt(1 + sigma**2)
        clean = clean_of(inputs, alpha, sigma * alpha, tensors)
        noise = (inputs - alpha * clean) / (sigma * alpha)
        record.timesteps.append(float(timestep))
        return alpha * noise - sigma * alpha * clean if prediction_type == "v" else noise

    network = discrete.network_denoiser(predict, schedule, prediction_type)

    def denoise(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        record.latents.append(latents if is_ve else discrete.network_latents(latents, float(sigma)))
        record.sigmas.append(float(sigma))
        return network(latents, sigma)

    first = float(schedule.sigmas[0])
    assert schedule.start_scale == pytest.approx(
        case["start_scale"] * (1 if is_ve else math.sqrt(1 + first**2)), rel=2e-6
    )
    start = tensors["start"] * schedule.start_scale
    result = sampler(denoise, start, schedule.sigmas, recorded_noise(case, tensors, record))
    result = result if is_ve else discrete.network_latents(result, float(schedule.sigmas[-1]))
    compare(case, torch.stack([*record.latents[1:], result]), record, tensors)
    assert record.timesteps == pytest.approx(case["timesteps"], rel=1e-5, abs=2e-3)
    if "sigmas" in case and len(case["sigmas"]) == num_steps + 1:
        assert schedule.sigmas.tolist() == pytest.approx(case["sigmas"], rel=SIGMA_TOLERANCE, abs=1e-6)


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: case["space"] == "flow"))
def test_sampler_of_flow_models(case, tensors):
    name, config = sampler_name(case), case["config"]
    calls, record = len(case["sigma_of_call"]), Record([], [], [])
    sigmas = torch.tensor(case["sigmas"], dtype=torch.float64)
    if name == "heun":  # the table names the start of every call; each step but the last has two
        sigmas = torch.cat([sigmas[:-1:2], sigmas[-1:]])
    sampler = flow_sampler(name)
    if name == "unipc":  # this case starts closer to 1 than our own limit
        sampler = functools.partial(INFERENCE_SAMPLERS.resolve(name), alpha=alpha_flow)
    if name == "er_sde":
        sampler = functools.partial(INFERENCE_SAMPLERS.resolve(name), alpha=alpha_flow, **config)

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        record.latents.append(latents)
        record.sigmas.append(float(sigma))
        clean = clean_of(latents, 1 - float(sigma), float(sigma), tensors)
        return (latents - clean) / float(sigma)

    start = tensors["start"] * case["start_scale"]
    result = sampler(velocity, start, sigmas, recorded_noise(case, tensors, record))
    assert len(record.latents) == calls
    compare(case, torch.stack([*record.latents[1:], result]), record, tensors)


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: case["name"] == "flow_euler"))
def test_flow_schedule(case):
    sigmas = case["sigmas"]
    first, second = 1 - 1 / (len(sigmas) - 1), sigmas[1]
    shift = case["config"].get(
        "shift", second * (1 - first) / (first * (1 - second))
    )  # where none is recorded, that of one sigma
    assert flow_schedule(len(sigmas) - 1, shift).tolist() == pytest.approx(sigmas, rel=1e-6, abs=1e-7)
    assert INFERENCE_SAMPLERS.resolve("euler") is euler
