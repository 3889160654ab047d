"""HunyuanImage 2.1 checkpoints: what a file holds, loading and saving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import hunyuan_image_convert
from library.checkpoints.denoisers import (
    DenoiserInfo,
    inspect_denoiser,
    load_denoiser,
    save_denoiser,
    state_of_denoiser,
)
from library.checkpoints.hunyuan_convert import comfy_rules, rows_of
from library.checkpoints.layout_rules import DenoiserLayouts
from library.checkpoints.loading import Transform
from library.components.hunyuan_stream_utils import stream_kind
from library.components.ldm_models import AutoEncoderParams
from library.components.ldm_utils import (
    AutoEncoderInfo,
    DiffusersNames,
    Wanted,
    inspect_autoencoder,
    load_autoencoder,
)
from library.components.llm_encoder_utils import inspect_qwen25_vl, load_qwen25_vl
from library.components.stored_parts import stored_model
from library.components.text_encoder_utils import inspect_t5xxl, load_t5xxl
from library.core.errors import Problems
from library.core.lazy_names import homes, lazy_names
from library.custom_offloading_utils import stream_swap_problem
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_vae import LATENT_SCALING_FACTOR, SAMPLE_SIZE, TILES, HunyuanVAE2D

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes(
    "library.compat.hunyuan_image_names", "MODEL_VERSION_2_1", "get_timesteps_sigmas", "step",
))

VAE_WANTED = Wanted(
    "HunyuanImage 2.1", "hunyuan_image_2.1_vae_fp16.safetensors", quant_conv=False,
    scaling={"scaling_factor": LATENT_SCALING_FACTOR, "shift_factor": 0.0},
    names=DiffusersNames(
        hunyuan_image_convert.is_diffusers_autoencoder, hunyuan_image_convert.autoencoder_to_original
    ),
    marks=("decoder.up.0.upsample.conv.weight",), model_class=HunyuanVAE2D,
)  # fmt: skip
KIND = stream_kind(
    "HunyuanImage 2.1",
    HYImageDiffusionTransformer,
    HYImageParams,
    hunyuan_image_convert.NAMES,
    hunyuan_image_convert.ROOTS,
    mark="byt5_in.fc1.weight",
    sizes=lambda size, shapes: {
        "byt5_dim": size("byt5_in.fc1.weight", 1),
        "byt5_mid": size("byt5_in.fc1.weight", 0),
        "mean_flow": any(key.startswith("time_r_in.") for key in shapes),
    },
    axes=lambda head_dim: (head_dim // 2, head_dim // 2),
)


def inspect_hunyuan_image(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> DenoiserInfo:
    """Recognise a HunyuanImage 2.1 denoiser from headers alone; `config` overrides hyper-parameters by the names of
    HYImageParams.

    CheckpointError when the file is damaged or no such denoiser.
    """
    return inspect_denoiser(KIND, path, config)


def load_hunyuan_image(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    by_rows: bool = False,
    transform: Transform | None = None,
) -> HYImageDiffusionTransformer:
    """Load a denoiser in any layout; its sizes come from the file. As `load_denoiser` otherwise."""
    info = inspect_hunyuan_image(path, config)
    params = info.params
    logger.info(
        "loading HunyuanImage 2.1%s from %s (%d double and %d single blocks)",
        " (distilled)" if params.guidance_embed or params.mean_flow else "", path, params.depth, params.depth_single,
    )  # fmt: skip
    return load_denoiser(info, dtype, device, disable_mmap, form=form, by_rows=by_rows, transform=transform)


def load_encoders(
    text_encoder: str | os.PathLike,
    byt5: str | os.PathLike,
    dtype: torch.dtype,
    device: torch.device | str,
    disable_mmap: bool = False,
    *,
    form: str | None = None,
) -> list[torch.nn.Module]:
    """[Qwen2.5-VL, ByT5]. On a CPU they compute in bfloat16 instead of float16; `form`, one of weight_forms.FORMS,
    stores the matrices of the first. CheckpointError when a file does not fit."""
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        dtype = torch.bfloat16
    vlm = stored_model(lambda place: load_qwen25_vl(text_encoder, dtype, place, disable_mmap), form, device)
    return [vlm, load_t5xxl(byt5, dtype, device, disable_mmap)]


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return state_of_denoiser(KIND, state)


def fitting_problems(
    denoiser: Callable[[], HYImageParams],
    *,
    text_encoder: tuple[str, str],
    byt5: tuple[str, str],
    vae: tuple[str, str] | None,
    model: str,
    blocks_to_swap: int,
) -> list[str]:
    """What is wrong with each file, sizes of text encoders and autoencoder against the denoiser's, and a block swap
    that its depth does not allow, from headers. Each part is (option, path), no vae = not checked; `denoiser` reads
    the header of `model`."""
    problems = Problems()
    params = problems.attempt(denoiser)
    sizes = [
        (*text_encoder, "its width", lambda: inspect_qwen25_vl(text_encoder[1])["hidden_size"], "text_dim"),
        (*byt5, "its width", lambda: inspect_t5xxl(byt5[1])["d_model"], "byt5_dim"),
    ]
    if vae is not None:
        sizes.append(
            (*vae, "its number of latent channels", lambda: inspect_vae(vae[1]).params.z_channels, "in_channels")
        )
    for option, path, what, read, needed in sizes:
        size = problems.attempt(read)
        if params is not None and size not in (None, getattr(params, needed)):
            problems.add(
                f"--{option} is {path}: {what} is {size}, the denoiser {model} takes {getattr(params, needed)};"
                " use the files that belong together"
            )
    swap = params and stream_swap_problem(blocks_to_swap, params.depth, params.depth_single)
    return [*problems.messages, swap] if swap else problems.messages


def save_hunyuan_image(
    model: HYImageDiffusionTransformer,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_denoiser(KIND, model, path, dtype, metadata)


def _config_of_diffusers(params: HYImageParams) -> dict[str, Any]:
    """config.json of diffusers' HunyuanImageTransformer2DModel."""
    return {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": params.in_channels, "out_channels": params.in_channels, "patch_size": [1, 1],
        "num_attention_heads": params.num_heads, "attention_head_dim": params.hidden_size // params.num_heads,
        "num_layers": params.depth, "num_single_layers": params.depth_single,
        "num_refiner_layers": params.refiner_depth, "mlp_ratio": params.mlp_ratio, "qk_norm": "rms_norm",
        "guidance_embeds": params.guidance_embed, "use_meanflow": params.mean_flow,
        "text_embed_dim": params.text_dim, "text_embed_2_dim": params.byt5_dim,
        "rope_theta": params.rope_theta, "rope_axes_dim": list(params.rope_dim_list),
    }  # fmt: skip


LAYOUTS = DenoiserLayouts(
    inspect_hunyuan_image, hunyuan_image_convert.NAMES.rules, _config_of_diffusers,
    rows_of=lambda params: rows_of(params.hidden_size), further=comfy_rules,
)  # fmt: skip


def inspect_vae(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> AutoEncoderInfo:
    """Recognise the 32x autoencoder, in either layout, from headers alone; `config` overrides by the names of
    AutoEncoderParams. CheckpointError when it is another one."""
    return inspect_autoencoder(path, config, wanted=VAE_WANTED)


def load_vae(
    vae_path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    chunk_size: int | None = None,
    tiling: bool = False,
) -> HunyuanVAE2D:
    """Load the autoencoder; `chunk_size`: rows that its convolutions compute at once; `tiling`: larger pictures are
    computed in tiles. CheckpointError when the file does not fit."""
    vae = load_autoencoder(inspect_vae(vae_path, config), dtype, device, disable_mmap)
    vae.set_chunk_rows(chunk_size)
    vae.tiles = TILES if tiling else None
    return vae


def _config_of_vae(params: AutoEncoderParams) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKLHunyuanImage, whose norms have 32 groups in any case."""
    groups = {} if params.norm_groups == 32 else {"norm_num_groups": params.norm_groups}
    return {
        "_class_name": "AutoencoderKLHunyuanImage",
        "in_channels": params.in_channels, "out_channels": params.out_ch, "latent_channels": params.z_channels,
        "block_out_channels": list(params.widths), "layers_per_block": params.num_res_blocks,
        "spatial_compression_ratio": params.spatial_stride, "sample_size": SAMPLE_SIZE,
        "scaling_factor": params.scaling_factor, **groups,
    }  # fmt: skip


VAE_LAYOUTS = DenoiserLayouts(
    inspect_vae, hunyuan_image_convert.autoencoder_rules, _config_of_vae, part="vae",
)  # fmt: skip
