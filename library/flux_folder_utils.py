"""FLUX.1 and its variants as folders of diffusers: both layouts of the denoiser, and the other parts of a pipeline."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.checkpoints.flux_convert import rows_of, rules_of
from library.checkpoints.layout_rules import DenoiserLayouts, PipelineLayout, PipelinePart, PipelineTokenizer
from library.checkpoints.ldm_folder import flow_vae_config, t5_config, text_config
from library.components.ldm_utils import AE_PREFIXES
from library.components.text_encoder_utils import inspect_clip_l, inspect_t5xxl
from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from library.core.errors import CheckpointError
from library.flux_models import FluxParams, StreamParams
from library.flux_utils import (
    FLUX,
    StreamModelInfo,
    infer_flux,
    inspect_ae,
    inspect_stream_model,
    refuse_other_kinds,
    size_of,
)

FEED_FORWARD, THETA, TIME_WIDTH = 4, 10000, 256
"""of the classes of diffusers, which have no settings for them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FluxFileParams(FluxParams):
    """Those of a file that is rewritten, which may be a variant that takes more values than come out."""

    out_channels: int = 64


def _infer(shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    out_channels = size_of(shapes, "final_layer.linear.weight", 0, path, FLUX.title)
    return {**infer_flux(shapes, given, path), "out_channels": out_channels}


_FILES = dataclasses.replace(FLUX, params=FluxFileParams, refuse=refuse_other_kinds, infer=_infer)


def inspect_flux_file(path: str | os.PathLike) -> StreamModelInfo:
    """Recognise a FLUX.1 denoiser, the Fill, Depth and Canny variants too, from headers alone. CheckpointError for
    others."""
    return inspect_stream_model(path, None, _FILES)


def stream_config(params: StreamParams) -> dict[str, Any]:
    """What config.json says of any denoiser of this make. CheckpointError for what its class does not have."""
    if params.mlp_ratio != FEED_FORWARD or params.theta != THETA or not params.qkv_bias:
        raise CheckpointError(
            f"mlp_ratio is {params.mlp_ratio:g}, theta {params.theta:g}, qkv_bias {params.qkv_bias}; the class of"
            f" diffusers has {FEED_FORWARD}, {THETA} and True"
        )
    return {
        "patch_size": 1, "in_channels": params.in_channels, "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks, "attention_head_dim": params.head_dim,
        "num_attention_heads": params.num_heads, "joint_attention_dim": params.context_in_dim,
        "axes_dims_rope": list(params.axes_dim),
    }  # fmt: skip


def _config_of_diffusers(params: FluxFileParams) -> dict[str, Any]:
    """config.json of the transformer in a diffusers folder. CheckpointError for what its class does not have."""
    if params.time_embed_dim != TIME_WIDTH:
        raise CheckpointError(f"time_embed_dim is {params.time_embed_dim}; the class of diffusers has {TIME_WIDTH}")
    return {
        "_class_name": "FluxTransformer2DModel", **stream_config(params), "pooled_projection_dim": params.vec_in_dim,
        "guidance_embeds": params.guidance_embed,
        "out_channels": None if params.out_channels == params.in_channels else params.out_channels,
    }  # fmt: skip


def scheduler_config(is_shifted: bool) -> dict[str, Any]:
    """scheduler_config.json: noise levels by the number of tokens (dev), or even ones (schnell)."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "shift": 3.0 if is_shifted else 1.0, "use_dynamic_shifting": is_shifted, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096,
    }  # fmt: skip


CLIP_L_PART = PipelinePart(
    "text_encoder", ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."), ("transformers", "CLIPTextModel"),
    lambda path: text_config(inspect_clip_l(path), has_projection=False),
    PipelineTokenizer(
        "tokenizer", "CLIPTokenizer",
        lambda folder, cache_dir, path: load_clip_tokenizer(folder, cache_dir, option="--tokenizer"),
    ),
    left_out=("text_projection.weight",),
)  # fmt: skip
T5_PART = PipelinePart(
    "text_encoder_2", ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."), ("transformers", "T5EncoderModel"),
    lambda path: t5_config(inspect_t5xxl(path)),
    PipelineTokenizer(
        "tokenizer_2", "T5TokenizerFast", lambda folder, cache_dir, path: load_t5_tokenizer(None, cache_dir, path),
        is_needed=False,
    ),
    passes=True,
)  # fmt: skip
VAE_PART = PipelinePart(
    "vae", ("vae.", *(prefix for prefix in AE_PREFIXES if prefix != "vae.")), ("diffusers", "AutoencoderKL"),
    lambda path: flow_vae_config(inspect_ae(path).params),
)  # fmt: skip
LAYOUTS = DenoiserLayouts(
    inspect_flux_file, rules_of, _config_of_diffusers, rows_of=lambda params: rows_of(params.hidden_size),
    pipeline=PipelineLayout(
        "FluxPipeline", "FluxTransformer2DModel", lambda params: scheduler_config(params.guidance_embed),
        (VAE_PART, CLIP_L_PART, T5_PART), {"image_encoder": [None, None], "feature_extractor": [None, None]},
    ),
)  # fmt: skip
