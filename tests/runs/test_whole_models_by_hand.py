"""Three steps of full training against loops written by hand over the classes of diffusers, in float32.

The loops get the recorded latents, conditioning, noise and times of a run, and its base under the names of diffusers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from library.safetensors_utils import load_safetensors
from library.training.step import TrainStep
from tests.runs.families import FamilyWork, Tinies
from tests.runs.test_whole_models import train

diffusers = pytest.importorskip("diffusers")
STEPS, RATE = 3, 0.2
BOUND = 1e-5
"""of the norm of what became of a tensor, relative to the norm of its change"""
EPS = 1e-2
"""An eps far below the gradients makes of the update of both optimizers a sign, and of float32's rounding of small
gradients whole steps: loops in float32 and float64 are then further apart than BOUND. A low rate changes scales of norms,
which are about 1, by few of their last digits."""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, eps=EPS, weight_decay=0.03)


def adafactor(parameters: list[Tensor]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters, lr=RATE, eps=(EPS**2, 1e-3), weight_decay=0.03, relative_step=False, scale_parameter=False
    )


OPTIMIZERS = {
    "AdamW": ((f"eps={EPS}", "weight_decay=0.03"), adamw),
    "AdaFactor": (
        (f"eps={EPS**2},1e-3", "weight_decay=0.03", "relative_step=False", "scale_parameter=False"), adafactor
    ),
}
"""--optimizer_type -> (its --optimizer_args, the same by hand)"""


@dataclasses.dataclass
class Inputs:
    """Of one step, as the run had them."""

    latents: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B], 0..1000
    sigmas: Tensor  # [B]
    text: Mapping[str, Tensor]
    sizes: Tensor  # [B, 6]


def recorded(work: FamilyWork, *words: str) -> tuple[Path, list[Inputs]]:
    """(what the run wrote, its inputs)."""
    found: list[Inputs] = []
    original = TrainStep.predict

    def noting(step: TrainStep, sample: Any, conditioning: Mapping[str, Tensor], batch: Any, **more: Any) -> Any:
        sizes = torch.cat([batch.original_sizes_hw, batch.crop_top_lefts, batch.target_sizes_hw], dim=1)
        text = {key: tensor.detach().clone() for key, tensor in conditioning.items()}
        found.append(Inputs(sample.latents, sample.noise, sample.timesteps, sample.sigmas, text, sizes))
        return original(step, sample, conditioning, batch, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "predict", noting)
        path = train(work, "full", "out", f"--max_train_steps={STEPS}", f"--learning_rate={RATE}", *words)
    assert len(found) == STEPS
    return path, found


def by_hand(
    weights: dict[str, Tensor], predict: Callable[[dict[str, Tensor], Inputs], tuple[Tensor, Tensor]],
    inputs: list[Inputs], make: Callable[[list[Tensor]], torch.optim.Optimizer], clip: float,
) -> dict[str, Tensor]:
    """The weights after the steps. `predict`: (weights, inputs) -> (prediction, target)."""
    leaves = {key: tensor.clone().requires_grad_(True) for key, tensor in weights.items()}
    optimizer = make(list(leaves.values()))
    for step in inputs:
        prediction, target = predict(leaves, step)
        torch.nn.functional.mse_loss(prediction, target).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {key: tensor.detach() for key, tensor in leaves.items()}


def compare(before: dict[str, Tensor], ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert before.keys() == ours.keys() == theirs.keys()
    far = {}
    for key, start in before.items():
        change = (theirs[key].double() - start.double()).norm()
        assert change > 0, key
        far[key] = ((ours[key].double() - theirs[key].double()).norm() / change).item()
    assert not {key: value for key, value in far.items() if not value <= BOUND}


def unet_loss(unet: torch.nn.Module) -> Callable[[dict[str, Tensor], Inputs], tuple[Tensor, Tensor]]:
    """Noise prediction on the schedule of Stable Diffusion."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)

    def predict(weights: dict[str, Tensor], step: Inputs) -> tuple[Tensor, Tensor]:
        times = step.timesteps.long()
        signal, noise = (part[times][:, None, None, None].float() for part in (kept.sqrt(), (1 - kept).sqrt()))
        noisy = signal * step.latents + noise * step.noise
        if "pool2" in step.text:
            text = torch.cat([step.text["hidden_state1"], step.text["hidden_state2"]], dim=-1)
            more = {"text_embeds": step.text["pool2"], "time_ids": step.sizes}
        else:
            text, more = step.text["hidden_state"], None
        given = {"encoder_hidden_states": text, "added_cond_kwargs": more}
        return functional_call(unet, weights, (noisy, times), given).sample, step.noise

    return predict


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_unet(name: str, optimizer: str, tinies: Tinies, tmp_path: Path) -> None:
    from tools import convert_model

    work = tinies.work(name, tmp_path)
    base = tmp_path / "base"
    words = [str(work.tiny.model), str(base), "--to", "diffusers", "--tokenizer", str(work.tiny.tokenizer)]
    assert convert_model.main(words) == 0
    work.tiny = dataclasses.replace(work.tiny, model=base)
    args, make = OPTIMIZERS[optimizer]
    path, inputs = recorded(work, f"--optimizer_type={optimizer}", "--optimizer_args", *args)
    unet = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    after = by_hand(before, unet_loss(unet), inputs, make, clip=1.0)
    trained = path.with_suffix("") / "unet" / "diffusion_pytorch_model.safetensors"
    compare(before, load_safetensors(trained), after)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_flux(optimizer: str, tinies: Tinies, tmp_path: Path) -> None:
    """The matrices of the file learn, of which some are three of diffusers': Adafactor looks at whole ones."""
    from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers

    work = tinies.work("flux", tmp_path)
    args, make = OPTIMIZERS[optimizer]
    path, inputs = recorded(
        work, "--guidance_scale=3.5", f"--optimizer_type={optimizer}", "--optimizer_args", *args
    )
    params = work.tiny.params
    model = diffusers.FluxTransformer2DModel(
        in_channels=params.in_channels, num_layers=params.depth, num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.hidden_size // params.num_heads, num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim, pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed, axes_dims_rope=params.axes_dim,
    ).eval()  # fmt: skip

    def predict(weights: dict[str, Tensor], step: Inputs) -> tuple[Tensor, Tensor]:
        sigmas = step.sigmas[:, None, None, None]
        noisy, target = (1 - sigmas) * step.latents + sigmas * step.noise, step.noise - step.latents
        squares = [x.unfold(2, 2, 2).unfold(3, 2, 2) for x in (noisy, target)]  # [B, C, h/2, w/2, 2, 2]
        packed = [x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) for x in squares]  # [B, (h/2)(w/2), 4C]
        rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
        places = torch.cartesian_prod(torch.tensor([0.0]), torch.arange(rows).float(), torch.arange(columns).float())
        text = step.text["t5_out"]
        given = {
            "hidden_states": packed[0], "encoder_hidden_states": text, "pooled_projections": step.text["l_pooled"],
            "timestep": step.sigmas, "img_ids": places, "txt_ids": torch.zeros(text.shape[1], 3),
            "guidance": torch.full_like(step.sigmas, 3.5), "return_dict": False,
        }  # fmt: skip
        return functional_call(model, convert_bfl_sd_to_diffusers(weights), (), given)[0], packed[1]

    before = load_safetensors(work.tiny.flux)
    after = by_hand(before, predict, inputs, make, clip=1.0)
    compare(before, load_safetensors(path), after)
