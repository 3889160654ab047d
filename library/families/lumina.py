"""Lumina-Image 2.0."""

from __future__ import annotations

from typing import Any

from library.families.latent_colours import AE_F8C16
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

_NAMES = ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")
_WIDTHS = (2304, *range(8, 513))
"""of the released model, and of small ones made for trying"""

FAMILY = FamilyRecord(
    name="lumina",
    title="Lumina-Image 2.0",
    prefix="lumina_",
    page="docs/lumina_train_network.md",
    scripts={
        "full": OtherScript(
            name="lumina_train",
            options=frozenset(
                {
                    "fused_optimizer_groups", "blockwise_fused_optimizers", "mem_eff_save",
                    "skip_latents_validity_check",
                }
            ),
        )
    },
    place=70,
    family="library.training.wiring.lumina:LuminaFamily",
    denoisers=("NextDiT",),
    targets="networks.lora_lumina:TARGETS",
    pipeline="library.generation.lumina_pipeline:LuminaPipeline",
    pictures="lumina_minimal_inference.py",
    tiny=(
        TinyModel(
            name="lumina", title="Lumina-Image 2.0", build="library.tiny_models.lumina_tiny:build_tiny_lumina",
            network_module="networks.lora_lumina",
        ),
    ),
    latent_colours=AE_F8C16,
    latents=LatentSpec(channels=16, spatial_stride=8, patch=2, fingerprint="ldm-f8c16"),
    bucket_step=16,
    caches=CacheNames(latents="_lumina.npz", text="_lumina_te.npz"),
    conditioning=(
        TextKey("hidden_state", dtype="float32", encoders=(0,), is_sized=True),
        TextKey("input_ids", rank=1, dtype="int64", is_sized=True),
        TextKey("attention_mask", rank=1, dtype="int64", is_sized=True),
    ),
    learning_encoders=(0,),
    samples=SampleDefaults(
        1024, 8, {"sample_steps": 36, "scale": 3.5, "cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0, "flow_shift": 6.0},
        reads=frozenset({"sample_sampler", "sigma_table"}),
    ),
    model_kinds=(
        ModelKind(
            name="lumina2",
            wanted="a Lumina-Image 2.0 denoiser (lumina_2_model_bf16.safetensors, or a file or folder with all parts)",
            subfolder="transformer",
            base_version="lumina2",
            modelspec="lumina-2",
            signatures=(
                Signature(
                    title="a Lumina-Image 2.0 denoiser", has=_NAMES, sizes=(("cap_embedder.1.weight", 0, _WIDTHS),),
                    priority=10,
                ),
                Signature(
                    title="a Lumina-Image 2.0 denoiser",
                    has=("time_caption_embed.caption_embedder.1.weight", "noise_refiner.0.attn.to_q.weight"),
                    layout="diffusers",
                ),
            ),
        ),
        ModelKind(
            name="nextdit",
            role="relative",
            signatures=(
                Signature(
                    title="a NextDiT denoiser that is not Lumina-Image 2.0", has=_NAMES,
                    detail="library.families.lumina:width",
                ),
                Signature(
                    title="a NextDiT denoiser that is not Lumina-Image 2.0", has=(*_NAMES, "cap_pad_token"), priority=20
                ),
            ),
        ),
    ),
    layouts="library.lumina_utils:LAYOUTS",
    encoder_files=(EncoderFile(option="gemma2", title="Gemma 2"),),
    adapters=AdapterFacts(
        title="Lumina-Image 2.0",
        parts=("noise_refiner", "context_refiner", "_attention_qkv"),
        priority=15,
        # blocks in `layers` whose attention is no `self_attn` of a language model
        pattern=r"(^|[_.])layers[_.]\d+[_.](attention[_.](qkv|out)|attn[_.]to_|feed_forward[_.](w|linear_)[123])",
        aliases=("lumina2",),
        base_versions=("lumina",),
        modelspec=("lumina",),
        ai_toolkit="dotted",
    ),
)


def width(table: Any) -> str:
    """How a relative differs, of a KeyTable."""
    return f"width {table.size('cap_embedder.1.weight', 0)}, Lumina has 2304"
