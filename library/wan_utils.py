"""Wan 2.1 and 2.2 checkpoints: what a file holds, loading and saving a denoiser."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints import wan_convert
from library.checkpoints.layout_rules import DenoiserLayouts, Rule, to_original
from library.checkpoints.loading import (
    CheckpointFiles,
    Transform,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    config_metadata,
    count_blocks,
    find_prefix,
    is_blob,
    open_checkpoint,
    part_of,
    size_of,
    strip_prefix,
)
from library.fp8_optimization_utils import FP8_BLOCK, FP8_STORAGE, scaled_fp8, store_linears_in_fp8, use_scales
from library.safetensors_utils import cast_all, cast_floats, save_file_atomic
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
MARKS = ("patch_embedding.weight", "blocks.0.self_attn.norm_q.weight", "time_projection.1.weight")
HEAD_SIZE = 128
_IN_FLOAT32 = ("time_embedding.", "time_projection.")
"""layers that compute, and are kept, in float32, as the modulations are: times would be rounded to what bfloat16
holds"""


@dataclass(frozen=True)
class WanInfo:
    """What the headers of a denoiser file tell. `rules`: by which its names become the original ones, none where they
    are; `dtypes`: types of the stored weights."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    rules: tuple[Rule, ...]
    params: WanParams
    dtypes: frozenset[torch.dtype]

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in DENOISER_ROOTS]


def inspect_wan(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> WanInfo:
    """Recognise a Wan denoiser from headers alone; `config` overrides hyper-parameters by the names of WanParams.

    CheckpointError when the file is damaged or no such denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    stripped = strip_prefix(source.shapes, prefix)
    own = {key: tensor for key, tensor in stripped.items() if key.split(".")[0] in DENOISER_ROOTS and not is_blob(key)}
    is_diffusers = wan_convert.is_diffusers_denoiser(own)
    rules = tuple(wan_convert.denoiser_rules(own)) if is_diffusers else ()
    shapes = to_original(own, rules)
    check_marks(shapes or stripped, MARKS, source.path, "Wan denoiser")
    given = {**_diffusers_config(source.config), **source.model_config, **(config or {})}
    params = build_params(WanParams, _infer(shapes, given, source.path), given, source.path)
    check_state(build_on_meta(lambda: WanModel(params)), shapes, source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in shapes.items() if key.endswith(".weight"))
    return WanInfo(source, prefix, is_diffusers, rules, params, dtypes)


def _diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says that shapes do not, in the names of diffusers or of the original folders."""
    names = {"num_attention_heads": "num_heads", "num_heads": "num_heads", "eps": "eps", "text_len": "text_len"}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def _infer(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes; heads are of 128 values."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, "WanModel")

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


def load_wan(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    fp8_scaled: bool = False,
    transform: Transform | None = None,
) -> WanModel:
    """Load a denoiser in any layout: a file, one of a split set, or a folder; its sizes come from the file.

    `fp8_scaled` keeps the matrices of the blocks in 8 bits, each 64 inputs of a row with a scale of their own; `dtype`
    float8_e4m3fn the weights of the linear layers, without scales, and the rest in bfloat16; None keeps the file's own
    types. What the time goes through is float32 in any case. `transform` may change the tensors as they are read.
    CheckpointError when the file does not fit.
    """
    info = inspect_wan(path, config)
    logger.info(
        "loading Wan from %s (%s layout, %d blocks of width %d, %d input channels)", path,
        "diffusers" if info.is_diffusers else "original", info.params.num_layers, info.params.dim, info.params.in_dim,
    )  # fmt: skip
    store = info.source.storing(torch.bfloat16 if fp8_scaled and dtype == FP8_STORAGE else dtype, info.keys)
    rule_of = {part: rule for rule in info.rules for part in rule.parts}
    scales: dict[str, Tensor] = {}

    def cast(key: str, tensor: Tensor) -> Tensor:
        name = key[len(info.prefix) :]
        ours = rule_of[name].original if name in rule_of else name
        if ours.startswith(_IN_FLOAT32) or ours.endswith("modulation"):
            return cast_floats(tensor, torch.float32, key)
        if fp8_scaled and takes_scale(ours.removesuffix(".weight")) and ours.endswith(".weight"):
            weight, scales[name] = scaled_fp8(tensor, FP8_BLOCK)
            return weight
        return store(key, tensor)

    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    state, scales = to_original(state, info.rules), to_original(scales, info.rules)
    model = build_on_meta(lambda: WanModel(info.params))
    check_state(model, state, os.fspath(path))
    assign_state(model, state)
    store_linears_in_fp8(model)
    for name, scale in scales.items():
        use_scales(model.get_submodule(name.removesuffix(".weight")), scale)
    return model


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the blocks."""
    return path.startswith("blocks.") and "norm" not in path


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return wan_convert.to_original(part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS))


def save_wan(
    model: WanModel,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    state = cast_all({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    save_file_atomic(state, path, {"format": "pt", **(metadata or {}), **model_config_metadata(model)})


def model_config_metadata(model: WanModel) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(model.params, lambda: build_params(WanParams, _infer(model.state_dict(), {}, ""), {}, ""))


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
