"""FLUX.1 dev and schnell."""

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

FAMILY = FamilyRecord(
    name="flux",
    title="FLUX.1",
    prefix="flux_",
    page="docs/flux_train_network.md",
    scripts={
        "full": OtherScript(
            name="flux_train",
            options=frozenset(
                {
                    "fused_optimizer_groups", "blockwise_fused_optimizers", "mem_eff_save",
                    "skip_latents_validity_check", "double_blocks_to_swap", "single_blocks_to_swap",
                }
            ),
        ),
        "textual_inversion": OtherScript(name="flux_train_textual_inversion"),
        "control_net": OtherScript(
            name="flux_train_control_net",
            options=frozenset(
                {
                    "fused_optimizer_groups", "blockwise_fused_optimizers", "mem_eff_save",
                    "skip_latents_validity_check", "double_blocks_to_swap", "single_blocks_to_swap", "use_safetensors",
                }
            ),
            defaults={"save_model_as": None},
        ),
    },
    place=10,
    family="library.training.wiring.flux:FluxFamily",
    denoisers=("Flux",),
    targets="networks.lora_flux:TARGETS",
    pipeline="library.generation.flux_pipeline:FluxPipeline",
    control_nets="library.flux_control_net_utils:CONTROL_NETS",
    pictures="flux_minimal_inference.py",
    image_script="library.generation.flux_inference:SCRIPT",
    tiny=(
        TinyModel(
            name="flux",
            title="FLUX.1 dev",
            build="library.tiny_models.flux_tiny:build_tiny_flux",
            network_module="networks.lora_flux",
        ),
    ),
    latent_colours=AE_F8C16,
    latents=LatentSpec(channels=16, spatial_stride=8, patch=2, fingerprint="ldm-f8c16"),
    bucket_step=16,
    caches=CacheNames(latents="_flux.npz", text="_flux_te.npz"),
    conditioning=(
        TextKey("l_pooled", rank=1, encoders=(0,)),
        TextKey("t5_out", encoders=(1,), is_sized=True),
        TextKey("txt_ids", dtype="float32", is_sized=True),
        TextKey("t5_attn_mask", rank=1, dtype="int64", is_sized=True),
    ),
    text_flags=("apply_t5_attn_mask",),
    learning_encoders=(0,),
    foreign_text="their pooled captions (l_pooled) were computed with gelu in the place of quick_gelu",
    weighted_texts={"t5_out": 1},
    embedding_keys=("clip_l", "t5xxl"),
    samples=SampleDefaults(512, 16, {"sample_steps": 20, "scale": 1.0, "guidance_scale": 3.5}, reads=frozenset({"sample_sampler", "sigma_table"})),
    model_kinds=(
        ModelKind(
            name="flux",
            wanted="a FLUX.1 denoiser (flux1-dev.safetensors, or the transformer folder of a diffusers model)",
            subfolder="transformer",
            base_version="flux1",
            modelspec="flux-1-dev",
            signatures=(
                Signature(
                    title="a FLUX.1 denoiser",
                    has=("double_blocks.0.img_attn.norm.query_norm.scale",),
                    detail="library.families.flux:detail",
                ),
                Signature(
                    title="a FLUX.1 denoiser",
                    has=("transformer_blocks.0.attn.add_k_proj.weight", "single_transformer_blocks.0.proj_mlp.weight"),
                    detail="library.families.flux:diffusers_detail",
                    layout="diffusers",
                ),
            ),
        ),
        ModelKind(
            name="flux_controlnet",
            role="relative",
            wanted="a FLUX.1 ControlNet",
            script="control_net",
            subfolder="controlnet",
            layouts="library.flux_control_net_utils:LAYOUTS",
            signatures=(
                Signature(
                    title="a FLUX.1 ControlNet", contains=("controlnet_blocks.0.", "double_blocks.0."), priority=90
                ),
                Signature(
                    title="a FLUX.1 ControlNet", has=("controlnet_x_embedder.weight",), layout="diffusers", priority=90
                ),
            ),
        ),
        ModelKind(
            name="vae_flux",
            role="vae",
            wanted="a FLUX.1 or SD3 autoencoder (ae.safetensors)",
            subfolder="vae",
            signatures=(
                Signature(
                    title="a FLUX.1 or SD3 autoencoder",
                    has=("encoder.down.0.block.0.norm1.weight",),
                    detail="library.checkpoints.recognition:latent_channels",
                ),
                Signature(
                    title="a FLUX.1 or SD3 autoencoder",
                    has=("encoder.down_blocks.0.resnets.0.conv1.weight",),
                    detail="library.checkpoints.recognition:latent_channels",
                    layout="diffusers",
                ),
            ),
        ),
    ),
    layouts="library.flux_folder_utils:LAYOUTS",
    encoder_files=(EncoderFile(option="clip_l", title="CLIP-L"), EncoderFile(option="t5xxl", title="T5-XXL")),
    adapters=AdapterFacts(
        title="FLUX.1 or Chroma",
        parts=("double_blocks_", "single_blocks_", "double_blocks.", "single_blocks.", "single_transformer_blocks"),
        priority=50,
        released_widths=(3072,),
        aliases=("flux1",),
        base_versions=("flux",),
        modelspec=("flux-1",),
        ai_toolkit="diffusers",
        has_xlabs=True,
    ),
)


def detail(table: Any) -> str:
    """What the shapes of a denoiser in the original layout say, of a KeyTable."""
    kind = "dev type" if table.has("guidance_in.in_layer.weight") else "schnell type"
    width = table.size("img_in.weight", 1)
    special = {384: ", fill model", 128: ", depth or canny model"}.get(width or 64, "")
    return f"{kind}{special}, {table.count('double_blocks.{}.')} double and {table.count('single_blocks.{}.')} single blocks"


def diffusers_detail(table: Any) -> str:
    """The same in the layout of diffusers."""
    kind = "dev type" if table.contains("time_text_embed.guidance_embedder.") else "schnell type"
    return (
        f"{kind}, {table.count('transformer_blocks.{}.attn.add_k_proj')} double"
        f" and {table.count('single_transformer_blocks.{}.')} single blocks"
    )
