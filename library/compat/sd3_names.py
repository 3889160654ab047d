"""Stable Diffusion 3 by its known calls: parts from tensors in memory, noise levels, a sampler, files, options."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.compat.arguments import add_groups
from library.compat.flows import noisy_by
from library.compat.namespace import options_of
from library.compat.networks import KnownNetwork, numbers, row, shared_pairs
from library.compat.samples import Replacement, sample_family
from library.components.ldm_models import AutoEncoder
from library.core.registry import import_target
from library.families.registry import record_of
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS, guided, start_noise
from library.safetensors_utils import cast_all, save_file_atomic
from library.sd3_models import MMDiT, SD3Params
from library.sd3_train_utils import sample_schedule
from library.sd3_utils import FILE_PREFIX, FILE_PREFIXES, inspect_sd3, load_sd3, load_vae_sd3
from library.training.timestep_samplers import TimestepOptions
from library.training.timesteps import shift_sigmas
from library.utils import str_to_dtype
from networks.lora import LoRAModule


def analyze_checkpoint_state(ckpt_path: str | os.PathLike) -> SD3Params:
    """Hyper-parameters of the denoiser in a file, from its header."""
    return inspect_sd3(ckpt_path).params


def analyze_state_dict_state(state_dict: Mapping[str, Tensor], prefix: str = "") -> SD3Params:
    """Hyper-parameters of the denoiser among tensors in memory, whose names begin with `prefix`."""
    named = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    return inspect_sd3(named).params


def load_mmdit(
    state_dict: Mapping[str, Tensor], dtype: str | torch.dtype | None, device: str | torch.device,
    attn_mode: str = "torch",
) -> MMDiT:
    """The denoiser among tensors in memory, which may be those of a whole file. `attn_mode` chooses among ways with
    equal results and changes nothing."""
    return load_sd3(state_dict, _dtype(dtype), device)


def load_vae(
    vae_path: str | os.PathLike | None, vae_dtype: str | torch.dtype | None, device: str | torch.device | None,
    disable_mmap: bool = False, state_dict: Mapping[str, Tensor] | None = None,
) -> AutoEncoder:
    """The autoencoder of a file, or among tensors in memory."""
    source = vae_path if state_dict is None else state_dict
    return load_vae_sd3(source, _dtype(vae_dtype), device or "cpu", disable_mmap)


def create_sd3_mmdit(params: SD3Params, attn_mode: str = "torch") -> MMDiT:
    """An untrained denoiser; `attn_mode` changes nothing."""
    return MMDiT(params)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    return str_to_dtype(dtype) if isinstance(dtype, str) else dtype


# -- noise levels and sampling -----------------------------------------------------------------------------------------


class ModelSamplingDiscreteFlow:
    """Timesteps on the 0..1000 scale and their sigmas, which `shift` moves towards noise."""

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift

    @property
    def sigma_min(self) -> Tensor:
        return self.sigma(torch.tensor(1.0))

    @property
    def sigma_max(self) -> Tensor:
        return self.sigma(torch.tensor(float(NUM_TRAIN_TIMESTEPS)))

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * NUM_TRAIN_TIMESTEPS

    def sigma(self, timestep: Tensor) -> Tensor:
        return shift_sigmas(timestep / NUM_TRAIN_TIMESTEPS, self.shift)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """The clean latents [B, C, h, w], or [2, ...] of a guided pair, by the velocity of the model."""
        return model_input - model_output * sigma.reshape(-1, *[1] * (model_output.ndim - 1))

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return sigma * noise + (1.0 - sigma) * latent_image


def get_all_sigmas(sampling: ModelSamplingDiscreteFlow, steps: int) -> Tensor:
    """[steps + 1] float32: the noise levels of a picture's steps, 0 at the end."""
    return sample_schedule(steps, sampling.shift)


def max_denoise(model_sampling: ModelSamplingDiscreteFlow, sigmas: Tensor) -> bool:
    """Whether a schedule begins with noise alone."""
    highest, first = float(model_sampling.sigma_max), float(sigmas[0])
    return abs(highest - first) <= 1e-5 * highest or first > highest


@torch.no_grad()
def do_sample(
    height: int, width: int, initial_latent: Tensor | None, seed: int, cond: tuple[Tensor, Tensor],
    neg_cond: tuple[Tensor, Tensor], mmdit: MMDiT, steps: int, guidance_scale: float, dtype: torch.dtype,
    device: str | torch.device,
) -> Tensor:
    """Clean latents [1, C, h, w] float32 of a picture of this size in pixels, by Euler steps along the schedule of the
    family. `cond`, `neg_cond`: (context [1, T, D], pooled [1, D]) of the prompt and of the negative one.
    `initial_latent` [1, C, h, w] is what the noise of `seed` is mixed with; from full noise nothing of it is left."""
    sampling = ModelSamplingDiscreteFlow(shift=3.0)
    sigmas = get_all_sigmas(sampling, steps).to(device)
    noise = start_noise(seed, *record_of("sd3").latents.latent_shape((width, height))).to(device)
    start = torch.zeros_like(noise) if initial_latent is None else initial_latent.to(noise)
    latents = sampling.noise_scaling(sigmas[0], noise, start, max_denoise(sampling, sigmas))
    context, pooled = (torch.cat(pair).to(device, dtype) for pair in zip(cond, neg_cond))
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        times = sampling.timestep(now).expand(2)
        both = mmdit(latents.to(dtype).expand(2, -1, -1, -1), times, y=pooled, context=context).float()
        positive, negative = both.chunk(2)
        latents = latents + (after - now) * guided(negative, positive, guidance_scale)
    return latents


def get_noisy_model_input_and_timesteps(
    args: Any, latents: Tensor, noise: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy latents, timesteps [B] on the 0..1000 scale, sigmas [B, 1, ...]) of the options, at the whole timesteps of
    the family, drawn from torch's global generator."""
    shift = getattr(args, "training_shift", None)
    options = dataclasses.replace(
        options_of(args, TimestepOptions), timestep_sampling="whole",
        discrete_flow_shift=1.0 if shift is None else shift,
    )
    return noisy_by(options, args, latents, noise, device, dtype)


class LoRANetwork(KnownNetwork):
    """LoRA of Stable Diffusion 3."""

    LORA_PREFIX_TEXT_ENCODER_CLIP_L = "lora_te1"
    LORA_PREFIX_TEXT_ENCODER_CLIP_G = "lora_te2"
    LORA_PREFIX_TEXT_ENCODER_T5 = "lora_te3"
    PARTS = ("context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim", "x_mod_dim")

    def __init__(
        self, text_encoders: Any, unet: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: float | None = 1,
        dropout: float | None = None, rank_dropout: float | None = None, module_dropout: float | None = None,
        conv_lora_dim: int | None = None,
        conv_alpha: float | None = None, module_class: type = LoRAModule, modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, float] | None = None, train_t5xxl: bool = False,
        type_dims: Sequence[int | None] | None = None, emb_dims: Sequence[int] | None = None,
        train_block_indices: Sequence[bool] | None = None, verbose: bool = False,
    ) -> None:
        """`type_dims` in the order of PARTS; `train_block_indices` tells for each block whether it is trained."""
        pairs = {
            **shared_pairs(rank_dropout, module_dropout, conv_lora_dim, conv_alpha, verbose),
            "train_t5xxl": train_t5xxl or None, "emb_dims": row(emb_dims),
            "train_block_indices": numbers(train_block_indices), **dict(zip(self.PARTS, type_dims or ())),
        }
        self.build(
            text_encoders, unet, multiplier, lora_dim, alpha, dropout, pairs, module_class, modules_dim, modules_alpha
        )


# -- files, samples, options -------------------------------------------------------------------------------------------


def save_models(
    ckpt_path: str, mmdit: MMDiT | None, vae: nn.Module | None, clip_l: nn.Module | None, clip_g: nn.Module | None,
    t5xxl: nn.Module | None, sai_metadata: Mapping[str, str] | None, save_dtype: torch.dtype | None = None,
) -> None:
    """Denoiser and autoencoder in one file, and each text encoder that is given in a file of its own beside it:
    `model_clip_l.safetensors` beside `model.safetensors`."""
    inside = {prefix: part for prefix, part in ((FILE_PREFIX, mmdit), (FILE_PREFIXES["vae"], vae)) if part is not None}
    state = {prefix + key: tensor for prefix, part in inside.items() for key, tensor in part.state_dict().items()}
    save_file_atomic(cast_all(state, save_dtype), ckpt_path, dict(sai_metadata or {}))
    stem, ending = os.path.splitext(os.fspath(ckpt_path))
    for name, encoder in (("clip_l", clip_l), ("clip_g", clip_g), ("t5xxl", t5xxl)):
        if encoder is not None:
            tensors = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}  # T5 shares its embedding
            save_file_atomic(cast_all(tensors, save_dtype), f"{stem}_{name}{ending}", {})


def sample_images(
    accelerator: Any, args: Any, epoch: int | None, steps: int, mmdit: Any, vae: Any, text_encoders: Any,
    sample_prompts_te_outputs: Any, prompt_replacement: Replacement | None = None,
) -> None:
    """The samples where they are due; `sample_prompts_te_outputs` (text -> list of outputs) spares the text
    encoders."""
    sample_family(
        "sd3", accelerator, args, epoch, steps, vae, mmdit, text_encoders, None, sample_prompts_te_outputs,
        prompt_replacement,
    )  # fmt: skip


def add_sd3_training_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, import_target(record_of("sd3").family).options, TimestepOptions)
