"""Stable Diffusion 1 and 2 by their known calls: whole models in one file or folder, and the names of their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.control_net_convert import control_net_to_diffusers, control_net_to_original
from library.checkpoints.ldm_convert import (
    attention_as_convolution,
    convert_diffusers_vae_to_ldm,
    convert_ldm_vae_to_diffusers,
)
from library.checkpoints.open_clip_convert import hf_to_open_clip, open_clip_to_hf, with_text_model
from library.checkpoints.unet_convert import diffusers_to_original, original_to_diffusers
from library.compat.ldm_files import is_safetensors, join_metadata, write_diffusers_folder
from library.dataset.bucket import make_bucket_resolutions as bucket_resolutions
from library.sd_utils import checkpoint_state, load_text_encoder_sd, load_unet_sd, load_vae_sd, save_checkpoint_sd

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

    from library.components.ldm_models import AutoEncoder
    from library.sd_models import UNet2DConditionModel

__all__ = [
    "convert_controlnet_state_dict_to_diffusers", "convert_controlnet_state_dict_to_sd",
    "convert_ldm_clip_checkpoint_v1", "convert_ldm_clip_checkpoint_v2", "convert_ldm_unet_checkpoint",
    "convert_ldm_vae_checkpoint",
    "convert_text_encoder_state_dict_to_sd_v2", "convert_unet_state_dict_to_sd", "convert_vae_state_dict",
    "get_model_version_str_for_sd1_sd2", "is_safetensors", "load_models_from_stable_diffusion_checkpoint",
    "load_target_model", "load_vae",
    "make_bucket_resolutions", "replace_unet_modules", "save_diffusers_checkpoint", "save_stable_diffusion_checkpoint",
]  # fmt: skip

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_V1, CLIP_V2 = "cond_stage_model.transformer.", "cond_stage_model.model."


# -- small things ----------------------------------------------------------------------------------------------------


def get_model_version_str_for_sd1_sd2(v2: bool, v_parameterization: bool) -> str:
    return f"sd_v{2 if v2 else 1}{'_v' if v_parameterization else ''}"


def make_bucket_resolutions(
    max_reso: tuple[int, int], min_size: int = 256, max_size: int = 1024, divisible: int = 64
) -> list[tuple[int, int]]:
    return bucket_resolutions(max_reso, min_size, max_size, divisible)


# -- whole models ----------------------------------------------------------------------------------------------------


def load_models_from_stable_diffusion_checkpoint(
    v2: bool, ckpt_path: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
    unet_use_linear_projection_in_v2: bool = True,
) -> tuple[CLIPTextModelWithProjection, AutoEncoder, UNet2DConditionModel]:
    """(text encoder, VAE, U-Net) of a file or folder. How a version 2 projects is read from the file."""
    text_encoder = load_text_encoder_sd(ckpt_path, v2, dtype, device)
    return text_encoder, load_vae_sd(ckpt_path, dtype, device), load_unet_sd(ckpt_path, dtype, device)


def load_vae(vae_id: str, dtype: torch.dtype | None) -> AutoEncoder:
    return load_vae_sd(vae_id, dtype, "cpu")


def replace_unet_modules(unet: UNet2DConditionModel, mem_eff_attn: bool, xformers: bool, sdpa: bool) -> None:
    """Nothing: all of them give what torch's own attention gives, which is what computes here."""


def load_target_model(
    args: Any, weight_dtype: torch.dtype, accelerator: Any, unet_use_linear_projection_in_v2: bool = False
) -> tuple[CLIPTextModelWithProjection, AutoEncoder, UNet2DConditionModel, bool]:
    """(text encoder, VAE, U-Net, whether they come from one file) of --pretrained_model_name_or_path and --vae, on the
    CPU."""
    path = args.pretrained_model_name_or_path
    text_encoder, vae, unet = load_models_from_stable_diffusion_checkpoint(bool(args.v2), path, "cpu", weight_dtype)
    if getattr(args, "vae", None):
        vae = load_vae(args.vae, weight_dtype)
    return text_encoder, vae, unet, os.path.isfile(path)


def save_stable_diffusion_checkpoint(
    v2: bool, output_file: str, text_encoder: CLIPTextModelWithProjection, unet: UNet2DConditionModel,
    ckpt_path: str | None, epochs: int,
    steps: int, metadata: Mapping[str, str] | None, save_dtype: torch.dtype | None = None,
    vae: AutoEncoder | None = None,
) -> int:
    """One safetensors file in the original layout; returns the number of its tensors. Without `vae` that of `ckpt_path`
    is taken. `epochs` and `steps` stand in the metadata."""
    vae = load_vae_sd(ckpt_path, None, "cpu") if vae is None else vae
    save_checkpoint_sd(
        output_file, unet, text_encoder, vae, is_v2=v2, dtype=save_dtype,
        metadata=join_metadata(metadata, epochs, steps)
    )
    return len(checkpoint_state(unet, text_encoder, vae, v2))


def save_diffusers_checkpoint(
    v2: bool, output_dir: str, text_encoder: CLIPTextModelWithProjection, unet: UNet2DConditionModel,
    pretrained_model_name_or_path: str | None,
    vae: AutoEncoder | None = None, use_safetensors: bool = False,
) -> None:
    """A folder in the layout of diffusers, always of safetensors files. Without `vae` that of
    `pretrained_model_name_or_path` is taken."""
    vae = load_vae_sd(pretrained_model_name_or_path, None, "cpu") if vae is None else vae

    def save(path: str, metadata: Mapping[str, str]) -> None:
        save_checkpoint_sd(path, unet, text_encoder, vae, is_v2=v2, metadata=metadata)

    write_diffusers_folder(
        "sd2" if v2 else "sd1", output_dir, save, unet, vae, {"clip_h" if v2 else "clip_l": text_encoder}
    )


# -- names of tensors ------------------------------------------------------------------------------------------------


def _part(checkpoint: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, or all of them when they have none."""
    found = {key[len(prefix) :]: tensor for key, tensor in checkpoint.items() if key.startswith(prefix)}
    return found or dict(checkpoint)


def convert_ldm_unet_checkpoint(v2: bool, checkpoint: Mapping[str, Tensor], config: Any = None) -> dict[str, Tensor]:
    """U-Net entries of a file under the names of diffusers; sizes are read from the entries, `config` changes
    nothing."""
    return original_to_diffusers(_part(checkpoint, UNET))


def convert_unet_state_dict_to_sd(v2: bool, unet_state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_ldm_unet_checkpoint`, without the prefix of a whole file."""
    return diffusers_to_original(unet_state_dict)


def convert_controlnet_state_dict_to_diffusers(controlnet_state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a ControlNet's file under the names of diffusers."""
    return control_net_to_diffusers(controlnet_state_dict)


def convert_controlnet_state_dict_to_sd(controlnet_state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_controlnet_state_dict_to_diffusers`."""
    return control_net_to_original(controlnet_state_dict)


def convert_ldm_vae_checkpoint(checkpoint: Mapping[str, Tensor], config: Any = None) -> dict[str, Tensor]:
    """VAE entries of a file under the names of diffusers; `config` changes nothing."""
    return convert_ldm_vae_to_diffusers(_part(checkpoint, VAE))


def convert_vae_state_dict(vae_state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `convert_ldm_vae_checkpoint`, without the prefix of a whole file."""
    return attention_as_convolution(convert_diffusers_vae_to_ldm(vae_state_dict))


def convert_ldm_clip_checkpoint_v1(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text encoder entries of a version 1 file under the names of transformers, without position ids."""
    part = _part({with_text_model(key): tensor for key, tensor in checkpoint.items()}, CLIP_V1)
    return {
        key: tensor
        for key, tensor in part.items()
        if key.startswith("text_model.") and not key.endswith("position_ids")
    }


def convert_ldm_clip_checkpoint_v2(checkpoint: Mapping[str, Tensor], max_length: int) -> dict[str, Tensor]:
    """Text encoder entries of a version 2 file under the names of transformers, without the last layer, which is not
    used. The positions stand in the entries, `max_length` changes nothing."""
    state = open_clip_to_hf(_part(checkpoint, CLIP_V2))
    layers = {key.split(".")[3] for key in state if key.startswith("text_model.encoder.layers.")}
    unused = f"text_model.encoder.layers.{max(map(int, layers))}."
    return {
        key: tensor for key, tensor in state.items() if key.startswith("text_model.") and not key.startswith(unused)
    }


def convert_text_encoder_state_dict_to_sd_v2(
    checkpoint: Mapping[str, Tensor], make_dummy_weights: bool = False
) -> dict[str, Tensor]:
    """Text encoder entries of transformers under the names of a version 2 file; with `make_dummy_weights` also the last
    layer, which readers expect and nothing uses."""
    state = dict(checkpoint)
    if make_dummy_weights:
        last = max(int(key.split(".")[3]) for key in state if key.startswith("text_model.encoder.layers."))
        before, after = (f"text_model.encoder.layers.{number}." for number in (last, last + 1))
        state |= {after + key[len(before) :]: tensor for key, tensor in checkpoint.items() if key.startswith(before)}
    return hf_to_open_clip(state)
