"""Wan 2.1 and 2.2 checkpoints: what a file holds, loading and saving a denoiser."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import wan_convert
from library.checkpoints.denoisers import (
    DenoiserInfo,
    DenoiserKind,
    SizeOf,
    inspect_denoiser,
    load_denoiser,
    save_denoiser,
    state_of_denoiser,
)
from library.checkpoints.layout_rules import DenoiserLayouts
from library.checkpoints.loading import Transform, count_blocks
from library.fp8_optimization_utils import FP8_BLOCK
from library.wan_models import WanModel, WanParams

logger = logging.getLogger(__name__)

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "net.", "transformer.")
_FOREIGN_ROOTS = (
    "vace_blocks", "vace_patch_embedding", "ref_conv", "control_adapter", "pose_patch_embedding", "face_adapter",
    "motion_encoder",
)  # fmt: skip
"""of relatives that compute something else: their files do not fit, and are not cut to what fits"""
DENOISER_ROOTS = (
    "patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head", "img_emb",
    *wan_convert.ROOTS, *_FOREIGN_ROOTS,
)  # fmt: skip
HEAD_SIZE = 128


def _infer(size: SizeOf, shapes: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters from shapes; heads are of 128 values."""
    patch = "patch_embedding.weight"
    dim, patch_size = size(patch, 0), tuple(size(patch, axis) for axis in (2, 3, 4))
    volume = patch_size[0] * patch_size[1] * patch_size[2]
    has_vision = "img_emb.proj.1.weight" in shapes
    return {
        "dim": dim,
        "ffn_dim": size("blocks.0.ffn.0.weight", 0),
        "num_heads": given.get("num_heads") or max(dim // HEAD_SIZE, 1),
        "num_layers": count_blocks(shapes, "blocks."),
        "in_dim": size(patch, 1),
        "out_dim": size("head.head.weight", 0) // volume,
        "text_dim": size("text_embedding.0.weight", 1),
        "freq_dim": size("time_embedding.0.weight", 1),
        "patch_size": patch_size,
        "img_dim": size("img_emb.proj.1.weight", 1) if has_vision else None,
        "img_positions": size("img_emb.emb_pos", 1) if "img_emb.emb_pos" in shapes else 0,
    }


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the blocks."""
    return path.startswith("blocks.") and "norm" not in path


def _stays_float32(name: str) -> bool:
    """What the time goes through, and the modulations: times would be rounded to what bfloat16 holds."""
    return name.startswith(WanModel.float32_parts) or name.endswith("modulation")


KIND = DenoiserKind(
    title="Wan",
    model=WanModel,
    params=WanParams,
    prefixes=DENOISER_PREFIXES,
    roots=DENOISER_ROOTS,
    marks=("patch_embedding.weight", "blocks.0.self_attn.norm_q.weight", "time_projection.1.weight"),
    infer=_infer,
    takes_scale=takes_scale,
    scale_block=FP8_BLOCK,
    stays_float32=_stays_float32,
    is_diffusers=wan_convert.is_diffusers_denoiser,
    rules=lambda names: wan_convert.denoiser_rules(names) if wan_convert.is_diffusers_denoiser(names) else (),
    of_config={"num_attention_heads": "num_heads", "num_heads": "num_heads", "eps": "eps", "text_len": "text_len"},
)


def inspect_wan(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> DenoiserInfo:
    """Recognise a Wan denoiser from headers alone; `config` overrides hyper-parameters by the names of WanParams.

    CheckpointError when the file is damaged or no such denoiser.
    """
    return inspect_denoiser(KIND, path, config)


def load_wan(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    by_rows: bool = False,
    transform: Transform | None = None,
) -> WanModel:
    """Load a denoiser in any layout; its sizes come from the file. What the time goes through is float32 in any case.
    As `load_denoiser` otherwise."""
    info = inspect_wan(path, config)
    logger.info(
        "loading Wan from %s (%s layout, %d blocks of width %d, %d input channels)", path,
        "diffusers" if info.is_diffusers else "original", info.params.num_layers, info.params.dim, info.params.in_dim,
    )  # fmt: skip
    return load_denoiser(info, dtype, device, disable_mmap, form=form, by_rows=by_rows, transform=transform)


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return state_of_denoiser(KIND, state)


def save_wan(
    model: WanModel,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_denoiser(KIND, model, path, dtype, metadata)


def _config_of_diffusers(params: WanParams) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(params.patch_size), "num_attention_heads": params.num_heads,
        "attention_head_dim": params.head_dim, "in_channels": params.in_dim, "out_channels": params.out_dim,
        "text_dim": params.text_dim, "freq_dim": params.freq_dim, "ffn_dim": params.ffn_dim,
        "num_layers": params.num_layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "eps": params.eps, "image_dim": params.img_dim,
        "added_kv_proj_dim": params.dim if params.has_vision else None, "rope_max_seq_len": 1024,
        "pos_embed_seq_len": params.img_positions or None,
    }  # fmt: skip


LAYOUTS = DenoiserLayouts(inspect_wan, wan_convert.denoiser_rules, _config_of_diffusers)
