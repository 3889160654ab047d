"""Stable Diffusion 1 and 2 checkpoints: loading the three parts from a file or folder, and saving them as one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.loading import Transform, prefixed
from library.checkpoints.open_clip_convert import hf_to_open_clip
from library.components.ldm_models import AutoEncoder
from library.components.ldm_utils import AutoEncoderInfo, Wanted, inspect_autoencoder, load_autoencoder
from library.components.text_encoder_utils import CLIP_H, CLIP_L, ClipSlot, inspect_clip, load_clip
from library.components.unet_control_net_utils import UNetControlNets
from library.components.unet_utils import UNetInfo, inspect_unet, load_unet, unet_file_state
from library.core.errors import CheckpointError
from library.safetensors_utils import cast_all, save_file_atomic
from library.sd_models import UNet2DConditionModel

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

VAE_WANTED = Wanted(
    "Stable Diffusion",
    "with 4 latent channels",
    quant_conv=True,
    scaling={"scaling_factor": 0.18215, "shift_factor": 0.0},
)
_V2_LAYERS_IN_FILE = 24
CONTROL_NETS = UNetControlNets(frozenset({"sd1_controlnet", "sd2_controlnet"}), is_original=True)


def inspect_sd_unet(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> UNetInfo:
    """Recognise a Stable Diffusion 1 or 2 U-Net from headers alone. CheckpointError for anything else."""
    info = inspect_unet(path, config)
    if info.is_sdxl:
        raise CheckpointError(
            f"{info.source.path} is an SDXL checkpoint; Stable Diffusion 1 or 2 is needed (SDXL has its own script)"
        )
    return info


def load_unet_sd(
    path: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None, transform: Transform | None = None,
) -> UNet2DConditionModel:
    """Load the U-Net of a single file (.safetensors, .ckpt) or diffusers folder."""
    return load_unet(
        inspect_sd_unet(path, config), UNet2DConditionModel, tree_is_diffusers=True, dtype=dtype, device=device,
        disable_mmap=disable_mmap,
        transform=transform,
    )


def text_slot(is_v2: bool) -> ClipSlot:
    """Stable Diffusion 1 reads captions through CLIP-L, 2 through the first 23 of 24 layers of CLIP-H."""
    return CLIP_H if is_v2 else CLIP_L


def clip_skip_problem(path: str | os.PathLike, is_v2: bool, clip_skip: int | None) -> str | None:
    """A message for a layer of the text encoder that there is not; None also when the encoder cannot be read, which is
    told elsewhere."""
    if clip_skip is None:
        return None
    try:
        layers = inspect_clip(path, text_slot(is_v2)).values["layers"]
    except CheckpointError:
        return None
    if clip_skip <= layers:
        return None
    return (
        f"--clip_skip is {clip_skip}; the text encoder of {path} has {layers} layers in use, so 1 to {layers} is needed"
    )


def load_text_encoder_sd(
    path: str | os.PathLike, is_v2: bool, dtype: torch.dtype | None, device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None, transform: Transform | None = None,
) -> CLIPTextModelWithProjection:
    return load_clip(path, text_slot(is_v2), dtype, device, disable_mmap, config, transform)


def inspect_vae_sd(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    return inspect_autoencoder(path, config, wanted=VAE_WANTED)


def load_vae_sd(
    path: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> AutoEncoder:
    return load_autoencoder(inspect_vae_sd(path, config), dtype, device, disable_mmap)


def checkpoint_state(
    unet: UNet2DConditionModel | None, text_encoder: CLIPTextModelWithProjection | None, vae: AutoEncoder | None,
    is_v2: bool,
) -> dict[str, Tensor]:
    """All weights of the parts that are given, under the keys of a single file."""
    state = {} if unet is None else prefixed("model.diffusion_model.", unet_file_state(unet, tree_is_diffusers=True))
    state |= {} if vae is None else prefixed("first_stage_model.", vae.state_dict())
    return state if text_encoder is None else state | _text_state(text_encoder, is_v2)


def _text_state(text_encoder: CLIPTextModelWithProjection, is_v2: bool) -> dict[str, Tensor]:
    text = {**text_encoder.state_dict(), **getattr(text_encoder, "unused_tensors", {})}
    if is_v2:
        return prefixed("cond_stage_model.model.", hf_to_open_clip(_all_v2_layers(text)))
    text = {key: tensor for key, tensor in text.items() if key.startswith("text_model.")}
    positions = text["text_model.embeddings.position_embedding.weight"]
    text["text_model.embeddings.position_ids"] = torch.arange(len(positions), device=positions.device)[None]
    return prefixed("cond_stage_model.transformer.", text)


def _all_v2_layers(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Readers expect the layer that is never used and the logit scale. A model from a folder has neither: the layer
    before stands in, and ln 100, where that number starts."""
    complete = dict(text)
    complete.setdefault("logit_scale", torch.tensor(4.6052, dtype=text["text_projection.weight"].dtype))
    used = max(int(key.split(".")[3]) for key in text if key.startswith("text_model.encoder.layers.")) + 1
    if used == _V2_LAYERS_IN_FILE - 1:
        before, last = f"text_model.encoder.layers.{used - 1}.", f"text_model.encoder.layers.{used}."
        complete |= {last + key.removeprefix(before): tensor for key, tensor in text.items() if key.startswith(before)}
    return complete


def save_checkpoint_sd(
    path: str | os.PathLike, unet: UNet2DConditionModel, text_encoder: CLIPTextModelWithProjection, vae: AutoEncoder, *,
    is_v2: bool, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file in the original layout."""
    state = checkpoint_state(unet, text_encoder, vae, is_v2)
    save_file_atomic({key: tensor.contiguous() for key, tensor in cast_all(state, dtype).items()}, path, metadata)
