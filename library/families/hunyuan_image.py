"""HunyuanImage 2.1, plain and distilled."""

from __future__ import annotations

from typing import Any

from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    FamilyRecord,
    ModelKind,
    OtherScript,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)
from library.families.stream_parts import STREAM_PARTS

FAMILY = FamilyRecord(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    prefix="hunyuan_image_",
    page="docs/hunyuan_image_train_network.md",
    scripts={
        "full": OtherScript(
            name="hunyuan_image_train",
            options=frozenset(
                {
                    "fused_optimizer_groups", "blockwise_fused_optimizers", "mem_eff_save",
                    "skip_latents_validity_check", "double_blocks_to_swap", "single_blocks_to_swap",
                }
            ),
        )
    },
    place=80,
    family="library.training.wiring.hunyuan_image:HunyuanImageFamily",
    denoisers=("HYImageDiffusionTransformer",),
    targets="networks.lora_hunyuan_image:TARGETS",
    pipeline="library.generation.hunyuan_image_pipeline:HunyuanImagePipeline",
    pictures="hunyuan_image_minimal_inference.py",
    tiny=(
        TinyModel(
            name="hunyuan_image",
            title="HunyuanImage 2.1",
            build="library.tiny_models.hunyuan_image_tiny:build_tiny_hunyuan_image",
            network_module="networks.lora_hunyuan_image",
        ),
    ),
    latents=LatentSpec(channels=64, spatial_stride=32, fingerprint="hunyuan-image-f32c64"),
    bucket_step=32,
    caches=CacheNames(latents="_hi.npz", text="_hi_te.npz"),
    conditioning=(
        TextKey("vlm_embed", encoders=(0,), mask="vlm_mask"),
        TextKey("vlm_mask", rank=1, dtype="int64", mask="vlm_mask"),
        TextKey("byt5_embed", encoders=(1,), mask="byt5_mask"),
        TextKey("byt5_mask", rank=1, dtype="int64", mask="byt5_mask"),
        TextKey("ocr_mask", rank=0, dtype="bool"),
    ),
    samples=SampleDefaults(
        512, 32, {"sample_steps": 20, "scale": 3.5, "flow_shift": 5.0},
        reads=frozenset({"guidance_scale", "sample_sampler", "sigma_table"}),
    ),
    model_kinds=(
        ModelKind(
            name="hunyuan_image",
            wanted="a HunyuanImage 2.1 denoiser (hunyuanimage2.1_bf16.safetensors)",
            subfolder="transformer",
            base_version="hunyuan-image-2.1",
            modelspec="hunyuan-image-2.1",
            signatures=(
                Signature(
                    title="a HunyuanImage 2.1 denoiser",
                    has=("byt5_in.fc1.weight",),
                    ranks=(("img_in.proj.weight", 4),),
                    detail="library.families.hunyuan_image:detail",
                    priority=20,
                ),
                Signature(
                    title="a HunyuanImage 2.1 denoiser",
                    has=("byt5_in.fc1.weight", "double_blocks.0.img_attn.qkv.weight"),
                    ranks=(("img_in.proj.weight", 4),),
                    detail="library.families.hunyuan_image:detail",
                    layout="ComfyUI",
                    priority=21,
                ),
                Signature(
                    title="a HunyuanImage 2.1 denoiser",
                    has=("context_embedder_2.linear_1.weight", "transformer_blocks.0.attn.add_k_proj.weight"),
                    layout="diffusers",
                    priority=20,
                ),
            ),
        ),
        ModelKind(
            name="vae_hunyuan_image",
            role="vae",
            wanted="a HunyuanImage 2.1 autoencoder (hunyuan_image_2.1_vae_fp16.safetensors)",
            subfolder="vae",
            layouts="library.hunyuan_image_utils:VAE_LAYOUTS",
            signatures=(
                Signature(
                    title="a HunyuanImage autoencoder",
                    has=("encoder.down.0.block.0.norm1.weight",),
                    contains=("encoder.down.5.",),
                    priority=90,
                ),
                Signature(
                    title="a HunyuanImage autoencoder",
                    has=("encoder.down_blocks.0.conv1.weight", "encoder.mid_block.attentions.0.to_q.weight"),
                    ranks=(("encoder.down_blocks.0.conv1.weight", 4),),
                    layout="diffusers",
                    priority=90,
                ),
            ),
        ),
    ),
    layouts="library.hunyuan_image_utils:LAYOUTS",
    adapters=AdapterFacts(
        title="HunyuanImage or HunyuanVideo",
        parts=STREAM_PARTS,
        # the others are called as in FLUX.1, with underscores or in the names of diffusers
        shared_parts=("double_blocks", "single_blocks", "transformer_blocks"),
        widths=(3584,),
        priority=60,
        base_versions=("hunyuan-image", "hunyuan_image"),
        modelspec=("hunyuan-image", "hunyuan_image"),
    ),
)


def detail(table: Any) -> str:
    """What the names say of a denoiser in the original layout or under ComfyUI's names, of a KeyTable."""
    kinds = [
        name for name, part in (("guidance", "guidance_in."), ("mean flow", "time_r_in."))
        if any(table.has(f"{part}{first}.weight") for first in ("mlp.0", "in_layer"))
    ]  # fmt: skip
    kind = f"distilled ({' and '.join(kinds)}), " if kinds else ""
    return f"{kind}{table.count('double_blocks.{}.')} double and {table.count('single_blocks.{}.')} single blocks"
