"""Training of the tiny base's autoencoder: 64-pixel pictures to 16 channels at an eighth of the size and back.

Square crops of 32 pixels come first (four times as many steps in the same time), then whole pictures. After that the
latents get the mean and the spread that the family's constants expect, the encoder stands, and the decoder goes on
alone.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tools.tiny_base.scenes import clutter, draw_scene, render

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
SCALE_FACTOR, SHIFT_FACTOR = 0.3611, 0.1159  # of the family: (latent - shift) * scale has mean 0 and spread 1
POSTERIOR_STD = 0.01 / SCALE_FACTOR  # spread of a sample around its mean: 1 % of the spread of the latents
NOISE, DECODER_NOISE = 0.1, 0.04  # what the decoder learns to bear, as a share of the latents' spread: first, and alone


@dataclass(frozen=True)
class AutoencoderPlan:
    """Length of the phases in steps."""

    crop_steps: int = 2600
    whole_steps: int = 450
    decoder_crop_steps: int = 2400
    decoder_whole_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 2e-3


def draw_pictures(seed: int, count: int, clutter_share: float = 0.4) -> Tensor:
    """[N, 3, 64, 64] bytes: captioned scenes and pictures of clutter."""
    rows = []
    for index in range(count):
        rng = random.Random(index)
        image = clutter(seed, index) if rng.random() < clutter_share else render(draw_scene(seed, index), rng)
        rows.append(np.asarray(image))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def as_floats(pictures: Tensor) -> Tensor:
    """Bytes to -1..1 in the memory layout that convolutions are quickest with."""
    return (pictures.float() / 127.5 - 1).to(memory_format=torch.channels_last)


def batches(pictures: Tensor, batch_size: int, crop_px: int, seed: int) -> Iterator[Tensor]:
    """Endless random batches [B, 3, crop, crop] in -1..1, mirrored half of the time, colours swapped now and then."""
    generator = torch.Generator().manual_seed(seed)
    height = pictures.shape[-1]
    while True:
        chosen = pictures[torch.randint(len(pictures), (batch_size,), generator=generator)]
        top, left = (int(torch.randint(height - crop_px + 1, (), generator=generator)) for _ in range(2))
        chosen = chosen[:, :, top : top + crop_px, left : left + crop_px]
        if torch.rand((), generator=generator) < 0.5:
            chosen = chosen.flip(-1)
        if torch.rand((), generator=generator) < 0.3:
            chosen = chosen[:, torch.randperm(3, generator=generator)]
        yield as_floats(chosen)


def picture_loss(output: Tensor, picture: Tensor) -> Tensor:
    """Absolute and squared difference, and the absolute difference of neighbouring pixels, which keeps edges sharp."""
    difference = output - picture
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + difference.square().mean() + 0.5 * edges


def spread_penalty(mean: Tensor) -> Tensor:
    """Keeps every channel near mean 0 and variance 1 while the scale is still free."""
    channels = mean.transpose(0, 1).flatten(1)  # [C, B h w]
    return channels.mean(dim=1).square().mean() + (channels.var(dim=1) - 1).square().mean()


def warm_cosine(step: int, total: int) -> float:
    """Share of the learning rate: 50 steps up, then half a cosine down to 3 %."""
    return min((step + 1) / 50, 0.03 + 0.97 * (1 + math.cos(math.pi * step / total)) / 2)


def run_steps(
    parameters: list[nn.Parameter], data: Iterator[Tensor], loss_of: Callable[[Tensor], Tensor], steps: range,
    total: int, rate: float
) -> None:
    """Adam over `steps`, whose learning rate follows a cosine over `total` steps."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
    started, shown = time.monotonic(), 0.0
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_cosine(step, total)
        loss = loss_of(next(data))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown = loss.item() if step == steps.start else 0.98 * shown + 0.02 * loss.item()
        if step % 50 == 0 or step == steps[-1]:
            logger.info("autoencoder step %d/%d loss %.4f, %.0f s", step, total, shown, time.monotonic() - started)


def calibrate(model: nn.Module, pictures: Tensor) -> None:
    """Fold a scale and a shift per channel into the last encoder and the first decoder convolution, so that the latents
    have the mean and the spread of the family, and set the posterior's spread to a constant."""
    mean = encode_mean(model, pictures).transpose(0, 1).flatten(1)  # [C, N h w]
    centre, spread = mean.mean(dim=1), mean.std(dim=1)
    factor = (1 / SCALE_FACTOR) / spread
    with torch.no_grad():
        last, first = model.encoder.conv_out, model.decoder.conv_in
        last.weight[:LATENT_CHANNELS] *= factor[:, None, None, None]
        last.bias[:LATENT_CHANNELS] = (last.bias[:LATENT_CHANNELS] - centre) * factor + SHIFT_FACTOR
        last.weight[LATENT_CHANNELS:] = 0
        last.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)
        offset = SHIFT_FACTOR - centre * factor  # new = old * factor + offset
        first.bias -= (first.weight * (offset / factor)[None, :, None, None]).sum(dim=(1, 2, 3))
        first.weight /= factor[None, :, None, None]


@torch.no_grad()
def encode_mean(model: nn.Module, pictures: Tensor, batch_size: int = 64) -> Tensor:
    """Means of the posterior [N, 16, 8, 8] of pictures given as bytes."""
    model.eval()
    rows = []
    for start in range(0, len(pictures), batch_size):
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(model.encoder(as_floats(pictures[start : start + batch_size])).float()[:, :LATENT_CHANNELS])
    return torch.cat(rows)


def train_autoencoder(model: nn.Module, pictures: Tensor, plan: AutoencoderPlan, seed: int) -> None:
    """Train `model` (with `.encoder` giving mean and log-variance, and `.decoder`) in place."""
    train_both(model, pictures, plan, seed)
    calibrate(model, pictures[:1024])
    train_decoder(model, pictures, plan, seed)
    model.eval()


def train_both(model: nn.Module, pictures: Tensor, plan: AutoencoderPlan, seed: int) -> None:
    """Encoder and decoder together, the latents' scale kept near 1."""
    model.train().to(memory_format=torch.channels_last)
    noise = torch.Generator().manual_seed(seed + 1)

    def loss_of(picture: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            mean = model.encoder(picture).float()[:, :LATENT_CHANNELS]
            output = model.decoder(mean + NOISE * torch.randn(mean.shape, generator=noise))
        return picture_loss(output.float(), picture) + 0.02 * spread_penalty(mean)

    total, side = plan.crop_steps + plan.whole_steps, pictures.shape[-1]
    crops, whole = (batches(pictures, plan.batch_size, size, seed + size) for size in (side // 2, side))
    parameters = list(model.parameters())
    run_steps(parameters, crops, loss_of, range(plan.crop_steps), total, plan.learning_rate)
    run_steps(parameters, whole, loss_of, range(plan.crop_steps, total), total, plan.learning_rate)


def train_decoder(model: nn.Module, pictures: Tensor, plan: AutoencoderPlan, seed: int) -> None:
    """The decoder alone, on the encoder's finished latents."""
    model.train().to(memory_format=torch.channels_last)
    noise = torch.Generator().manual_seed(seed + 3)

    def loss_of(picture: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = model.encoder(picture).float()[:, :LATENT_CHANNELS]
            output = model.decoder(mean + DECODER_NOISE / SCALE_FACTOR * torch.randn(mean.shape, generator=noise))
        return picture_loss(output.float(), picture)

    total, side = plan.decoder_crop_steps + plan.decoder_whole_steps, pictures.shape[-1]
    crops, whole = (batches(pictures, plan.batch_size, size, seed + 7 * size) for size in (side // 2, side))
    parameters = list(model.decoder.parameters())
    run_steps(parameters, crops, loss_of, range(plan.decoder_crop_steps), total, plan.learning_rate / 2)
    run_steps(parameters, whole, loss_of, range(plan.decoder_crop_steps, total), total, plan.learning_rate / 2)
