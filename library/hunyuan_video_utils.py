"""HunyuanVideo checkpoints: what a file holds, loading and saving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import hunyuan_video_convert
from library.checkpoints.denoisers import (
    DenoiserInfo,
    SizeOf,
    inspect_denoiser,
    load_denoiser,
    save_denoiser,
    state_of_denoiser,
)
from library.checkpoints.hunyuan_convert import comfy_rules, rows_of
from library.checkpoints.layout_rules import DenoiserLayouts
from library.checkpoints.loading import Transform
from library.components.hunyuan_stream_utils import stream_kind
from library.components.llama_clip_utils import add_size_problems, encoder_sizes
from library.core.errors import CheckpointError, Problems
from library.custom_offloading_utils import stream_swap_problem
from library.hunyuan_video_models import HYVideoDiffusionTransformer, HYVideoParams

logger = logging.getLogger(__name__)


def _sizes(size: SizeOf, shapes: Mapping[str, Tensor]) -> dict[str, Any]:
    patch = tuple(size("img_in.proj.weight", dim) for dim in (2, 3, 4))
    places = patch[0] * patch[1] * patch[2]
    return {
        "patch_size": patch,
        "out_channels": size("final_layer.linear.weight", 0) // places,
        "vec_dim": size("vector_in.in_layer.weight", 1),
    }


KIND = stream_kind(
    "HunyuanVideo",
    HYVideoDiffusionTransformer,
    HYVideoParams,
    hunyuan_video_convert.NAMES,
    hunyuan_video_convert.ROOTS,
    mark="vector_in.in_layer.weight",
    sizes=_sizes,
    axes=lambda head_dim: (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16),
)


def inspect_hunyuan_video(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> DenoiserInfo:
    """Recognise a HunyuanVideo or SkyReels V1 denoiser from headers alone; `config` overrides hyper-parameters by the
    names of HYVideoParams.

    CheckpointError when the file is damaged, no such denoiser, or one that is shown its first frame in another way.
    """
    info = inspect_denoiser(KIND, path, config)
    params, manner = info.params, info.source.config.get("image_condition_type")
    if params.in_channels == 2 * params.out_channels + 1:
        manner = f"{params.in_channels} input channels, a mask beside the latents of the picture"
    if manner:
        raise CheckpointError(
            f"{path} is an image to video model that is shown its picture in another way ({manner}), which is not"
            " supported; take a text to video file, or SkyReels V1 image to video"
        )
    return info


def load_hunyuan_video(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    by_rows: bool = False,
    transform: Transform | None = None,
) -> HYVideoDiffusionTransformer:
    """Load a denoiser in any layout; its sizes come from the file. As `load_denoiser` otherwise."""
    info = inspect_hunyuan_video(path, config)
    params = info.params
    logger.info(
        "loading HunyuanVideo%s from %s (%d double and %d single blocks)",
        " (image to video)" if params.shown_channels else "", path, params.depth, params.depth_single,
    )  # fmt: skip
    return load_denoiser(info, dtype, device, disable_mmap, form=form, by_rows=by_rows, transform=transform)


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return state_of_denoiser(KIND, state)


def save_hunyuan_video(
    model: HYVideoDiffusionTransformer,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_denoiser(KIND, model, path, dtype, metadata)


def _config_of_diffusers(params: HYVideoParams) -> dict[str, Any]:
    """config.json of diffusers' HunyuanVideoTransformer3DModel."""
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": params.in_channels, "out_channels": params.out_channels,
        "num_attention_heads": params.num_heads, "attention_head_dim": params.head_dim,
        "num_layers": params.depth, "num_single_layers": params.depth_single,
        "num_refiner_layers": params.refiner_depth, "mlp_ratio": params.mlp_ratio, "qk_norm": "rms_norm",
        "patch_size": params.patch_size[1], "patch_size_t": params.patch_size[0],
        "guidance_embeds": params.guidance_embed, "text_embed_dim": params.text_dim,
        "pooled_projection_dim": params.vec_dim, "rope_theta": params.rope_theta,
        "rope_axes_dim": list(params.rope_dim_list), "image_condition_type": None,
    }  # fmt: skip


LAYOUTS = DenoiserLayouts(
    inspect_hunyuan_video, hunyuan_video_convert.NAMES.rules, _config_of_diffusers,
    rows_of=lambda params: rows_of(params.hidden_size), further=comfy_rules,
)  # fmt: skip


def fitting_problems(
    denoiser: Callable[[], HYVideoParams],
    *,
    text_encoder1: str | None = None,
    text_encoder2: str | None = None,
    vae: str | None = None,
    model: str,
    in_channels: int | None,
    blocks_to_swap: int,
) -> list[str]:
    """What is wrong with each file, sizes of text encoders and autoencoder against the denoiser's, the number of its
    input channels, and a block swap that its depth does not allow, from headers. Files that are None are not looked at;
    `denoiser` reads the header of `model`."""
    problems = Problems()
    params = problems.attempt(denoiser)
    text, pooled, channels = (
        None if params is None else getattr(params, name) for name in ("text_dim", "vec_dim", "out_channels")
    )
    files = (text_encoder1, text_encoder2, vae)
    add_size_problems(problems, encoder_sizes(*files, text=text, pooled=pooled, channels=channels), model)
    if params is not None and in_channels not in (None, params.in_channels):
        problems.add(
            f"--dit_in_channels is {in_channels}, and the file {model} has {params.in_channels} input channels; leave"
            " it out, or give the model that has them"
        )
    staying = HYVideoDiffusionTransformer.blocks_that_stay
    swap = params and stream_swap_problem(blocks_to_swap, params.depth, params.depth_single, staying)
    return [*problems.messages, swap] if swap else problems.messages
