"""Formulas: a loss, a weight of the loss, a sampler of timesteps, a sampler of pictures and a schedule.

Each has a name for --plugins, and can be chosen by its path as well:

    --plugins formulas --loss_type charbonnier
    --loss_type formulas:charbonnier
"""

from __future__ import annotations

import math

from library.training.inference_samplers import INFERENCE_SAMPLERS
from library.training.loss_weights import LOSS_WEIGHTS
from library.training.losses import LOSSES
from library.training.schedulers import SCHEDULERS
from library.training.timestep_samplers import TIMESTEP_SAMPLERS


@LOSSES.register("charbonnier")
def charbonnier(options, prediction, target, timesteps, objective):
    """sqrt(d^2 + c^2) - c of each element [B, C, ...], with c = --huber_c: near |d| without its corner."""
    difference = prediction.float() - target.float()
    return (difference**2 + options.huber_c**2).sqrt() - options.huber_c


@LOSS_WEIGHTS.register("soft_min_snr")
def soft_min_snr(snr, value, is_v):
    """gamma / (snr + gamma) [B], a smooth form of min-SNR: `--loss_weight soft_min_snr=5`. The snr of data without
    noise is infinite."""
    gamma = 5.0 if value is None else value
    return gamma / (snr + gamma)


@TIMESTEP_SAMPLERS.register("triangle")
class TriangleSampler:
    """Sigmas with the most density in the middle: the mean of two uniform numbers. --min_timestep and --max_timestep
    limit them."""

    def __init__(self, options):
        self.low = (options.min_timestep or 0) / 1000
        self.high = (options.max_timestep or 1000) / 1000

    def sample(self, latent_shape, draws):
        """Sigmas [B] float32, 0 = data, 1 = noise. All numbers come from `draws`, whose keys are the step and the place
        of each sample in the batch: a run that is resumed, or split over processes, draws the same."""
        sigmas = draws.uniform("triangle", (2,)).mean(dim=1)  # [B, 2] -> [B]
        return self.low + (self.high - self.low) * sigmas


@INFERENCE_SAMPLERS.register("midpoint", flow="same")
def midpoint(denoise, latents, sigmas, noise=None):
    """The midpoint rule: two calls of the model per step. `flow="same"`: it serves flow models as it is; without it a
    sampler is one of SD models. `noise()` gives further noise to samplers that add some."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        middle = (sigma + following) / 2
        half = latents + (middle - sigma) * denoise(latents, sigma)
        latents = latents + (following - sigma) * denoise(half, middle)
    return latents


@SCHEDULERS.register("breathing", uses=("lr_warmup_steps", "lr_scheduler_num_cycles"), args=("depth",))
def breathing(settings):
    """The factor of the rate at optimizer step k: after the warm-up it falls by `depth` (--lr_scheduler_args depth=0.5)
    and rises again, --lr_scheduler_num_cycles times."""
    depth, cycles = settings.args.get("depth", 0.5), settings.options.lr_scheduler_num_cycles

    def factor(step: int) -> float:
        if step < settings.warmup:
            return step / settings.warmup
        share = (step - settings.warmup) / max(1, settings.total - settings.warmup)
        return 1 - depth * (1 - math.cos(2 * math.pi * cycles * share)) / 2

    return factor

