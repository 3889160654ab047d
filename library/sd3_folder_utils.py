"""SD3 and SD3.5 as folders of diffusers: both layouts of the denoiser, and the other parts of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from library.checkpoints.layout_rules import DenoiserLayouts, PipelineLayout, PipelinePart, PipelineTokenizer, Rule
from library.checkpoints.ldm_folder import flow_vae_config, t5_config, text_config
from library.checkpoints.loading import count_blocks
from library.checkpoints.sd3_convert import denoiser_rules
from library.components.text_encoder_utils import CLIP_G
from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from library.sd3_models import SD3Params
from library.sd3_utils import (
    FILE_PREFIX,
    FILE_PREFIXES,
    SUBFOLDERS,
    inspect_encoder,
    inspect_sd3,
    inspect_vae_sd3,
)

_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def _rules_of(names: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of a denoiser with the blocks of these names, in either layout."""
    return denoiser_rules(max(count_blocks(names, prefix) for prefix in ("joint_blocks.", "transformer_blocks.")))


def _config_of_diffusers(params: SD3Params) -> dict[str, Any]:
    """config.json of SD3Transformer2DModel."""
    return {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": params.patch_size,
        "in_channels": params.in_channels, "out_channels": params.out_channels, "num_layers": params.depth,
        "attention_head_dim": params.head_dim, "num_attention_heads": params.num_heads,
        "joint_attention_dim": params.context_in, "caption_projection_dim": params.hidden_size,
        "pooled_projection_dim": params.adm_in_channels, "pos_embed_max_size": params.pos_embed_max_size,
        "dual_attention_layers": list(params.x_block_self_attn_layers),
        "qk_norm": "rms_norm" if params.qk_norm == "rms" else None,
    }  # fmt: skip


def _text_part(slot: str, tokenizer: PipelineTokenizer) -> PipelinePart:
    is_t5 = slot == "t5xxl"

    def config(path: str) -> dict[str, Any]:
        values = inspect_encoder(slot, path)
        return t5_config(values) if is_t5 else text_config(values, has_projection=True)

    return PipelinePart(
        SUBFOLDERS[slot], (FILE_PREFIXES[slot], f"text_encoders.{slot}."),
        ("transformers", "T5EncoderModel" if is_t5 else "CLIPTextModelWithProjection"), config, tokenizer,
        passes=is_t5, needs_projection=not is_t5,
    )  # fmt: skip


def _clip_tokenizer(folder: str, pad_token: str | None) -> PipelineTokenizer:
    return PipelineTokenizer(
        folder, "CLIPTokenizer",
        lambda given, cache_dir, path: load_clip_tokenizer(given, cache_dir, pad_token=pad_token, option="--tokenizer"),
    )  # fmt: skip


_T5_TOKENIZER = PipelineTokenizer(
    "tokenizer_3", "T5TokenizerFast",
    lambda given, cache_dir, path: load_t5_tokenizer(None, cache_dir, path, max_length=256), is_needed=False,
)  # fmt: skip
_PARTS = (
    PipelinePart(
        SUBFOLDERS["vae"], (FILE_PREFIXES["vae"], "vae."), ("diffusers", "AutoencoderKL"),
        lambda path: flow_vae_config(inspect_vae_sd3(path).params),
    ),
    _text_part("clip_l", _clip_tokenizer("tokenizer", None)),
    _text_part("clip_g", _clip_tokenizer("tokenizer_2", CLIP_G.pad)),
    _text_part("t5xxl", _T5_TOKENIZER),
)  # fmt: skip
LAYOUTS = DenoiserLayouts(
    inspect_sd3, _rules_of, _config_of_diffusers,
    pipeline=PipelineLayout(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", lambda params: _SCHEDULER, _PARTS,
        places={"transformer": FILE_PREFIX, **{part.folder: part.prefixes[0] for part in _PARTS}},
    ),
)  # fmt: skip
