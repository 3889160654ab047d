"""FramePack checkpoints: what a file holds, loading and saving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from library.components.hunyuan_stream_utils import DENOISER_PREFIXES
from library.components.llama_clip_utils import WIDTH, add_size_problems, encoder_sizes
from library.components.siglip_utils import inspect_siglip
from library.core.errors import Problems
from library.custom_offloading_utils import stream_swap_problem
from library.fp8_optimization_utils import FP8_BLOCK, FP8_STORAGE, scaled_fp8, store_linears_in_fp8, use_scales
from library.framepack_models import FramePackParams, HunyuanVideoTransformer3DModelPacked
from library.safetensors_utils import cast_all, save_file_atomic

logger = logging.getLogger(__name__)

DENOISER_ROOTS = (
    "x_embedder", "clean_x_embedder", "context_embedder", "image_projection", "time_text_embed", "transformer_blocks",
    "single_transformer_blocks", "norm_out", "proj_out",
)  # fmt: skip
CLASS_NAME = "HunyuanVideoTransformer3DModelPacked"


@dataclass(frozen=True)
class FramePackInfo:
    """What the headers of a denoiser checkpoint tell. `dtypes`: types of the stored weights."""

    source: CheckpointFiles
    prefix: str
    params: FramePackParams
    dtypes: frozenset[torch.dtype]

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in DENOISER_ROOTS]


def inspect_framepack(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> FramePackInfo:
    """Recognise a FramePack denoiser from headers alone; `config` overrides hyper-parameters by the names of
    FramePackParams.

    CheckpointError when the file is damaged or no such denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, DENOISER_PREFIXES, DENOISER_ROOTS, source.path, "denoiser")
    own = part_of(source.shapes, (prefix,), DENOISER_ROOTS)
    shapes = {key: tensor for key, tensor in own.items() if not is_blob(key)}
    marks = ("clean_x_embedder.proj_2x.weight", "image_projection.up.weight", "transformer_blocks.0.attn.to_q.weight")
    check_marks(shapes, marks, source.path, "FramePack denoiser")
    given = {**_config_of_folder(source.config), **source.model_config, **(config or {})}
    params = build_params(FramePackParams, _infer(shapes, given, source.path), given, source.path)
    check_state(build_on_meta(lambda: HunyuanVideoTransformer3DModelPacked(params)), shapes, source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in shapes.items() if key.endswith(".weight"))
    return FramePackInfo(source, prefix, params, dtypes)


def _config_of_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json beside the file says that shapes do not."""
    return {name: config[name] for name in ("rope_theta", "rope_axes_dim") if name in config}


def _infer(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes; head size h gives the rotary axes (h/8, 7h/16, 7h/16)."""

    def size(key: str, dim: int) -> int:
        return size_of(shapes, key, dim, path, CLASS_NAME)

    hidden, head_dim = size("x_embedder.proj.weight", 0), size("transformer_blocks.0.attn.norm_q.weight", 0)
    inferred: dict[str, Any] = {
        "in_channels": size("x_embedder.proj.weight", 1),
        "num_attention_heads": hidden // head_dim,
        "attention_head_dim": head_dim,
        "num_layers": count_blocks(shapes, "transformer_blocks."),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks."),
        "num_refiner_layers": count_blocks(shapes, "context_embedder.token_refiner.refiner_blocks."),
        "mlp_ratio": size("transformer_blocks.0.ff.net.0.proj.weight", 0) / hidden,
        "text_embed_dim": size("context_embedder.proj_in.weight", 1),
        "pooled_projection_dim": size("time_text_embed.text_embedder.linear_1.weight", 1),
        "image_proj_dim": size("image_projection.up.weight", 1),
        "patch": tuple(size("x_embedder.proj.weight", dim) for dim in (2, 3, 4)),
        "time_embed_dim": size("time_text_embed.timestep_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }
    if "rope_axes_dim" not in given:
        side = head_dim * 7 // 16
        inferred["rope_axes_dim"] = (head_dim - 2 * side, side, side)
    return inferred


def load_framepack(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    fp8_scaled: bool = False,
    transform: Transform | None = None,
) -> HunyuanVideoTransformer3DModelPacked:
    """Load a denoiser; its sizes come from the file.

    `fp8_scaled` keeps the large matrices of the blocks in 8 bits, each 64 inputs of a row with a scale of their own;
    `dtype` float8_e4m3fn the weights of all linear layers, without scales, and the rest in bfloat16; None keeps the
    file's own types. `transform` may change the tensors as they are read. CheckpointError when the file does not fit.
    """
    info = inspect_framepack(path, config)
    params = info.params
    logger.info(
        "loading FramePack from %s (%d double and %d single blocks)", path, params.num_layers, params.num_single_layers
    )
    store = info.source.storing(torch.bfloat16 if fp8_scaled and dtype == FP8_STORAGE else dtype, info.keys)
    scales: dict[str, Tensor] = {}

    def cast(key: str, tensor: Tensor) -> Tensor:
        name = key[len(info.prefix) :]
        if fp8_scaled and name.endswith(".weight") and tensor.ndim == 2 and takes_scale(name.removesuffix(".weight")):
            weight, scales[name.removesuffix(".weight")] = scaled_fp8(tensor, FP8_BLOCK)
            return weight
        return store(key, tensor)

    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    model = build_on_meta(lambda: HunyuanVideoTransformer3DModelPacked(params))
    check_state(model, state, os.fspath(path))
    assign_state(model, state)
    store_linears_in_fp8(model)
    for layer, scale in scales.items():
        use_scales(model.get_submodule(layer), scale)
    return model


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the double and single blocks but those
    of the norms."""
    return path.startswith(("transformer_blocks.", "single_transformer_blocks.")) and "norm" not in path


def fitting_problems(
    denoiser: Callable[[], FramePackParams],
    *,
    text_encoder1: str | None = None,
    text_encoder2: str | None = None,
    vae: str | None = None,
    image_encoder: str | None = None,
    model: str,
    blocks_to_swap: int,
) -> list[str]:
    """What is wrong with each file, sizes of encoders and autoencoder against the denoiser's, and a block swap that its
    depth does not allow, from headers. Files that are None are not looked at; `denoiser` reads the header of
    `model`."""
    problems = Problems()
    params = problems.attempt(denoiser)
    text, pooled, channels, width = (
        None if params is None else getattr(params, name)
        for name in ("text_embed_dim", "pooled_projection_dim", "in_channels", "image_proj_dim")
    )
    sizes = encoder_sizes(text_encoder1, text_encoder2, vae, text=text, pooled=pooled, channels=channels)
    pictures = ("image_encoder", image_encoder, WIDTH, lambda: inspect_siglip(image_encoder).hidden_size, width)
    add_size_problems(problems, [*sizes, pictures], model)
    staying = HunyuanVideoTransformer3DModelPacked.blocks_that_stay
    swap = params and stream_swap_problem(blocks_to_swap, params.num_layers, params.num_single_layers, staying)
    return [*problems.messages, swap] if swap else problems.messages


def denoiser_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    return part_of(state, DENOISER_PREFIXES, DENOISER_ROOTS)


def save_framepack(
    model: HunyuanVideoTransformer3DModelPacked,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser. Hyper-parameters that its shapes do not tell go into `model_config`."""
    state = cast_all({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    save_file_atomic(state, path, {"format": "pt", **(metadata or {}), **model_config_metadata(model)})


def model_config_metadata(model: HunyuanVideoTransformer3DModelPacked) -> dict[str, str]:
    """{"model_config": JSON} for a model whose hyper-parameters do not follow from its shapes, else nothing."""
    return config_metadata(
        model.params, lambda: build_params(FramePackParams, _infer(model.state_dict(), {}, ""), {}, "")
    )
