"""Files of the Wan 2.1 / Qwen-Image autoencoder: both key namings, sizes from shapes, loading."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.loading import (
    CheckpointFiles,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    strip_prefix,
)
from library.components.wan_vae_models import LATENTS_MEAN, WanVAE, WanVAEParams
from library.core.errors import CheckpointError
from library.safetensors_utils import cast_floats

VAE_PREFIXES = ("first_stage_model.", "vae.")
VAE_ROOTS = ("encoder", "decoder", "conv1", "conv2", "quant_conv", "post_quant_conv")
MARKS = ("encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "conv2.weight")

_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_TOP = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_SIDE = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}


@dataclass(frozen=True)
class WanVAEInfo:
    """What the headers of an autoencoder file tell."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: WanVAEParams


def is_diffusers_naming(keys: Mapping[str, Any]) -> bool:
    return "encoder.conv_in.weight" in keys and "quant_conv.weight" in keys


def convert_diffusers_vae_to_wan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under their original names."""
    per_level = count_blocks(state, "decoder.up_blocks.0.resnets.") + 1  # residual blocks and the resampler
    return {_original_name(key, per_level): tensor for key, tensor in state.items()}


def _original_name(key: str, per_level: int) -> str:
    path, _, leaf = key.rpartition(".")
    if path in _TOP:
        return f"{_TOP[path]}.{leaf}"
    side, _, rest = path.partition(".")
    if rest in _SIDE:
        return f"{side}.{_SIDE[rest]}.{leaf}"
    match = re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)", rest)
    if match and match[1] in _MIDDLE:
        return f"{side}.{_MIDDLE[match[1]]}.{_RESIDUAL.get(match[2], match[2])}.{leaf}"
    match = re.fullmatch(r"down_blocks\.(\d+)\.(.+)", rest)
    if match:
        return f"{side}.downsamples.{match[1]}.{_RESIDUAL.get(match[2], match[2])}.{leaf}"
    match = re.fullmatch(r"up_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", rest)
    if match:
        return (
            f"{side}.upsamples.{int(match[1]) * per_level + int(match[2])}.{_RESIDUAL.get(match[3], match[3])}.{leaf}"
        )
    match = re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", rest)
    if match:
        return f"{side}.upsamples.{(int(match[1]) + 1) * per_level - 1}.{match[2]}.{leaf}"
    return key


def inspect_wan_vae(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> WanVAEInfo:
    """Recognise the autoencoder from headers; `config` overrides names of WanVAEParams. CheckpointError when it is
    another."""
    source = open_checkpoint(path, "vae")
    prefix = find_prefix(source.shapes, VAE_PREFIXES, VAE_ROOTS, source.path, "autoencoder")
    stripped = strip_prefix(source.shapes, prefix)
    is_diffusers = is_diffusers_naming(stripped)
    shapes = convert_diffusers_vae_to_wan(stripped) if is_diffusers else stripped
    check_marks(shapes, MARKS, source.path, "Wan 2.1 / Qwen-Image autoencoder")
    from_folder = {name: source.config[name] for name in ("latents_mean", "latents_std") if source.config.get(name)}
    given = {**from_folder, **source.config_of("vae"), **(config or {})}
    params = build_params(WanVAEParams, _infer(shapes, given, source.path), given, source.path)
    return WanVAEInfo(source, prefix, is_diffusers, params)


def _infer(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    try:
        dim, channels = shapes["encoder.conv1.weight"].shape[:2]
        z_dim = shapes["conv2.weight"].shape[0]
        widths, temporal, blocks = _levels(shapes)
    except KeyError as error:
        raise CheckpointError(f"{path} does not fit WanVAE: {error.args[0]} is missing") from error
    if len(set(blocks)) != 1 or any(width % dim for width in widths):
        raise CheckpointError(
            f"{path} does not fit WanVAE: levels of {blocks} residual blocks with the widths {widths}"
        )
    if z_dim != len(LATENTS_MEAN) and not {"latents_mean", "latents_std"} <= set(given):
        raise CheckpointError(
            f"{path} has {z_dim} latent channels; their mean and deviation are known for {len(LATENTS_MEAN)} only."
            " Give latents_mean and latents_std as arguments or under model_config in the file's metadata"
        )
    return {
        "dim": dim,
        "in_channels": channels,
        "z_dim": z_dim,
        "dim_mult": tuple(width // dim for width in widths),
        "num_res_blocks": blocks[0],
        "temporal_downsample": tuple(temporal),
    }


def _levels(shapes: Mapping[str, Tensor]) -> tuple[list[int], list[bool], list[int]]:
    """Per level of the encoder: width, whether the resampler after it halves the frames, number of residual blocks."""
    widths, temporal, blocks = [], [], [0]
    for number in range(count_blocks(shapes, "encoder.downsamples.")):
        place = f"encoder.downsamples.{number}."
        if f"{place}resample.1.weight" in shapes:
            temporal.append(f"{place}time_conv.weight" in shapes)
            blocks.append(0)
            continue
        if not blocks[-1]:
            widths.append(shapes[f"{place}residual.2.weight"].shape[0])
        blocks[-1] += 1
    return widths, temporal, blocks


def load_wan_vae(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
) -> WanVAE:
    """Load the autoencoder from a file in either naming or a diffusers folder. CheckpointError when the file does not
    fit."""
    info = inspect_wan_vae(path, config)
    keys = [
        key
        for key in info.source.shapes
        if key.startswith(info.prefix) and key[len(info.prefix) :].split(".")[0] in VAE_ROOTS
    ]
    state = strip_prefix(info.source.tensors(device, disable_mmap, keys), info.prefix)
    state = convert_diffusers_vae_to_wan(state) if info.is_diffusers else state
    model = build_on_meta(lambda: WanVAE(info.params))
    check_state(model, state, os.fspath(path))
    assign_state(model, {key: cast_floats(tensor, dtype, key) for key, tensor in state.items()})
    return model
