"""Whole optimizer steps of a fine-tune: losses, gradient norms and what became of the weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.core.errors import CheckpointError
from library.training.objective import FlowMatchingObjective, clean_estimate
from tests.golden_cases import _loaded
from tests.golden_dir import GOLDEN_DIR, load_golden

NAME = "full_step_sd3"
UPDATE_TOLERANCE = {"AdamW": 5e-3, "Adafactor": 5e-4}


def cases() -> list[Any]:
    path = GOLDEN_DIR / f"{NAME}.safetensors"
    if not path.exists():
        return [pytest.param(None, id="missing")]
    with safe_open(path, framework="pt") as file:
        found = json.loads(file.metadata()["golden"])["config"]["cases"]
    return [pytest.param(case, id=case["name"]) for case in found]


def optimizer_of(case: dict[str, Any], parameters: list[Tensor]) -> torch.optim.Optimizer:
    if case["optimizer"] == "AdamW":
        return torch.optim.AdamW(parameters, **case["args"])
    from transformers.optimization import Adafactor

    return Adafactor(parameters, **case["args"])


def frozen(case: dict[str, Any], key: str, depth: int) -> bool:
    return any(key.startswith(f"joint_blocks.{depth - 1 - i}.") for i in range(case.get("num_last_block_to_freeze", 0)))


@pytest.mark.parametrize("case", cases())
def test_steps_of_sd3(case: dict[str, Any] | None) -> None:
    """The loss compares clean estimate and clean latents, as the family does."""
    from library.sd3_utils import load_sd3

    weights, inputs, expected, config = load_golden(NAME)
    model = _loaded(load_sd3, weights, {})
    assert isinstance(case, dict), CheckpointError
    learning = {
        key: p.requires_grad_(True) for key, p in model.named_parameters() if not frozen(case, key, model.params.depth)
    }
    optimizer = optimizer_of(case, list(learning.values()))
    objective = FlowMatchingObjective(None, target="latents")
    losses, norms = [], []
    for step in range(case["steps"]):
        times = inputs["timesteps"][step].float() / 1000
        sample = objective.corrupt(inputs["latents"], inputs["noise"][step], times, None)
        velocity = model(sample.noisy_latents, sample.timesteps, inputs["y"], inputs["context"])
        loss = (clean_estimate(velocity, sample.noisy_latents, sample.sigmas) - sample.target).square().mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in learning.values()]).item())
        optimizer.step()
        optimizer.zero_grad()

    def of(name: str) -> Tensor:
        return expected[f"{case['name']}/{name}"]

    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), of("losses"), rtol=2e-5, atol=0)
    torch.testing.assert_close(torch.tensor(norms, dtype=torch.float64), of("grad_norms"), rtol=1e-4, atol=0)
    state, bound = model.state_dict(), UPDATE_TOLERANCE[case["optimizer"]]
    for key, wanted_norm, wanted_sum in zip(config["keys"], of("delta_norms").tolist(), of("delta_sums").tolist()):
        if key in config["noise_only"]:
            continue
        delta = state[key].double() - weights[key].double()
        assert abs(delta.norm().item() - wanted_norm) <= bound * wanted_norm, key
        assert abs(delta.sum().item() - wanted_sum) <= bound * wanted_norm * delta.numel() ** 0.5, key
    for key in config["selected"]:
        before, after, wanted = (
            tensor[:4] if weights[key].numel() > 2000 else tensor
            for tensor in (weights[key], state[key], of(f"weights/{key}"))
        )
        change = (wanted - before).norm()
        assert (after - wanted).norm() <= bound * change if change else torch.equal(after, wanted), key
