"""Two loops that a step of ours is compared with, on the same data, layers, rank and optimizer step.

`BareLoop` is what one writes by hand around our own modules: a DataLoader over rows of cached tensors, noise, forward,
loss, backward, clipping, the optimizer. It knows no hooks, keys of draws, logs or checks; adapter and optimizer are ours.
`PeftLoop` is the same loop around the classes of diffusers with a LoRA of PEFT on the same layers, and AdamW as torch
makes it: the weights are those of our model, converted.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from library.training.run import Run

GUIDANCE = 3.5
SIZES = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
Row = dict[str, Any]


def rows_of(run: Run) -> list[Row]:
    """The samples of a prepared run as rows of tensors: scaled latents, what is cached of captions or their tokens, and
    the sizes that some models read."""
    rows: list[Row] = []
    for batch in run.data.batches(1):
        latents = run.step.latents_of(batch)
        for k in range(len(batch)):
            row: Row = {"latents": latents[k], **{name: batch[name][k] for name in SIZES}}
            row |= {name: value[k] for name, value in (batch.conditioning or {}).items()}
            row |= {f"ids_{number}": ids[k] for number, ids in enumerate(batch.input_ids_list or ())}
            rows.append(row)
    return rows


def endless(rows: Sequence[Row], batch_size: int) -> Iterator[Row]:
    """Batches, epoch after epoch, as torch collates them."""
    loader = torch.utils.data.DataLoader(rows, batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


class HandWritten:
    """A training loop without anything around the arithmetic."""

    name: str

    def __init__(self, run: Run, rows: Sequence[Row], batch_size: int) -> None:
        self.batches = endless(rows, batch_size)
        self.is_flow = run.step.objective.is_flow
        self.parameters: list[nn.Parameter] = []
        self.optimizer: torch.optim.Optimizer

    def predict(self, noisy: Tensor, times: Tensor, batch: Row) -> Tensor:
        """Velocity or noise [B, C, h, w] at sigmas (flow) or at whole timesteps [B]."""
        raise NotImplementedError

    def noised(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, times [B], target)."""
        raise NotImplementedError

    def loss(self, batch: Row) -> Tensor:
        latents = batch["latents"]
        noisy, times, target = self.noised(latents, torch.randn_like(latents))
        return nn.functional.mse_loss(self.predict(noisy, times, batch).float(), target.float())

    def step(self) -> None:
        self.loss(next(self.batches)).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def flow_noised(latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sigmas = torch.rand(len(latents))
    weights = sigmas.view(-1, 1, 1, 1)
    return (1 - weights) * latents + weights * noise, sigmas, noise - latents


# ---- our own modules -------------------------------------------------------------------------------------------------


class BareLoop(HandWritten):
    name = "bare loop"

    def __init__(self, run: Run, rows: Sequence[Row], batch_size: int) -> None:
        super().__init__(run, rows, batch_size)
        self.run, self.denoiser = run, run.models.denoiser
        self.optimizer = run.optimizer
        self.parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        self._forward = OURS[run.family.name]
        if not self.is_flow:
            alphas = run.step.objective.alphas_cumprod
            self.signal, self.scale = alphas.sqrt().float(), (1 - alphas).sqrt().float()

    def noised(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.is_flow:
            return flow_noised(latents, noise)
        times = torch.randint(0, len(self.signal), (len(latents),))
        signal, scale = self.signal[times].view(-1, 1, 1, 1), self.scale[times].view(-1, 1, 1, 1)
        return signal * latents + scale * noise, times, noise

    def predict(self, noisy: Tensor, times: Tensor, batch: Row) -> Tensor:
        return self._forward(self.denoiser, noisy, times, self.texts(batch), batch)

    def texts(self, batch: Row) -> Mapping[str, Tensor]:
        """What is cached; where captions are not, their encoders run here as they do in our step."""
        if "ids_0" not in batch:
            return batch
        ids = [batch[f"ids_{number}"] for number in range(len(self.run.models.text_encoders))]
        with torch.no_grad():
            return self.run.strategies.encode(self.run.models.text_encoders, ids, None)


def our_flux(denoiser: nn.Module, noisy: Tensor, sigmas: Tensor, texts: Mapping[str, Tensor], batch: Row) -> Tensor:
    from library.flux_train_utils import predict_velocity

    return predict_velocity(denoiser, noisy, sigmas * 1000, texts, guidance=GUIDANCE)


def our_sdxl(denoiser: nn.Module, noisy: Tensor, times: Tensor, texts: Mapping[str, Tensor], batch: Row) -> Tensor:
    from library.sdxl_train_utils import predict_noise

    return predict_noise(denoiser, noisy, times, texts, tuple(batch[name] for name in SIZES))


def our_sd(denoiser: nn.Module, noisy: Tensor, times: Tensor, texts: Mapping[str, Tensor], batch: Row) -> Tensor:
    from library.sd_train_utils import predict_noise

    return predict_noise(denoiser, noisy, times, texts)


OURS = {"flux": our_flux, "sdxl": our_sdxl, "sd": our_sd}

# ---- diffusers and PEFT ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TheirModel:
    """A pipeline folder of diffusers that our converter wrote."""

    folder: Path

    @classmethod
    def converted(cls, words: Sequence[str], folder: Path) -> TheirModel:
        from tools.convert_model import main

        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            code = main([*words, "--to", "diffusers", "--console_log_level=WARNING"])
        if code:
            raise SystemExit(f"the model could not be converted for diffusers: {told.getvalue().strip()}")
        return cls(folder)


class PeftLoop(HandWritten):
    name = "diffusers + peft loop"

    def __init__(
        self, run: Run, rows: Sequence[Row], batch_size: int, model: TheirModel, rank: int, learning_rate: float
    ) -> None:
        from peft import LoraConfig

        super().__init__(run, rows, batch_size)
        self.side = THEIRS[run.family.name](model.folder, rows[0]["latents"].shape)
        self.denoiser = self.side.denoiser.requires_grad_(False)
        layers = [
            name for name, module in self.denoiser.named_modules()
            if isinstance(module, self.side.layers) and self.side.is_trained(name)
        ]  # fmt: skip
        self.denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        self.parameters = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate)
        self.num_layers = len(layers)

    def noised(self, latents: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.is_flow:
            return flow_noised(latents, noise)
        schedule = self.side.schedule
        times = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),))
        return schedule.add_noise(latents, noise, times), times, noise

    def predict(self, noisy: Tensor, times: Tensor, batch: Row) -> Tensor:
        return self.side.predict(noisy, times, batch)


class TheirFlux:
    layers = (nn.Linear,)

    def __init__(self, folder: Path, shape: torch.Size) -> None:
        from diffusers import FluxPipeline, FluxTransformer2DModel

        self.denoiser = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        self.pipeline = FluxPipeline
        self.sides = shape[-2:]
        self.ids = FluxPipeline._prepare_latent_image_ids(1, self.sides[0] // 2, self.sides[1] // 2, "cpu", torch.float32)

    @staticmethod
    def is_trained(name: str) -> bool:
        return "transformer_blocks." in name  # both kinds of blocks

    def predict(self, noisy: Tensor, sigmas: Tensor, batch: Row) -> Tensor:
        height, width = self.sides
        packed = self.pipeline._pack_latents(noisy, len(noisy), noisy.shape[1], height, width)
        text = batch["t5_out"]
        velocity = self.denoiser(
            hidden_states=packed, encoder_hidden_states=text, pooled_projections=batch["l_pooled"], timestep=sigmas,
            img_ids=self.ids, txt_ids=torch.zeros(text.shape[1], 3), guidance=torch.full((len(noisy),), GUIDANCE),
            return_dict=False,
        )[0]
        return self.pipeline._unpack_latents(velocity, height * 8, width * 8, 8)


class TheirUNet:
    layers = (nn.Linear, nn.Conv2d)

    def __init__(self, folder: Path, shape: torch.Size) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel

        self.denoiser = UNet2DConditionModel.from_pretrained(folder / "unet")
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    @staticmethod
    def is_trained(name: str) -> bool:
        return ".attentions." in name


class TheirSd(TheirUNet):
    def __init__(self, folder: Path, shape: torch.Size) -> None:
        from transformers import CLIPTextModel

        super().__init__(folder, shape)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False).eval()

    def predict(self, noisy: Tensor, times: Tensor, batch: Row) -> Tensor:
        with torch.no_grad():
            ids = batch["ids_0"]
            states = self.text_encoder(ids.view(len(noisy), -1), return_dict=False)[0]
        return self.denoiser(noisy, times, states, return_dict=False)[0]


class TheirSdxl(TheirUNet):
    def predict(self, noisy: Tensor, times: Tensor, batch: Row) -> Tensor:
        states = torch.cat((batch["hidden_state1"], batch["hidden_state2"]), dim=-1)
        given = {"text_embeds": batch["pool2"], "time_ids": torch.cat([batch[name] for name in SIZES], dim=1)}
        return self.denoiser(noisy, times, states, added_cond_kwargs=given, return_dict=False)[0]


THEIRS = {"flux": TheirFlux, "sd": TheirSd, "sdxl": TheirSdxl}
