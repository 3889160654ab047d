"""SDXL by its known calls: whole models in one file or folder, the names of their tensors, and its size
conditioning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.attention import timestep_embedding
from library.checkpoints.open_clip_convert import hf_to_open_clip, open_clip_to_hf
from library.checkpoints.unet_convert import diffusers_to_original, original_to_diffusers
from library.compat.ldm_files import join_metadata, write_diffusers_folder
from library.components.tokenizers import load_clip_tokenizer
from library.safetensors_utils import is_pickled, read_header
from library.sdxl_train_utils import get_size_embeddings as sizes_embedded
from library.sdxl_utils import (
    checkpoint_state,
    load_text_encoders_sdxl,
    load_unet_sdxl,
    load_vae_sdxl,
    save_checkpoint_sdxl,
)
from library.strategy_sdxl import SECOND_PAD

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

    from library.components.ldm_models import AutoEncoder
    from library.sdxl_models import SdxlUNet2DConditionModel

MODEL_VERSION_SDXL_BASE_V1_0 = "sdxl_base_v1-0"
VAE_SCALE_FACTOR = 0.13025
_LOGIT_SCALE = 4.6052


# -- whole models ----------------------------------------------------------------------------------------------------


def load_models_from_sdxl_checkpoint(
    model_version: str, ckpt_path: str, map_location: str | torch.device, dtype: torch.dtype | None = None,
    disable_mmap: bool = False
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, AutoEncoder, SdxlUNet2DConditionModel, Tensor,
tuple[int, int] | None]:
    """(CLIP-L, CLIP bigG, VAE, U-Net, logit scale, (epoch, step) of the file or None) of a file or folder."""
    first, second = load_text_encoders_sdxl(ckpt_path, dtype, map_location, disable_mmap)
    vae = load_vae_sdxl(ckpt_path, dtype, map_location, disable_mmap)
    unet = load_unet_sdxl(ckpt_path, dtype, map_location, disable_mmap)
    logit_scale = getattr(second, "unused_tensors", {}).get("logit_scale", torch.tensor(_LOGIT_SCALE))
    return first, second, vae, unet, logit_scale, _trained(ckpt_path)


def _trained(path: str) -> tuple[int, int] | None:
    """(epoch, step) that the metadata of a whole model tell."""
    if not os.path.isfile(path) or is_pickled(path):
        return None
    metadata = read_header(path)[1]
    numbers = [metadata.get("epoch", ""), metadata.get("global_step", "")]
    return (int(numbers[0]), int(numbers[1])) if all(number.isdigit() for number in numbers) else None


def load_target_model(
    args: Any, accelerator: Any, model_version: str, weight_dtype: torch.dtype
) -> tuple[bool, CLIPTextModelWithProjection, CLIPTextModelWithProjection, AutoEncoder, SdxlUNet2DConditionModel,
Tensor, Any]:
    """(whether it is one file, CLIP-L, CLIP bigG, VAE, U-Net, logit scale, (epoch, step) or None), on the CPU."""
    path = args.pretrained_model_name_or_path
    first, second, vae, unet, logit_scale, trained = load_models_from_sdxl_checkpoint(
        model_version, path, "cpu", weight_dtype, getattr(args, "disable_mmap_load_safetensors", False)
    )
    if getattr(args, "vae", None):
        vae = load_vae_sdxl(args.vae, weight_dtype, "cpu")
    return os.path.isfile(path), first, second, vae, unet, logit_scale, trained


def save_stable_diffusion_checkpoint(
    output_file: str, text_encoder1: CLIPTextModelWithProjection, text_encoder2: CLIPTextModelWithProjection,
    unet: SdxlUNet2DConditionModel,
    epochs: int, steps: int, ckpt_info: tuple[int, int] | None, vae: AutoEncoder, logit_scale: Tensor | None,
    metadata: Mapping[str, str] | None, save_dtype: torch.dtype | None = None,
) -> int:
    """One safetensors file in the original layout; returns the number of its tensors. `ckpt_info` (epoch, step) of the
    base is added to `epochs` and `steps`, which stand in the metadata."""
    _set_logit_scale(text_encoder2, logit_scale)
    before = ckpt_info or (0, 0)
    save_checkpoint_sdxl(
        output_file, unet, [text_encoder1, text_encoder2], vae, dtype=save_dtype,
        metadata=join_metadata(metadata, epochs + before[0], steps + before[1]),
    )
    return len(checkpoint_state(unet, [text_encoder1, text_encoder2], vae))


def save_diffusers_checkpoint(
    output_dir: str, text_encoder1: CLIPTextModelWithProjection, text_encoder2: CLIPTextModelWithProjection,
    unet: SdxlUNet2DConditionModel,
    pretrained_model_name_or_path: str | None, vae: AutoEncoder | None = None, use_safetensors: bool = False,
    save_dtype: torch.dtype | None = None,
) -> None:
    """A folder in the layout of diffusers, always of safetensors files. Without `vae` that of
    `pretrained_model_name_or_path` is taken."""
    vae = load_vae_sdxl(pretrained_model_name_or_path, None, "cpu") if vae is None else vae

    def save(path: str, metadata: Mapping[str, str]) -> None:
        save_checkpoint_sdxl(path, unet, [text_encoder1, text_encoder2], vae, metadata=metadata)

    encoders = {"clip_l": text_encoder1, "clip_g": text_encoder2}
    write_diffusers_folder("sdxl", output_dir, save, unet, vae, encoders, save_dtype)


def _set_logit_scale(text_encoder2: CLIPTextModelWithProjection, logit_scale: Tensor | None) -> None:
    if logit_scale is not None:
        text_encoder2.unused_tensors = {
            **getattr(text_encoder2, "unused_tensors", {}),
            "logit_scale": logit_scale.detach().cpu(),
        }


# -- names of tensors ------------------------------------------------------------------------------------------------


def convert_diffusers_unet_state_dict_to_sdxl(du_sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return diffusers_to_original(du_sd)


def convert_sdxl_unet_state_dict_to_diffusers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return original_to_diffusers(sd)


def convert_sdxl_text_encoder_2_checkpoint(
    checkpoint: Mapping[str, Tensor], max_length: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """(entries of CLIP bigG under the names of transformers, logit scale); the positions stand in the entries,
    `max_length` changes nothing."""
    prefix = "conditioner.embedders.1.model."
    state = open_clip_to_hf({key.removeprefix(prefix): tensor for key, tensor in checkpoint.items()})
    return {key: tensor for key, tensor in state.items() if key != "logit_scale"}, state.get("logit_scale")


def convert_text_encoder_2_state_dict_to_sdxl(
    checkpoint: Mapping[str, Tensor], logit_scale: Tensor | None
) -> dict[str, Tensor]:
    """The inverse of `convert_sdxl_text_encoder_2_checkpoint`, without the prefix of a whole file."""
    state = hf_to_open_clip(checkpoint)
    return state if logit_scale is None else {**state, "logit_scale": logit_scale}


# -- training --------------------------------------------------------------------------------------------------------


def get_timestep_embedding(x: Tensor, outdim: int) -> Tensor:
    """Numbers [B, n] -> their sinusoids side by side [B, n * outdim]."""
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}; rows of numbers [B, n] are needed")
    return timestep_embedding(x.flatten(), outdim, time_factor=1.0).view(len(x), -1)


def get_size_embeddings(
    orig_size: Tensor, crop_size: Tensor, target_size: Tensor, device: torch.device | str
) -> Tensor:
    """Sinusoids [B, 1536] of sizes [B, 2], heights first."""
    return sizes_embedded(orig_size, crop_size, target_size).to(device)


def load_tokenizers(args: Any) -> list[Any]:
    """[tokenizer of CLIP-L, of CLIP bigG]."""
    cache = getattr(args, "tokenizer_cache_dir", None)
    return [
        load_clip_tokenizer(None, cache, pad_token=pad, option="--tokenizer_cache_dir") for pad in (None, SECOND_PAD)
    ]
