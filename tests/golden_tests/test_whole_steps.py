"""Whole optimizer steps of fine-tunes of a denoiser, with the rates, groups and ways to update of the trainable; and the
stochastic rounding of its bfloat16 weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.components.unet_utils import unet_file_state
from library.core.learning_rates import parse_rates, rate_groups
from library.training.objective import DdpmObjective, FlowMatchingObjective
from library.training.option_groups import NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.updaters.bf16_weights import kahan_sum, stochastically_rounded
from library.training.updaters.single import FusedUpdater
from library.training.wiring.anima import WHOLE_RATE_PATTERNS
from library.training.wiring.sdxl import BLOCKS
from tests.golden_cases import _loaded
from tests.golden_dir import GOLDEN_DIR, load_golden
from tests.golden_tests.test_full_step import UPDATE_TOLERANCE, optimizer_of

NAMES = ("full_step_sd1", "full_step_sdxl", "full_step_flux", "full_step_anima")


def cases() -> list[Any]:
    found = []
    for name in NAMES:
        path = GOLDEN_DIR / f"{name}.safetensors"
        if not path.exists():
            found.append(pytest.param(name, None, id=f"{name}-missing"))
            continue
        with safe_open(path, framework="pt") as file:
            listed = json.loads(file.metadata()["golden"])["config"]["cases"]
        found += [pytest.param(name, case, id=f"{name}-{case['name']}") for case in listed]
    return found


def unet_loss(model: torch.nn.Module, inputs: dict[str, Tensor], step: int) -> Tensor:
    objective = DdpmObjective(TimestepOptions(), NoiseOptions(), prediction_type="epsilon")
    sample = objective.corrupt(inputs["latents"], inputs["noise"][step], inputs["timesteps"][step], None)
    more = [inputs["y"]] if "y" in inputs else []
    return (model(sample.noisy_latents, sample.timesteps, inputs["context"], *more) - sample.target).square().mean()


def flow_sample(inputs: dict[str, Tensor], step: int) -> Any:
    objective = FlowMatchingObjective(None, target="velocity")
    return objective.corrupt(inputs["latents"], inputs["noise"][step], inputs["sigmas"][step].float(), None)


def flux_loss(model: torch.nn.Module, inputs: dict[str, Tensor], step: int) -> Tensor:
    from library.flux_train_utils import on_packed_latents

    sample = flow_sample(inputs, step)
    velocity = on_packed_latents(
        model, sample.noisy_latents, sample.timesteps, inputs["txt"], y=inputs["y"], guidance=inputs["guidance"],
        txt_attention_mask=None,
    )
    return (velocity - sample.target).square().mean()


def anima_loss(model: torch.nn.Module, inputs: dict[str, Tensor], step: int) -> Tensor:
    from library.anima_train_utils import predict_velocity

    sample = flow_sample(inputs, step)
    text = {
        "prompt_embeds": inputs["source_hidden_states"], "attn_mask": inputs["source_mask"],
        "t5_input_ids": inputs["target_ids"], "t5_attn_mask": inputs["target_mask"],
    }  # fmt: skip
    return (predict_velocity(model, sample.noisy_latents, sample.timesteps, text) - sample.target).square().mean()


def model_of(name: str, weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[torch.nn.Module, Callable, Callable]:
    """(model, its loss at a step, its weights under the names of files)."""
    from library.anima_utils import load_anima
    from library.flux_utils import load_flux
    from library.sd_utils import load_unet_sd
    from library.sdxl_utils import load_unet_sdxl

    if name == "full_step_flux":
        return _loaded(load_flux, weights, config["flux"]), flux_loss, lambda model: model.state_dict()
    if name == "full_step_anima":
        return _loaded(load_anima, weights, config["anima"]), anima_loss, lambda model: model.state_dict()
    is_xl = name == "full_step_sdxl"
    model = _loaded(load_unet_sdxl if is_xl else load_unet_sd, weights, config["unet"])
    return model, unet_loss, lambda model: unet_file_state(model, tree_is_diffusers=not is_xl)


def rates_of(name: str, case: dict[str, Any]) -> str:
    """As --layer_lrs."""
    given = case.get("rates")
    if name == "full_step_sdxl" and given:
        return ",".join(f"{pattern}={rate}" for pattern, rate in zip(BLOCKS, given, strict=True))
    if name == "full_step_flux" and given:
        return ",".join(f"^{start}=0" for start in case["frozen"])
    if name == "full_step_anima" and given:
        return ",".join(f"^{p}={given[option.removesuffix('_lr')]}" for option, p in WHOLE_RATE_PATTERNS.items())
    return ""


def updater_run(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> Any:
    return SimpleNamespace(
        optimizer=optimizer, max_grad_norm=max_grad_norm, lr_scheduler=SimpleNamespace(step=lambda: None),
        step=SimpleNamespace(seed=0), progress=SimpleNamespace(global_step=0),
        runtime=SimpleNamespace(backward=lambda loss: loss.backward()),
    )


@pytest.mark.parametrize("name, case", cases())
def test_steps(name: str, case: dict[str, Any] | None) -> None:
    weights, inputs, expected, config = load_golden(name)
    assert case is not None
    model, loss_of, state_of = model_of(name, weights, config)
    default, rates = case["args"].get("lr") or 1.0, parse_rates(rates_of(name, case), "layer_lrs")
    groups = rate_groups(model.named_parameters(), default, rates, name="denoiser")
    if case["args"]["lr"] is None:  # the optimizer finds its own
        groups = [{"params": group["params"]} for group in groups]
    optimizer = optimizer_of(case, groups)
    learning = [p for group in groups for p in group["params"]]
    run, is_fused = updater_run(optimizer, case["max_grad_norm"]), bool(case.get("fused") or case.get("fused_equal"))
    updater = FusedUpdater()
    if is_fused:
        updater.begin(run)
    losses, norms = [], []
    for step in range(case["steps"]):
        loss = loss_of(model, inputs, step)
        losses.append(loss.item())
        updater.backward(run, loss)
        if not is_fused:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None]).item())
            if case["max_grad_norm"]:
                torch.nn.utils.clip_grad_norm_(learning, case["max_grad_norm"])
            optimizer.step()
        assert not is_fused or all(p.grad is None for p in learning)
        optimizer.zero_grad()

    def of(what: str) -> Tensor:
        return expected[f"{case['name']}/{what}"]

    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), of("losses"), rtol=2e-5, atol=0)
    if norms:
        torch.testing.assert_close(torch.tensor(norms, dtype=torch.float64), of("grad_norms"), rtol=1e-4, atol=0)
    state = state_of(model)
    bound = 5e-4 if case["args"].get("eps") == 1e-6 else UPDATE_TOLERANCE[case["optimizer"]]
    for key, wanted_norm, wanted_sum in zip(config["keys"], of("delta_norms").tolist(), of("delta_sums").tolist()):
        if key in config["noise_only"]:
            continue
        delta = state[key].reshape(weights[key].shape).double() - weights[key].double()
        assert abs(delta.norm().item() - wanted_norm) <= bound * wanted_norm, key
        assert abs(delta.sum().item() - wanted_sum) <= bound * wanted_norm * delta.numel() ** 0.5, key
    for key in config["selected"]:
        before, after, wanted = (
            tensor[:4] if weights[key].numel() > 2000 else tensor
            for tensor in (weights[key], state[key].reshape(weights[key].shape), of(f"weights/{key}"))
        )
        change = (wanted - before).norm()
        assert (after - wanted).norm() <= bound * change if change else torch.equal(after, wanted), key


def test_stochastic_rounding() -> None:
    _, inputs, expected, _ = load_golden("stochastic_rounding")
    values = inputs["values"]
    assert torch.equal(stochastically_rounded(values, inputs["random"]).float(), expected["rounded"])
    for value, count, lower in zip(values, expected["up_count"].tolist(), expected["lower"]):
        found = stochastically_rounded(value.expand(1 << 16), torch.arange(1 << 16, dtype=torch.int32)).float()
        assert int((found != lower).sum()) == count


def test_kahan_summation() -> None:
    """Bit for bit; plain bfloat16 does not move."""
    _, inputs, expected, config = load_golden("stochastic_rounding")
    weight = plain = torch.tensor(config["start"], dtype=torch.bfloat16)
    compensation = torch.zeros_like(weight)
    states = []
    for number, update in enumerate(inputs["updates"]):
        weight, compensation = kahan_sum(weight, compensation, update)
        plain = (plain.float() + update).to(torch.bfloat16)
        if number % config["stride"] == 0:
            states.append((weight.float(), compensation.float()))
    found = torch.tensor(states)  # [steps / stride, 2]
    assert torch.equal(found[:, 0], expected["kahan/weight"])
    assert torch.equal(found[:, 1], expected["kahan/compensation"])
    assert plain.item() == config["plain_bf16_end"]
