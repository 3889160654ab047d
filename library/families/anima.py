"""Anima, and the Cosmos-Predict2 denoisers that it is made of."""

from __future__ import annotations

from library.families.latent_colours import RMS_T4F8C16
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

_ADALN = "blocks.0.adaln_modulation_self_attn.1.weight"

FAMILY = FamilyRecord(
    name="anima",
    title="Anima",
    prefix="anima_",
    page="docs/anima_train_network.md",
    scripts={
        "full": OtherScript(name="anima_train", options=frozenset({"skip_latents_validity_check"})),
    },
    place=40,
    family="library.training.wiring.anima:AnimaFamily",
    denoisers=("Anima",),
    targets="networks.lora_anima:TARGETS",
    pipeline="library.generation.anima_pipeline:AnimaPipeline",
    pictures="anima_minimal_inference.py",
    image_script="library.generation.anima_inference:SCRIPT",
    tiny=(
        TinyModel(name="anima", title="Anima", build="library.tiny_models.anima_tiny:build_tiny_anima", network_module="networks.lora_anima"),
    ),
    latent_colours=RMS_T4F8C16,
    latents=LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, patch=2, fingerprint="wan-f8c16"),
    bucket_step=16,
    caches=CacheNames(latents="_anima.npz", text="_anima_te.npz"),
    conditioning=(
        TextKey("prompt_embeds", encoders=(0,), is_sized=True),
        TextKey("attn_mask", rank=1, dtype="int64", is_sized=True),
        TextKey("t5_input_ids", rank=1, dtype="int32"),
        TextKey("t5_attn_mask", rank=1, dtype="int32"),
        TextKey("caption_dropout_rate", rank=0, dtype="float32", constant=0.0),
    ),
    samples=SampleDefaults(512, 16, {"sample_steps": 30, "scale": 7.5, "flow_shift": 3.0}, reads=frozenset({"sample_sampler", "sigma_table"})),
    model_kinds=(
        ModelKind(
            name="anima",
            wanted="an Anima denoiser (anima-base-v1.0.safetensors)",
            subfolder="transformer",
            base_version="anima",
            modelspec="anima-preview",
            signatures=(Signature(title="an Anima denoiser", has=(_ADALN,), contains=("llm_adapter.",), priority=10),),
        ),
        ModelKind(
            name="cosmos",
            wanted="an Anima denoiser without its LLM adapter",
            base_version="anima",
            modelspec="anima-preview",
            signatures=(Signature(title="a Cosmos-Predict2 denoiser", has=(_ADALN,)),),
        ),
    ),
    wanted_denoiser="an Anima denoiser (anima-base-v1.0.safetensors), with or without its LLM adapter",
    encoder_files=(EncoderFile(option="qwen3", title="Qwen3"),),
    adapters=AdapterFacts(
        title="Anima",
        parts=(
            "llm_adapter", "adaln_modulation", "cross_attn_output_proj", "self_attn_output_proj", "mlp_layer1",
            "mlp.layer1", "mlp_layer2",
            "mlp.layer2",
        ),
        priority=10,
        # attention layers: those of text encoders stand in `layers`, those of Wan are q, k, v
        pattern=r"(^|[_.])blocks[_.]\d+[_.](self|cross)_attn[_.]([qkv]_proj|output_proj|[qkv]_norm)\.",
        base_versions=("anima",),
        modelspec=("anima",),
        ai_toolkit="dotted",
    ),
)  # fmt: skip
