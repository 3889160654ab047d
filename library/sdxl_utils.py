"""SDXL checkpoints: loading the four parts from a file or folder, and saving them as one file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints.loading import Transform, prefixed
from library.checkpoints.open_clip_convert import hf_to_open_clip
from library.components.ldm_models import AutoEncoder
from library.components.ldm_utils import AutoEncoderInfo, Wanted, inspect_autoencoder, load_autoencoder
from library.components.text_encoder_utils import CLIP_G, CLIP_L, inspect_clip, load_clip
from library.components.unet_control_net_utils import UNetControlNets
from library.components.unet_models import UNetParams
from library.components.unet_utils import UNetInfo, inspect_unet, load_unet, unet_file_state
from library.core.errors import CheckpointError
from library.families.sdxl import FAMILY
from library.safetensors_utils import cast_all, save_file_atomic
from library.sdxl_models import SdxlUNet2DConditionModel

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection

VAE_WANTED = Wanted(
    "SDXL", "with 4 latent channels", quant_conv=True, scaling={"scaling_factor": 0.13025, "shift_factor": 0.0}
)
CONTROL_NETS = UNetControlNets(frozenset({"sdxl_controlnet"}), is_original=False)


def inspect_sdxl_unet(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> UNetInfo:
    """Recognise an SDXL U-Net from headers alone. CheckpointError for anything else."""
    info = inspect_unet(path, config)
    if not info.is_sdxl:
        kind = "Stable Diffusion 2" if info.is_v2 else "Stable Diffusion 1"
        raise CheckpointError(f"{info.source.path} is a {kind} checkpoint; SDXL is needed ({kind} has its own script)")
    return info


def load_unet_sdxl(
    path: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None, transform: Transform | None = None,
) -> SdxlUNet2DConditionModel:
    """Load the U-Net of a single file (.safetensors, .ckpt) or diffusers folder."""
    info = inspect_sdxl_unet(path, config)
    return load_unet(
        info, SdxlUNet2DConditionModel, tree_is_diffusers=False, dtype=dtype, device=device, disable_mmap=disable_mmap,
        transform=transform
    )


def load_text_encoders_sdxl(
    path: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False,
    transform: Transform | None = None,
) -> list[CLIPTextModelWithProjection]:
    """[CLIP-L, CLIP bigG]."""
    return [load_clip(path, slot, dtype, device, disable_mmap, transform=transform) for slot in (CLIP_L, CLIP_G)]


def text_encoder_sizes(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Sizes of CLIP-L and bigG from headers. CheckpointError when one is not there."""
    return [inspect_clip(path, slot).values for slot in (CLIP_L, CLIP_G)]


def embedding_widths(path: str | os.PathLike) -> dict[str, int | None]:
    """Widths of the vectors that the text encoders take, by the names of files of textual inversions."""
    return {
        key: values["width"] for key, values in zip(FAMILY.embedding_keys, text_encoder_sizes(path), strict=True)
    }


def text_width_problem(path: str | os.PathLike, sizes: list[dict[str, Any]], params: UNetParams) -> str | None:
    """What is wrong with the widths of the text encoders for this U-Net, or None."""
    if sum(values["width"] for values in sizes) == params.context_dim:
        return None
    widths = " + ".join(str(values["width"]) for values in sizes)
    return f"{path}: its text encoders give {widths} values per token, its U-Net takes {params.context_dim}; the file is no whole model"


def inspect_vae_sdxl(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    return inspect_autoencoder(path, config, wanted=VAE_WANTED)


def load_vae_sdxl(
    path: str | os.PathLike, dtype: torch.dtype | None, device: torch.device | str, disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> AutoEncoder:
    return load_autoencoder(inspect_vae_sdxl(path, config), dtype, device, disable_mmap)


def checkpoint_state(
    unet: SdxlUNet2DConditionModel | None, text_encoders: Sequence[CLIPTextModelWithProjection] | None,
    vae: AutoEncoder | None, marks: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """All weights of the parts that are given, under the keys of a single file. `marks`: empty marker keys, `v_pred`
    and `ztsnr`."""
    state = {} if unet is None else prefixed("model.diffusion_model.", unet_file_state(unet, tree_is_diffusers=False))
    state |= {} if vae is None else prefixed("first_stage_model.", vae.state_dict())
    state |= {} if text_encoders is None else _text_state(*text_encoders)
    return state | {mark: torch.zeros(0) for mark in marks}


def _text_state(clip_l: CLIPTextModelWithProjection, clip_g: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    first = {key: tensor for key, tensor in clip_l.state_dict().items() if key.startswith("text_model.")}
    positions = first["text_model.embeddings.position_embedding.weight"]
    first["text_model.embeddings.position_ids"] = torch.arange(len(positions), device=positions.device)[None]
    second = {**clip_g.state_dict(), **getattr(clip_g, "unused_tensors", {})}
    second.setdefault("logit_scale", torch.tensor(4.6052, dtype=positions.dtype))  # ln 100; a folder does not hold it
    second = hf_to_open_clip(second)
    return prefixed("conditioner.embedders.0.transformer.", first) | prefixed("conditioner.embedders.1.model.", second)


def save_checkpoint_sdxl(
    path: str | os.PathLike, unet: SdxlUNet2DConditionModel, text_encoders: list[CLIPTextModelWithProjection],
    vae: AutoEncoder, *,
    marks: tuple[str, ...] = (), dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file in the original layout."""
    state = checkpoint_state(unet, text_encoders, vae, marks)
    save_file_atomic({key: tensor.contiguous() for key, tensor in cast_all(state, dtype).items()}, path, metadata)
