"""Chroma, a variant of FLUX.1 that `--model_type chroma` chooses in the scripts of that family."""

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

_APPROXIMATOR = "distilled_guidance_layer.in_proj.weight"

FAMILY = FamilyRecord(
    name="chroma",
    title="Chroma",
    page="docs/chroma_train_network.md",
    scripts={
        "full": OtherScript(
            name="flux_train",
            page_name="chroma_train",
            options=frozenset(
                {
                    "fused_optimizer_groups", "blockwise_fused_optimizers", "mem_eff_save",
                    "skip_latents_validity_check", "double_blocks_to_swap", "single_blocks_to_swap",
                }
            ),
        )
    },
    place=60,
    family="library.training.wiring.chroma:ChromaFamily",
    denoisers=("Chroma",),
    targets="networks.lora_flux:CHROMA_TARGETS",
    pipeline="library.generation.chroma_pipeline:ChromaPipeline",
    pictures="flux_minimal_inference.py",
    image_script="library.generation.chroma_inference:SCRIPT",
    tiny=(
        TinyModel(
            name="chroma",
            title="Chroma",
            build="library.tiny_models.chroma_tiny:build_tiny_chroma",
            network_module="networks.lora_flux",
            options=("--model_type=chroma",),
        ),
    ),
    latent_colours=AE_F8C16,
    latents=LatentSpec(channels=16, spatial_stride=8, patch=2, fingerprint="ldm-f8c16"),
    bucket_step=16,
    caches=CacheNames(latents="_flux.npz", text="_flux_te.npz"),
    conditioning=(
        TextKey("l_pooled", rank=0, dtype="float32", constant=0.0),
        TextKey("t5_out", encoders=(0,), is_sized=True),
        TextKey("txt_ids", dtype="float32", is_sized=True),
        TextKey("t5_attn_mask", rank=1, dtype="int64", is_sized=True),
    ),
    text_flags=("apply_t5_attn_mask",),
    weighted_texts={"t5_out": 0},
    samples=SampleDefaults(512, 16, {"sample_steps": 20, "scale": 1.0}, reads=frozenset({"sample_sampler", "sigma_table"})),
    model_kinds=(
        ModelKind(
            name="chroma",
            wanted="a Chroma denoiser (a chroma safetensors file, or the transformer folder of a diffusers model)",
            subfolder="transformer",
            base_version="chroma",
            modelspec="chroma",
            signatures=(
                Signature(
                    title="a Chroma denoiser", has=(_APPROXIMATOR,), detail="library.families.chroma:detail",
                    priority=60
                ),
                Signature(
                    title="a Chroma denoiser",
                    has=(_APPROXIMATOR, "transformer_blocks.0.attn.add_k_proj.weight"),
                    detail="library.families.chroma:detail",
                    layout="diffusers",
                    priority=61,
                ),
            ),
        ),
    ),
    encoder_files=(EncoderFile(option="t5xxl", title="T5-XXL"),),
    layouts="library.chroma_utils:LAYOUTS",
    adapters=AdapterFacts(title="FLUX.1 or Chroma", base_versions=("chroma",), modelspec=("chroma",)),
    adapters_of="flux",
    variant_of=("flux", "model_type", "chroma"),
)


def detail(table: Any) -> str:
    """What the names of a denoiser in either layout say, of a KeyTable."""
    double = table.count("double_blocks.{}.") or table.count("transformer_blocks.{}.attn.add_k_proj")
    single = table.count("single_blocks.{}.") or table.count("single_transformer_blocks.{}.")
    return f"{double} double and {single} single blocks"
