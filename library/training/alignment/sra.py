"""SRA: tokens from the middle of the denoiser are aligned with the clean latents.

A small network reads the image tokens behind one block and tells the patches of the clean latents; both are brought to
mean 0 and deviation 1 over a sample. It learns beside the rest, is part of states, and no file has it: it is of no use
later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.core.errors import ConfigError, Problems
from library.core.keyed_random import isolated_rng, key_seed
from library.training.alignment import depth_of
from library.training.alignment.options import SraOptions
from library.training.hooks.base import Hook

if TYPE_CHECKING:
    from library.core.options import Config
    from library.dataset.batch import Batch
    from library.training.protocols import ParamGroup
    from library.training.run import Run, StepOutput
    from library.training.step import TrainStep
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

DEFAULT_BLOCK = 4
BETA = 0.05
"""of the smooth L1 loss"""
EPSILON = 1e-5


def reader_of(width: int, values: int) -> nn.Sequential:
    """Five layers with SiLU between them: tokens [B, L, width] -> patches [B, L, values]."""
    sizes = [width, width // 2, width // 4, width // 8, width // 8]
    sizes = [max(1, size) for size in sizes] + [values]
    layers: list[nn.Module] = []
    for first, second in zip(sizes, sizes[1:]):
        layer = nn.Linear(first, second)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def patches(latents: Tensor, side: int) -> Tensor:
    """Latents [B, C, ..., h, w] as tokens [B, L, C * side^2], in the order in which models pack them."""
    clips = latents if latents.ndim == 5 else latents.unsqueeze(2)  # [B, C, F, h, w]
    return rearrange(clips, "b c f (h p) (w q) -> b (f h w) (c p q)", p=side, q=side)


def standardised(values: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over each sample of [B, ...]."""
    flat = values.flatten(1)
    mean, deviation = flat.mean(dim=1), flat.std(dim=1, correction=0)
    shape = (-1, *[1] * (values.ndim - 1))
    return (values - mean.view(shape)) / (deviation.view(shape) + EPSILON)


def alignment_loss(told: Tensor, wanted: Tensor) -> Tensor:
    """Losses [B] of what is told of the patches [B, L, V]."""
    losses = F.smooth_l1_loss(standardised(told.float()), standardised(wanted.float()), beta=BETA, reduction="none")
    return losses.flatten(1).mean(dim=1)


def weight_at(options: SraOptions, place: float) -> float:
    """Weight of the loss at the place 0 to 1 of a run."""
    start, end, kind = options.sra_decay_start, options.sra_decay_end, options.sra_decay
    if kind == "none" or place < start:
        return options.sra_weight
    if kind == "jump" or place >= end:
        return 0.0
    u = (place - start) / (end - start)
    return options.sra_weight * (1 - u if kind == "linear" else (1 + math.cos(math.pi * u)) / 2)


class Sra(Hook):
    """Adds that loss to the usual one; what is not its own step is that of the run."""

    draws_own_times = False

    told_as = "--sra_enabled"

    def __init__(self, options: SraOptions | None = None) -> None:
        """Without `options` they are those of the run."""
        super().__init__(options)
        self.block, self.patch, self.values, self.steps = 0, 1, 1, 1

    def check(self, config: Config, family: ModelFamily, trainable: Trainable) -> None:
        self.opts = self.opts or config[SraOptions]
        problems = Problems()
        if not family.gives_features:
            problems.add(f"--sra_enabled needs a flow model that gives tokens of its blocks; {family.name} does not")
        problems.raise_if_any()
        latents = family.record.latents
        self.patch, self.values = latents.patch, latents.channels * latents.patch**2
        depth = depth_of(family)
        if depth is not None:
            self.choose_block(depth)

    def choose_block(self, depth: int) -> None:
        """ConfigError when the model has no such block."""
        self.block = min(DEFAULT_BLOCK, depth // 2) if self.opts.sra_block is None else self.opts.sra_block
        if self.block >= depth:
            raise ConfigError(f"--sra_block is {self.block}; the model has {depth} blocks, 0 to {depth - 1}")

    def on_transformer_loaded(self, denoiser: torch.nn.Module) -> None:
        self.choose_block(denoiser.depth)
        with isolated_rng(key_seed(0, "sra reader")):  # alike on all ranks
            self.reader = reader_of(denoiser.feature_width, self.values)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"reader": self.reader}

    def extra_trainable_params(self) -> list[ParamGroup]:
        return [{"params": list(self.reader.parameters()), "name": "sra", "weight_decay": 0.0}]

    def on_train_start(self, run: Run) -> None:
        self.steps = run.progress.max_train_steps

    def process_batch(self, step: TrainStep, batch: Batch, times: Tensor | None) -> StepOutput:
        weight = weight_at(self.opts, batch.request.step / self.steps)
        if not batch.request.is_training or not weight:
            return step.process_batch(batch, times)
        output, sample, batch = step.forward(batch, times, feature_layer=self.block)
        with step.runtime.autocast():
            told = self.reader(output.extra["features"].to(self.reader[0].weight.dtype))  # [B, L, C p p]
        aligned = alignment_loss(told, patches(sample.latents, self.patch))  # [B]
        per_sample, logs = step.loss_of(output, sample, batch)
        own = {
            "loss/denoise": per_sample.detach().mean(), "loss/sra": aligned.detach().mean(), "sra/weight": weight,
        }  # fmt: skip
        return step.result(per_sample + weight * aligned * batch.loss_weights.to(aligned), {**logs, **own}, batch)
