"""Samplers against the reference files samplers.json and samplers.safetensors, as far as families use them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from library.training.inference_samplers import INFERENCE_SAMPLERS
from library.training.inference_samplers.flow import flow_schedule
from tests.golden_dir import BEHAVIOUR_DIR, behaviour_cases

FILE = "samplers.json"


@pytest.fixture(scope="module")
def tensors():
    path = BEHAVIOUR_DIR / "samplers.safetensors"
    if not path.exists():
        pytest.fail(f"reference file {path} is missing")
    return load_file(path)


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: case["name"] == "flow_euler"))
def test_flow_euler(case, tensors):
    mean, variance = tensors["data_mean"], tensors["data_variance"]
    states = tensors[f"{case['name']}/latents"]  # [steps, 1, C, H, W]
    seen: list[tuple[torch.Tensor, float]] = []

    def velocity(latents, sigma):
        seen.append((latents, float(sigma)))
        alpha = 1 - sigma
        clean = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (latents - alpha * mean)
        return (latents - clean) / sigma

    start = tensors["start"] * case["start_scale"]
    result = INFERENCE_SAMPLERS.resolve("euler")(velocity, start, torch.tensor(case["sigmas"]), None)
    assert [sigma for _, sigma in seen] == pytest.approx(case["sigma_of_call"], rel=1e-6)
    torch.testing.assert_close(torch.stack([latents for latents, _ in seen[1:]] + [result]), states, rtol=2e-4, atol=1e-6)
    first, second = 1 - 1 / len(states), case["sigmas"][1]
    shift = case["config"].get("shift", second * (1 - first) / (first * (1 - second)))  # where no shift is recorded, that of one sigma
    assert flow_schedule(len(states), shift).tolist() == pytest.approx(case["sigmas"], rel=1e-6, abs=1e-7)
