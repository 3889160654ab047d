"""Files of denoisers with double and single stream blocks, which the families of Hunyuan share: what a file holds,
loading and saving it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.hunyuan_convert import StreamNames
from library.checkpoints.layout_rules import Rule, to_original
from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
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
from library.components.hunyuan_stream_models import StreamDenoiser, StreamParams
from library.fp8_optimization_utils import FP8_STORAGE, scaled_fp8, store_linears_in_fp8, use_scales
from library.safetensors_utils import cast_all, save_file_atomic

DENOISER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
    "module.",
    "transformer.",
)


@dataclass(frozen=True, kw_only=True)
class StreamKind:
    """What is special to a family's denoiser. `marks`: tensors by which it is known; `sizes`: (size of a tensor by key
    and dimension, names -> shapes) -> its own hyper-parameters; `of_diffusers`: names in a config.json of diffusers ->
    ours, of what shapes do not tell."""

    title: str
    model: type[StreamDenoiser]
    params: type[StreamParams]
    names: StreamNames
    roots: tuple[str, ...]
    marks: tuple[str, ...]
    sizes: Callable[[Callable[[str, int], int], Mapping[str, Tensor]], dict[str, Any]]
    axes: Callable[[int], tuple[int, ...]]
    """size of a head -> its rotary axes"""
    of_diffusers: Mapping[str, str]


@dataclass(frozen=True)
class StreamInfo:
    """What the headers of a denoiser checkpoint tell. `rules`: by which its names become the original ones, none where
    they are; `dtypes`: types of the stored weights."""

    kind: StreamKind
    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    rules: tuple[Rule, ...]
    params: Any
    dtypes: frozenset[torch.dtype]

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in self.kind.roots]


def inspect_streams(kind: StreamKind, path: Source, config: Mapping[str, Any] | None = None) -> StreamInfo:
    """Recognise a family's denoiser from headers alone; `config` overrides hyper-parameters by the names of its record.

    CheckpointError when the file is damaged or no such denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, kind.roots, source.path, "denoiser")
    stripped = strip_prefix(source.shapes, prefix)
    own = {key: tensor for key, tensor in stripped.items() if key.split(".")[0] in kind.roots and not is_blob(key)}
    rules = kind.names.rules_of_names(own)
    shapes = to_original(own, rules)
    check_marks(shapes or stripped, kind.marks, source.path, f"{kind.title} denoiser")
    told = {ours: source.config[theirs] for theirs, ours in kind.of_diffusers.items() if theirs in source.config}
    given = {**told, **source.model_config, **(config or {})}
    params = build_params(kind.params, inferred_params(kind, shapes, given, source.path), given, source.path)
    check_state(build_on_meta(lambda: kind.model(params)), shapes, source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in shapes.items() if key.endswith(".weight"))
    return StreamInfo(kind, source, prefix, kind.names.is_diffusers(stripped), tuple(rules), params, dtypes)


def inferred_params(
    kind: StreamKind, shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Hyper-parameters from shapes; the size of a head gives the rotary axes where `given` does not."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, kind.model.__name__)

    hidden, head_dim = size("img_in.proj.weight", 0), size("double_blocks.0.img_attn_q_norm.weight", 0)
    inferred: dict[str, Any] = {
        "in_channels": size("img_in.proj.weight", 1),
        "hidden_size": hidden,
        "num_heads": hidden // head_dim,
        "depth": count_blocks(shapes, "double_blocks."),
        "depth_single": count_blocks(shapes, "single_blocks."),
        "refiner_depth": count_blocks(shapes, "txt_in.individual_token_refiner.blocks."),
        "mlp_ratio": size("double_blocks.0.img_mlp.fc1.weight", 0) / hidden,
        "text_dim": size("txt_in.input_embedder.weight", 1),
        "time_embed_dim": size("time_in.mlp.0.weight", 1),
        "guidance_embed": any(key.startswith("guidance_in.") for key in shapes),
        **kind.sizes(size, shapes),
    }
    if "rope_dim_list" not in given:
        inferred["rope_dim_list"] = kind.axes(head_dim)
    return inferred


def load_streams(
    info: StreamInfo,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    *,
    fp8_scaled: bool = False,
    transform: Transform | None = None,
) -> Any:
    """The denoiser of a file in any layout.

    `fp8_scaled` keeps the large matrices of the blocks in 8 bits, each row with a scale of its own; `dtype`
    float8_e4m3fn the weights of all linear layers, without scales, and the rest in bfloat16; None keeps the file's own
    types. `transform` may change the tensors as they are read. CheckpointError when the file does not fit.
    """
    store = info.source.storing(torch.bfloat16 if fp8_scaled and dtype == FP8_STORAGE else dtype, info.keys)
    rule_of = {part: rule for rule in info.rules for part in rule.parts}
    scales: dict[str, Tensor] = {}

    def cast(key: str, tensor: Tensor) -> Tensor:
        name = key[len(info.prefix) :]
        ours = rule_of[name].original if name in rule_of else name
        if fp8_scaled and takes_scale(ours.removesuffix(".weight")) and ours.endswith(".weight"):
            weight, scales[name] = scaled_fp8(tensor)
            return weight
        return store(key, tensor)

    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    state, scales = to_original(state, info.rules), to_original(scales, info.rules)
    model = build_on_meta(lambda: info.kind.model(info.params))
    check_state(model, state, info.source.path)
    assign_state(model, state)
    store_linears_in_fp8(model)
    for name, scale in scales.items():
        use_scales(model.get_submodule(name.removesuffix(".weight")), scale)
    return model


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the double and single blocks."""
    return path.startswith(("double_blocks.", "single_blocks.")) and not path.endswith("_norm")


def stream_state(kind: StreamKind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return kind.names.to_original(part_of(state, DENOISER_PREFIXES, kind.roots))


def save_streams(
    kind: StreamKind,
    model: StreamDenoiser,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    state = cast_all({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    save_file_atomic(state, path, {"format": "pt", **(metadata or {}), **stream_metadata(kind, model)})


def stream_metadata(kind: StreamKind, model: StreamDenoiser) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(
        model.params, lambda: build_params(kind.params, inferred_params(kind, model.state_dict(), {}, ""), {}, "")
    )
