"""Files of the causal video autoencoder: the original names, which are those of diffusers, and the names inside of
ComfyUI, which files have that were saved there; sizes from shapes, loading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.layout_rules import Rule, to_original, with_kinds
from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    count_blocks,
    find_prefix,
    open_checkpoint,
    size_of,
    strip_prefix,
)
from library.checkpoints.scaled_weights import is_blob
from library.components.hunyuan_vae_models import CausalVideoVAE, VideoAutoEncoderParams
from library.safetensors_utils import cast_floats

VAE_PREFIXES = ("first_stage_model.", "vae.")
VAE_ROOTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
MARKS = ("encoder.down_blocks.0.resnets.0.conv1.conv.weight", "decoder.conv_in.conv.weight", "quant_conv.weight")
COMFY_MARK = "encoder.down.0.block.0.conv1.conv.weight"

_RESNET = (
    *(Rule(name, (name,)) for name in ("norm1", "conv1.conv", "norm2", "conv2.conv")),
    Rule("conv_shortcut.conv", ("nin_shortcut.conv",)),
)
_ATTENTION = (
    Rule("group_norm", ("norm",)),
    *(Rule(f"to_{name}", (name,)) for name in "qkv"),
    Rule("to_out.0", ("proj_out",)),
)
_HALVES = (("encoder.", "down"), ("decoder.", "up"))


def comfy_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """The rules of an autoencoder under ComfyUI's names, where its decoder counts levels from the last; none of one
    under the original names."""
    if COMFY_MARK not in keys:
        return
    for half, way in _HALVES:
        yield from with_kinds(half, half, (Rule("conv_norm_out", ("norm_out",)),))
        for number in (0, 1):
            yield from with_kinds(f"{half}mid_block.resnets.{number}.", f"{half}mid.block_{number + 1}.", _RESNET)
        yield from with_kinds(f"{half}mid_block.attentions.0.", f"{half}mid.attn_1.", _ATTENTION)
        levels = count_blocks(keys, f"{half}{way}.")
        for level in range(levels):
            theirs = f"{half}{way}.{level if way == 'down' else levels - 1 - level}."
            ours = f"{half}{way}_blocks.{level}."
            for block in range(count_blocks(keys, f"{theirs}block.")):
                yield from with_kinds(f"{ours}resnets.{block}.", f"{theirs}block.{block}.", _RESNET)
            change = Rule(f"{way}samplers.0.conv.conv", (f"{way}sample.conv.conv",))
            yield from with_kinds(ours, theirs, (change,))


@dataclass(frozen=True)
class VideoAutoEncoderInfo:
    """What the headers of an autoencoder file tell. `rules`: by which its names become the original ones, none where
    they are."""

    source: CheckpointFiles
    prefix: str
    rules: tuple[Rule, ...]
    params: VideoAutoEncoderParams

    @property
    def keys(self) -> list[str]:
        """Those of the autoencoder, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in VAE_ROOTS and not is_blob(key)]

    def original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of its file under the original names, and in their shapes: projections of the attention may be
        convolutions with a kernel of one place."""
        renamed = to_original(strip_prefix(state, self.prefix), self.rules)
        flat = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
        return {key: tensor.flatten(1) if key.endswith(flat) else tensor for key, tensor in renamed.items()}


def inspect_hunyuan_vae(path: Source, config: Mapping[str, Any] | None = None) -> VideoAutoEncoderInfo:
    """Recognise the autoencoder from headers alone; `config` overrides by the names of VideoAutoEncoderParams.
    CheckpointError when it is another."""
    source = open_checkpoint(path, "vae")
    prefix = find_prefix(source.shapes, VAE_PREFIXES, VAE_ROOTS, source.path, "autoencoder")
    rules = tuple(comfy_rules(strip_prefix(source.shapes, prefix)))
    shapes = to_original(strip_prefix(source.shapes, prefix), rules)
    check_marks(shapes, MARKS, source.path, "causal video autoencoder (16 channels, 4 frames)")
    given = {**_folder_config(source.config), **source.config_of("vae"), **(config or {})}
    params = build_params(VideoAutoEncoderParams, _infer(shapes, source.path), given, source.path)
    info = VideoAutoEncoderInfo(source, prefix, rules, params)
    _checked_model(info, info.original({key: source.shapes[key] for key in info.keys}))
    return info


def _folder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of diffusers says that shapes do not."""
    names = {
        "norm_num_groups": "norm_num_groups", "scaling_factor": "scaling_factor",
        "temporal_compression_ratio": "time_compression_ratio",
        "spatial_compression_ratio": "spatial_compression_ratio",
    }  # fmt: skip
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def _infer(shapes: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, "CausalVideoVAE")

    levels = count_blocks(shapes, "encoder.down_blocks.")
    return {
        "in_channels": size("encoder.conv_in.conv.weight", 1),
        "block_out_channels": tuple(
            size(f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight", 0) for level in range(levels)
        ),
        "layers_per_block": count_blocks(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": size("decoder.conv_in.conv.weight", 1),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


def _checked_model(info: VideoAutoEncoderInfo, state: Mapping[str, Tensor]) -> CausalVideoVAE:
    """The module without weights; CheckpointError unless `state` fits."""
    model = build_on_meta(lambda: CausalVideoVAE(info.params))
    check_state(model, state, info.source.path)
    return model


def load_hunyuan_vae(
    path: Source,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    chunk_frames: int | None = None,
    tile_size: int | None = None,
) -> CausalVideoVAE:
    """Load the autoencoder from a file or a folder of diffusers; `chunk_frames`: frames that its convolutions compute
    at once; `tile_size`: pixels of a side of tiles in which larger frames are computed. CheckpointError when the file
    does not fit."""
    info = inspect_hunyuan_vae(path, config)
    state = info.original(info.source.tensors(device, disable_mmap, info.keys))
    model = _checked_model(info, state)
    assign_state(model, {key: cast_floats(tensor, dtype, key).contiguous() for key, tensor in state.items()})
    model.set_chunk_frames(chunk_frames)
    model.set_tile_size(tile_size)
    return model
