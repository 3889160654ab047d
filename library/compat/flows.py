"""Flow models by the calls that their known trainers have in common: noise levels, the prediction type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.compat.draws import GlobalDraws
from library.compat.namespace import options_of
from library.core.errors import ConfigError
from library.training import timestep_samplers
from library.training.objective import FlowMatchingObjective, clean_estimate, expand_like
from library.training.option_groups import NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.timesteps import flow_weights


def get_sigmas(
    noise_scheduler: Any, timesteps: Tensor, device: torch.device, n_dim: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sigmas of timesteps on the 0..1000 scale, with `n_dim` dimensions; a flow needs no table of the scheduler."""
    sigmas = timesteps.to(device=device, dtype=torch.float32) / 1000
    return sigmas.reshape(-1, *[1] * (n_dim - 1)).to(dtype)


def get_noisy_model_input_and_timesteps(
    args: Any, noise_scheduler: Any, latents: Tensor, noise: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy latents, timesteps [B] on the 0..1000 scale, sigmas [B, 1, ...]) of the options, drawn from torch's global
    generator."""
    return noisy_by(options_of(args, TimestepOptions), args, latents, noise, device, dtype)


def noisy_by(
    options: TimestepOptions, args: Any, latents: Tensor, noise: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the way of drawing of a family."""
    draws = GlobalDraws.of(len(latents))
    sigmas = timestep_samplers.build(options).sample(latents.shape, draws).to(device)
    sample = FlowMatchingObjective(options, options_of(args, NoiseOptions)).corrupt(latents, noise, sigmas, draws)
    return sample.noisy_latents.to(dtype), sample.timesteps, expand_like(sample.sigmas, latents)


def apply_model_prediction_type(
    args: Any, model_pred: Tensor, noisy_model_input: Tensor, sigmas: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(what is compared with the target, weights of the loss or None). raw: the velocity; sigma_scaled: the estimate of
    the clean latents, weighted by --weighting_scheme."""
    kind = args.model_prediction_type
    if kind == "raw":
        return model_pred, None
    if kind != "sigma_scaled":
        raise ConfigError(f"--model_prediction_type is {kind}; known: raw, sigma_scaled")
    estimate = clean_estimate(model_pred, noisy_model_input, sigmas.flatten())
    return estimate, flow_weights(options_of(args, TimestepOptions).weighting_scheme, sigmas)
