"""Checkpoints of the Stable Diffusion and SDXL U-Nets: what a file or folder holds, and loading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
    Transform,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    part_of,
    size_of,
    strip_prefix,
)
from library.checkpoints.unet_convert import diffusers_to_original, is_diffusers_unet, original_to_diffusers
from library.components.unet_models import UNetBase, UNetParams
from library.core.errors import CheckpointError
from library.core.text_files import read_json
from library.safetensors_utils import read_header

M = TypeVar("M", bound=UNetBase)
T = TypeVar("T")

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "model.")
UNET_ROOTS = (
    "time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out", "time_embedding",
    "add_embedding",
    "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out",
)  # fmt: skip
MARKS = ("input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight")
DIFFUSERS_MARKS = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight")
"""the same tensors in a folder"""
_HEAD_SIZE = 64
_SD1_HEADS = 8
_SPECIAL_INPUTS = {9: "an inpainting model", 8: "an image editing (instruct) model"}
_REFINER_WIDTH = 2560


@dataclass(frozen=True)
class UNetInfo:
    """What headers tell of a U-Net. `is_v2`: Stable Diffusion 2. `prediction_type` (epsilon or v) and
    `zero_terminal_snr` are None where the file does not say."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: UNetParams
    is_v2: bool
    prediction_type: str | None
    zero_terminal_snr: bool | None

    @property
    def is_sdxl(self) -> bool:
        return self.params.adm_in_channels is not None


def inspect_unet(path: Source, config: Mapping[str, Any] | None = None) -> UNetInfo:
    """Recognise a U-Net from headers alone; `config` overrides hyper-parameters by the names of UNetParams.

    CheckpointError when the file is damaged, holds no such U-Net, or is an inpainting, editing or refiner model.
    """
    source = open_checkpoint(path, "unet")
    prefix = find_prefix(source.shapes, UNET_PREFIXES, UNET_ROOTS, source.path, "U-Net")
    stripped = {
        key: tensor for key, tensor in strip_prefix(source.shapes, prefix).items() if key.split(".")[0] in UNET_ROOTS
    }
    is_diffusers = is_diffusers_unet(stripped)
    shapes = stripped if is_diffusers else original_to_diffusers(stripped)
    marks = DIFFUSERS_MARKS if is_diffusers else MARKS
    check_marks(stripped, marks, source.path, "Stable Diffusion or SDXL U-Net")
    _refuse_variants(shapes, source.path)
    given = {**folder_config(source.config), **source.model_config, **(config or {})}
    params, is_v2 = unet_params(source, shapes, given)
    return UNetInfo(source, prefix, is_diffusers, params, is_v2, *_declared_schedule(Path(source.path), source))


def unet_params(
    source: CheckpointFiles, shapes: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[UNetParams, bool]:
    """(sizes, whether it is Stable Diffusion 2) of the U-Net with these shapes (diffusers names), or of that which a
    net of its way down belongs to. `given` overrides what the shapes tell."""
    inferred = _infer(shapes, source.path)
    is_v2 = _is_v2(source, given, inferred)
    inferred |= _not_in_shapes(inferred, is_v2, given, source.path)
    return build_params(UNetParams, inferred, given, source.path), is_v2


def _refuse_variants(shapes: Mapping[str, Tensor], path: str) -> None:
    channels = shapes["conv_in.weight"].shape[1]
    out_channels = shapes["conv_out.weight"].shape[0] if "conv_out.weight" in shapes else channels
    if channels != out_channels:
        kind = _SPECIAL_INPUTS.get(channels, "a model of another task")
        raise CheckpointError(
            f"{path} is {kind} ({channels} input channels, {out_channels} come out), which is not trained here; a "
            "text-to-image model is needed"
        )
    label = shapes.get("add_embedding.linear_1.weight")
    if label is not None and label.shape[1] == _REFINER_WIDTH:
        raise CheckpointError(f"{path} is the SDXL refiner, which is not trained here; the SDXL base model is needed")


def folder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a diffusers config.json that UNetParams knows under other ones. Its attention_head_dim counts heads."""
    names = {
        "attention_head_dim": "heads", "num_attention_heads": "heads", "norm_num_groups": "norm_groups",
        "use_linear_projection": "use_linear_projection", "upcast_attention": "upcast_attention",
    }  # fmt: skip
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def _infer(shapes: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Hyper-parameters that shapes (diffusers names) tell."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, "a U-Net")

    levels = count_blocks(shapes, "down_blocks.")
    depths = tuple(
        count_blocks(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks.") for level in range(levels)
    )
    label = shapes.get("add_embedding.linear_1.weight")
    return {
        "in_channels": size("conv_in.weight", 1),
        "out_channels": size("conv_out.weight", 0) if "conv_out.weight" in shapes else size("conv_in.weight", 1),
        "channels": tuple(size(f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)),
        "num_res_blocks": count_blocks(shapes, "down_blocks.0.resnets."),
        "attention_levels": tuple(depth > 0 for depth in depths),
        "transformer_depth": depths,
        "middle_depth": count_blocks(shapes, "mid_block.attentions.0.transformer_blocks."),
        "context_dim": size("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 1),
        "time_embed_dim": size("time_embedding.linear_1.weight", 0),
        "adm_in_channels": None if label is None else label.shape[1],
    }


def _is_v2(source: CheckpointFiles, given: Mapping[str, Any], inferred: Mapping[str, Any]) -> bool:
    if inferred["adm_in_channels"] is not None:
        return False
    if "use_linear_projection" in given:
        return bool(given["use_linear_projection"])
    return inferred["context_dim"] == 1024 or any(key.startswith("cond_stage_model.model.") for key in source.shapes)


def _not_in_shapes(inferred: Mapping[str, Any], is_v2: bool, given: Mapping[str, Any], path: str) -> dict[str, Any]:
    is_sdxl = inferred["adm_in_channels"] is not None
    values: dict[str, Any] = {"use_linear_projection": is_v2 or is_sdxl, "upcast_attention": is_v2}
    if "heads" not in given:
        widths = inferred["channels"]
        if (is_v2 or is_sdxl) and any(width % _HEAD_SIZE for width in widths):
            raise CheckpointError(
                f"{path}: the widths {list(widths)} are no multiples of {_HEAD_SIZE}, so the number of heads is not "
                "known;"
                " give heads as an argument or under model_config in the file's metadata"
            )
        values["heads"] = (
            tuple(width // _HEAD_SIZE for width in widths) if is_v2 or is_sdxl else (_SD1_HEADS,) * len(widths)
        )
    return values


def _declared_schedule(path: Path, source: CheckpointFiles) -> tuple[str | None, bool | None]:
    """(prediction type, zero terminal SNR) as marker keys, metadata or a folder's scheduler declare them; None = not
    said."""
    if path.is_dir():
        found = path / "scheduler" / "scheduler_config.json"
        if not found.is_file():
            return None, None
        declared = read_json(found, error=CheckpointError, needed=dict)
        kind = {"v_prediction": "v", "epsilon": "epsilon"}.get(str(declared.get("prediction_type", "epsilon")))
        return kind, bool(declared.get("rescale_betas_zero_snr", False))
    is_v = "v" if "v_pred" in source.shapes else None
    is_zero = True if "ztsnr" in source.shapes else None
    if is_v is None and source.files and source.files[0].endswith(".safetensors"):
        is_v = {"v": "v", "epsilon": "epsilon"}.get(
            read_header(source.files[0])[1].get("modelspec.prediction_type", "")
        )
    return is_v, is_zero


def sd_unet_state(state: Mapping[str, T]) -> dict[str, T]:
    """The U-Net's entries of a checkpoint's state under the names of the Stable Diffusion 1 and 2 module tree."""
    part = part_of(state, UNET_PREFIXES, UNET_ROOTS)
    return part if is_diffusers_unet(part) else original_to_diffusers(part)


def sdxl_unet_state(state: Mapping[str, T]) -> dict[str, T]:
    """The U-Net's entries of a checkpoint's state under the names of the SDXL module tree."""
    part = part_of(state, UNET_PREFIXES, UNET_ROOTS)
    return diffusers_to_original(part) if is_diffusers_unet(part) else part


def load_unet(
    info: UNetInfo, build: Callable[[UNetParams], M], *, tree_is_diffusers: bool, dtype: torch.dtype | None,
    device: torch.device | str, disable_mmap: bool = False, transform: Transform | None = None,
) -> M:
    """The weights of an inspected U-Net in a module tree of either naming. CheckpointError when the file does not
    fit."""
    starts = tuple(info.prefix + root + "." for root in UNET_ROOTS)
    keys = [key for key in info.source.shapes if key.startswith(starts)]
    state = strip_prefix(
        info.source.tensors(device, disable_mmap, keys, transform, info.source.casting(dtype)), info.prefix
    )
    if info.is_diffusers != tree_is_diffusers:
        state = original_to_diffusers(state) if tree_is_diffusers else diffusers_to_original(state)
    state = {key: fitting_projection(key, tensor, info.params.use_linear_projection) for key, tensor in state.items()}
    model = build_on_meta(lambda: build(info.params))
    check_state(model, state, info.source.path)
    assign_state(model, state)
    return model


def fitting_projection(key: str, tensor: Tensor, is_linear: bool) -> Tensor:
    """proj_in and proj_out occur as (C, C) and as (C, C, 1, 1), whatever the model computes with."""
    if not key.endswith(("proj_in.weight", "proj_out.weight")):
        return tensor
    if is_linear and tensor.ndim == 4:
        return tensor[:, :, 0, 0].contiguous()
    return tensor[:, :, None, None] if not is_linear and tensor.ndim == 2 else tensor


def unet_file_state(model: UNetBase, *, tree_is_diffusers: bool) -> dict[str, Tensor]:
    """The weights under the names of files, without a prefix."""
    state = model.state_dict()
    return diffusers_to_original(state) if tree_is_diffusers else dict(state)
