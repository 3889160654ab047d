"""Stable Diffusion 3 and 3.5: how their files are recognised and cached."""

from __future__ import annotations

from typing import Any

from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    EncoderFile,
    FamilyRecord,
    ModelKind,
    OtherScript,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)

_QKV, _PATCHES = "joint_blocks.0.x_block.attn.qkv.weight", "pos_embed.proj.weight"


def _kind(name: str, version: str, priority: int, own: tuple[str, ...] = ()) -> ModelKind:
    """One release. `own`: a tensor of the first block in either layout by which a later release is known."""
    original, other = own or ("", "")
    return ModelKind(
        name=name,
        wanted="an SD3 or SD3.5 model",
        subfolder="transformer",
        base_version=version,
        modelspec=f"stable-diffusion-3-{version}",
        signatures=(
            Signature(
                title="a Stable Diffusion 3 checkpoint",
                has=(_QKV, *([f"joint_blocks.0.x_block.{original}"] if own else [])),
                detail="library.families.sd3:detail",
                priority=priority,
            ),
            Signature(
                title="a Stable Diffusion 3 denoiser",
                has=(
                    "transformer_blocks.0.attn.add_k_proj.weight",
                    _PATCHES,
                    *([f"transformer_blocks.0.{other}"] if own else []),
                ),
                layout="diffusers",
                priority=priority,
            ),
        ),
    )


FAMILY = FamilyRecord(
    name="sd3",
    title="Stable Diffusion 3",
    prefix="sd3_",
    page="docs/sd3_train_network.md",
    scripts={
        "full": OtherScript(
            name="sd3_train",
            options=frozenset(
                {
                    "train_text_encoder", "train_t5xxl", "use_t5xxl_cache_only",
                    "learning_rate_te1", "learning_rate_te2", "learning_rate_te3", "stop_text_encoder_training",
                    "num_last_block_to_freeze",
                    "fused_optimizer_groups", "blockwise_fused_optimizers", "skip_latents_validity_check",
                }
            ),
            text_switches={2: "train_t5xxl"},
            text_files={0: "_clip_l", 1: "_clip_g", 2: "_t5xxl"},
        ),
        "textual_inversion": OtherScript(name="sd3_train_textual_inversion"),
    },
    place=50,
    family="library.training.wiring.sd3:Sd3Family",
    denoisers=("MMDiT",),
    targets="networks.lora_sd3:TARGETS",
    pipeline="library.generation.sd3_pipeline:Sd3Pipeline",
    pictures="sd3_minimal_inference.py",
    image_script="library.generation.sd3_inference:SCRIPT",
    tiny=(
        TinyModel(
            name="sd3", title="Stable Diffusion 3.5 medium", build="library.tiny_models.sd3_tiny:build_tiny_sd3",
            network_module="networks.lora_sd3", options=("--t5xxl_max_token_length=48",),
        ),
    ),
    latents=LatentSpec(channels=16, spatial_stride=8, patch=2, fingerprint="ldm-f8c16"),
    bucket_step=16,
    caches=CacheNames(latents="_sd3.npz", text="_sd3_te.npz"),
    conditioning=(
        TextKey("lg_out", encoders=(0, 1)),
        TextKey("t5_out", encoders=(2,), is_sized=True),
        TextKey("lg_pooled", rank=1, encoders=(0, 1)),
        TextKey("clip_l_attn_mask", rank=1, dtype="int64"),
        TextKey("clip_g_attn_mask", rank=1, dtype="int64"),
        TextKey("t5_attn_mask", rank=1, dtype="int64", is_sized=True),
    ),
    text_flags=("apply_lg_attn_mask", "apply_t5_attn_mask"),
    learning_encoders=(0, 1),
    weighted_texts={"lg_out": 0, "t5_out": 2},
    embedding_keys=("clip_l", "clip_g", "t5xxl"),
    samples=SampleDefaults(512, 8, {"sample_steps": 30, "scale": 7.5}, reads=frozenset({"sample_sampler", "sigma_table"})),
    layouts="library.sd3_folder_utils:LAYOUTS",
    autoencoders={"vae_flux": "vae_sd3"},
    wanted_denoiser="an SD3 or SD3.5 model (sd3.5_medium.safetensors, or a diffusers folder)",
    model_kinds=(
        _kind("sd3", "medium", 0),
        _kind("sd35_large", "5-large", 1, ("attn.ln_q.weight", "attn.norm_q.weight")),
        _kind("sd35_medium", "5-medium", 2, ("attn2.qkv.weight", "attn2.to_q.weight")),
    ),
    encoder_files=(
        EncoderFile(option="clip_l", title="CLIP-L"), EncoderFile(option="clip_g", title="CLIP-G"),
        EncoderFile(option="t5xxl", title="T5-XXL"),
    ),
    adapters=AdapterFacts(
        title="Stable Diffusion 3",
        parts=("joint_blocks",),
        priority=40,
        base_versions=("medium", "5-medium", "5-large"),
        modelspec=("stable-diffusion-3-",),
    ),
)


def detail(table: Any) -> str:
    """Which release it is, of a KeyTable."""
    if not table.has("joint_blocks.0.x_block.attn.ln_q.weight"):
        return "SD3 medium"
    return "SD3.5 medium" if table.contains("x_block.attn2.") else "SD3.5 large"
