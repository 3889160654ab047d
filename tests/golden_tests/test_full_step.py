"""Whole optimizer steps of a fine-tune of SD3, as its script makes them: losses, gradient norms and what became of the
weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from library.safetensors_utils import save_file_atomic
from library.training import optimizers
from library.training.optimizers import OptimizerOptions
from library.training.parser_common import parse
from library.training.run import Models
from library.training.trainables.full import FullTrainable
from library.training.updaters.single import FusedUpdater
from library.training.wiring.sd3 import Sd3Family
from tests.golden_dir import GOLDEN_DIR, load_golden

NAME = "full_step_sd3"
UPDATE_TOLERANCE = {"AdamW": 5e-3, "Adafactor": 5e-4}


def cases() -> list[Any]:
    """Each case of the file, and those whose fused steps are the same once more with these."""
    path = GOLDEN_DIR / f"{NAME}.safetensors"
    if not path.exists():
        return [pytest.param(None, False, id="missing")]
    with safe_open(path, framework="pt") as file:
        listed = json.loads(file.metadata()["golden"])["config"]["cases"]
    plain = [pytest.param(case, False, id=case["name"]) for case in listed]
    return plain + [pytest.param(case, True, id=f"{case['name']}-fused") for case in listed if case.get("fused_equal")]


def optimizer_of(case: dict[str, Any], parameters: list[Tensor]) -> torch.optim.Optimizer:
    if case["optimizer"] == "AdamW":
        return torch.optim.AdamW(parameters, **case["args"])
    from transformers.optimization import Adafactor

    return Adafactor(parameters, **case["args"])


def options_of(case: dict[str, Any], model: Path, is_fused: bool) -> list[str]:
    """The command line of a case."""
    args = {name: value for name, value in case["args"].items() if name != "lr"}
    words = [
        f"--pretrained_model_name_or_path={model}", f"--optimizer_type={case['optimizer']}",
        f"--learning_rate={case['args']['lr']}", f"--max_grad_norm={case['max_grad_norm']}", "--optimizer_args",
        *(f"{name}={value}" for name, value in args.items()),
    ]  # fmt: skip
    frozen = case.get("num_last_block_to_freeze")
    words += [f"--num_last_block_to_freeze={frozen}"] if frozen else []
    return words + (["--fused_backward_pass"] if is_fused else [])


class Steps:
    """The steps of a run without its data: family, trainable, optimizer and updater as the options say."""

    def __init__(self, words: list[str]) -> None:
        config = parse(words, "sd3", "full")
        runtime: Any = SimpleNamespace(
            device=torch.device("cpu"), backward=lambda loss: loss.backward(), reduce_gradients=lambda parameters: None,
            unscale_gradients=lambda: None, denoiser_form=None,
            **dict.fromkeys(("denoiser_dtype", "weight_dtype", "trained_dtype"), torch.float32),
        )  # fmt: skip
        self.family, trainable = Sd3Family(config), FullTrainable(config)
        self.models = Models(None, [None] * 3, self.family.load_denoiser(runtime).requires_grad_(False))
        trainable.attach(self.family, self.models, runtime)
        self.objective, self.updater = self.family.objective(), trainable.updater()
        optimizer = optimizers.build(config[OptimizerOptions], trainable.param_groups()).optimizer
        self.learning = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms: list[float] = []
        self.run: Any = SimpleNamespace(
            optimizer=optimizer, max_grad_norm=config[OptimizerOptions].max_grad_norm, runtime=runtime,
            models=self.models,
            lr_scheduler=SimpleNamespace(step=lambda: None), hooks=SimpleNamespace(on_gradients_ready=self._note),
            step=SimpleNamespace(seed=0), progress=SimpleNamespace(global_step=0),
        )  # fmt: skip
        self.updater.begin(self.run)

    def _note(self, run: Any) -> None:
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.learning]).item())

    def step(self, inputs: dict[str, Tensor], number: int) -> float:
        times = inputs["timesteps"][number].float() / 1000
        sample = self.objective.corrupt(inputs["latents"], inputs["noise"][number], times, None)
        text = {"lg_out": inputs["context"][:, :2], "t5_out": inputs["context"][:, 2:], "lg_pooled": inputs["y"]}
        output = self.family.predict(self.models, sample, text, None)
        loss = (output.pred - output.target).square().mean()
        self.updater.backward(self.run, loss)
        self.updater.update(self.run)
        return loss.item()


@pytest.mark.parametrize("case, is_fused", cases())
def test_steps_of_sd3(case: dict[str, Any] | None, is_fused: bool, tmp_path: Path) -> None:
    """The loss compares clean estimate and clean latents, as the family does."""
    weights, inputs, expected, config = load_golden(NAME)
    assert case is not None
    base = {f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}
    save_file_atomic(base, tmp_path / "base.safetensors", {})
    run = Steps(options_of(case, tmp_path / "base.safetensors", is_fused))
    assert isinstance(run.updater, FusedUpdater) == is_fused
    losses = [run.step(inputs, number) for number in range(case["steps"])]

    def of(name: str) -> Tensor:
        return expected[f"{case['name']}/{name}"]

    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), of("losses"), rtol=2e-5, atol=0)
    if not is_fused:
        torch.testing.assert_close(torch.tensor(run.norms, dtype=torch.float64), of("grad_norms"), rtol=1e-4, atol=0)
    state, bound = run.models.denoiser.state_dict(), UPDATE_TOLERANCE[case["optimizer"]]
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
