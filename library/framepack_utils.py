"""FramePack checkpoints: what a file holds, loading and saving it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.denoisers import (
    DenoiserInfo,
    DenoiserKind,
    SizeOf,
    inspect_denoiser,
    load_denoiser,
    save_denoiser,
    state_of_denoiser,
)
from library.checkpoints.loading import Transform, count_blocks
from library.components.hunyuan_stream_utils import DENOISER_PREFIXES
from library.components.llama_clip_utils import WIDTH, add_size_problems, encoder_sizes
from library.components.siglip_utils import inspect_siglip
from library.core.errors import Problems
from library.custom_offloading_utils import stream_swap_problem
from library.fp8_optimization_utils import FP8_BLOCK
from library.framepack_models import FramePackParams, HunyuanVideoTransformer3DModelPacked

logger = logging.getLogger(__name__)

DENOISER_ROOTS = (
    "x_embedder", "clean_x_embedder", "context_embedder", "image_projection", "time_text_embed", "transformer_blocks",
    "single_transformer_blocks", "norm_out", "proj_out",
)  # fmt: skip


def _infer(size: SizeOf, shapes: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters from shapes; head size h gives the rotary axes (h/8, 7h/16, 7h/16)."""
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


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the double and single blocks but those
    of the norms."""
    return path.startswith(("transformer_blocks.", "single_transformer_blocks.")) and "norm" not in path


KIND = DenoiserKind(
    title="FramePack",
    model=HunyuanVideoTransformer3DModelPacked,
    params=FramePackParams,
    prefixes=DENOISER_PREFIXES,
    roots=DENOISER_ROOTS,
    marks=("clean_x_embedder.proj_2x.weight", "image_projection.up.weight", "transformer_blocks.0.attn.to_q.weight"),
    infer=_infer,
    takes_scale=takes_scale,
    scale_block=FP8_BLOCK,
    of_config={"rope_theta": "rope_theta", "rope_axes_dim": "rope_axes_dim"},
)


def inspect_framepack(path: str | os.PathLike, config: Mapping[str, Any] | None = None) -> DenoiserInfo:
    """Recognise a FramePack denoiser from headers alone; `config` overrides hyper-parameters by the names of
    FramePackParams.

    CheckpointError when the file is damaged or no such denoiser.
    """
    return inspect_denoiser(KIND, path, config)


def load_framepack(
    path: str | os.PathLike,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    config: Mapping[str, Any] | None = None,
    *,
    form: str | None = None,
    by_rows: bool = False,
    transform: Transform | None = None,
) -> HunyuanVideoTransformer3DModelPacked:
    """Load a denoiser; its sizes come from the file. As `load_denoiser` otherwise."""
    info = inspect_framepack(path, config)
    params = info.params
    logger.info(
        "loading FramePack from %s (%d double and %d single blocks)", path, params.num_layers, params.num_single_layers
    )
    return load_denoiser(info, dtype, device, disable_mmap, form=form, by_rows=by_rows, transform=transform)


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
    return state_of_denoiser(KIND, state)


def save_framepack(
    model: HunyuanVideoTransformer3DModelPacked,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser. Hyper-parameters that its shapes do not tell go into `model_config`."""
    save_denoiser(KIND, model, path, dtype, metadata)
