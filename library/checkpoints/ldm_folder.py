"""Folders in the layout of diffusers: the configuration files of U-Nets, autoencoders and text encoders, made of what
our loaders know of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.components.ldm_models import AutoEncoderParams
from library.components.unet_models import UNetParams

TIMES = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "trained_betas": None,
}  # fmt: skip
_TIME_IDS = 6
"""numbers of SDXL's size conditioning"""


def unet_config(params: UNetParams, pooled_width: int | None, sample_size: int) -> dict[str, Any]:
    """config.json of UNet2DConditionModel. `pooled_width`: of the pooled text that SDXL takes, None without. diffusers
    calls the numbers of heads attention_head_dim."""
    depths = [depth or 1 for depth in params.transformer_depth]
    depths[-1] = params.transformer_depth[-1] or params.middle_depth
    heads = list(params.heads)
    downs = [("CrossAttnDownBlock2D" if has else "DownBlock2D") for has in params.attention_levels]
    ups = [("CrossAttnUpBlock2D" if has else "UpBlock2D") for has in reversed(params.attention_levels)]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel", "sample_size": sample_size, "in_channels": params.in_channels,
        "out_channels": params.out_channels, "block_out_channels": list(params.channels),
        "layers_per_block": params.num_res_blocks,
        "down_block_types": downs, "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": ups,
        "cross_attention_dim": params.context_dim, "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "norm_num_groups": params.norm_groups,
        "use_linear_projection": params.use_linear_projection, "upcast_attention": params.upcast_attention,
    }  # fmt: skip
    if params.time_embed_dim != 4 * params.channels[0]:
        config["time_embedding_dim"] = params.time_embed_dim
    if params.adm_in_channels is not None and pooled_width is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (params.adm_in_channels - pooled_width) // _TIME_IDS,
            "projection_class_embeddings_input_dim": params.adm_in_channels,
        }  # fmt: skip
    return config


def vae_config(params: AutoEncoderParams, sample_size: int) -> dict[str, Any]:
    """config.json of AutoencoderKL. SDXL's weights overflow in float16, which `force_upcast`, the default, prevents."""
    levels = len(params.ch_mult)
    return {
        "_class_name": "AutoencoderKL", "in_channels": params.in_channels, "out_channels": params.out_ch,
        "latent_channels": params.z_channels,
        "block_out_channels": [params.ch * factor for factor in params.ch_mult],
        "layers_per_block": params.num_res_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": params.norm_groups, "scaling_factor": params.scaling_factor, "sample_size": sample_size,
    }  # fmt: skip


def flow_vae_config(params: AutoEncoderParams) -> dict[str, Any]:
    """config.json of AutoencoderKL for models whose latents have a shift and pass no further convolution."""
    own = {"shift_factor": params.shift_factor, "use_quant_conv": False, "use_post_quant_conv": False}
    return {**vae_config(params, 1024), **own}


def text_config(values: Mapping[str, Any], has_projection: bool) -> dict[str, Any]:
    """config.json of a CLIP text encoder, from ClipInfo.values."""
    name = "CLIPTextModelWithProjection" if has_projection else "CLIPTextModel"
    return {
        "architectures": [name], "model_type": "clip_text_model", "vocab_size": values["vocab"],
        "hidden_size": values["width"],
        "intermediate_size": values["ff"], "num_hidden_layers": values["layers"],
        "num_attention_heads": values["heads"],
        "max_position_embeddings": values["max_len"], "hidden_act": values["act"],
        "projection_dim": values["projection"] or values["width"],
        "bos_token_id": max(values["eos"] - 1, 0), "eos_token_id": values["eos"], "pad_token_id": values["eos"],
        "layer_norm_eps": 1e-5,
    }  # fmt: skip


def t5_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of T5EncoderModel, from inspect_t5xxl."""
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": values["vocab_size"],
        "d_model": values["d_model"], "d_kv": values["d_kv"], "d_ff": values["d_ff"],
        "num_layers": values["num_layers"], "num_heads": values["num_heads"],
        "relative_attention_num_buckets": values["buckets"],
        "relative_attention_max_distance": values["max_distance"], "layer_norm_epsilon": values["eps"],
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "is_encoder_decoder": True, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip


def scheduler_config(is_sdxl: bool, prediction_type: str, is_zero_snr: bool) -> dict[str, Any]:
    """scheduler_config.json: Euler for SDXL, DDIM for the others, with the noise levels that all of them were trained
    on."""
    kind = {
        "prediction_type": "v_prediction" if prediction_type == "v" else "epsilon",
        "rescale_betas_zero_snr": is_zero_snr,
    }
    if is_sdxl:
        return {
            "_class_name": "EulerDiscreteScheduler",
            **TIMES,
            **kind,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        }
    return {"_class_name": "DDIMScheduler", **TIMES, **kind, "clip_sample": False, "set_alpha_to_one": False}


def model_index(is_sdxl: bool) -> dict[str, Any]:
    """model_index.json: which class reads which sub-folder."""
    parts: dict[str, Any] = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler" if is_sdxl else "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    if is_sdxl:
        second = {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        return {"_class_name": "StableDiffusionXLPipeline", **parts, **second, "force_zeros_for_empty_prompt": True}
    absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {"_class_name": "StableDiffusionPipeline", **parts, **absent}
