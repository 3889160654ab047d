"""FLUX.1 by its known calls: loading, noise levels, the prediction type, options."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from torch import Tensor

from library.compat.arguments import add_groups
from library.compat.draws import GlobalDraws
from library.compat.namespace import options_of
from library.core.errors import ConfigError, UnsupportedCombination
from library.flux_models import StreamTransformer
from library.flux_utils import load_flux
from library.training import timestep_samplers
from library.training.objective import FlowMatchingObjective, clean_estimate, expand_like
from library.training.option_groups import NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.timesteps import flow_weights


def load_flow_model(
    ckpt_path: str | os.PathLike, dtype: torch.dtype | None, device: str | torch.device, disable_mmap: bool = False,
    model_type: str = "flux"
) -> tuple[bool, StreamTransformer]:
    """(whether it is schnell, the denoiser). `model_type`: flux or chroma."""
    if model_type == "chroma":
        from library.chroma_utils import load_chroma

        return False, load_chroma(ckpt_path, dtype, device, disable_mmap)
    if model_type != "flux":
        raise UnsupportedCombination(
            f"model_type is {model_type}; this call loads flux and chroma, another model is a family of its own"
        )
    model = load_flux(ckpt_path, dtype, device, disable_mmap)
    return not model.params.guidance_embed, model


def load_controlnet(
    ckpt_path: str | os.PathLike, is_schnell: bool, dtype: torch.dtype | None, device: str | torch.device,
    disable_mmap: bool = False
) -> Any:
    """There are no ControlNets of FLUX.1 here."""
    raise UnsupportedCombination(
        f"{ckpt_path}: ControlNets of FLUX.1 are not there; load_flow_model loads the denoiser, which runs without one"
    )


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
    options, draws = options_of(args, TimestepOptions), GlobalDraws.of(len(latents))
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


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    from library.core.registry import import_target
    from library.families.registry import record_of

    add_groups(parser, import_target(record_of("flux").family).options, TimestepOptions)
