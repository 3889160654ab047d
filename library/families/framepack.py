"""FramePack, and F1, which makes clips forwards: the denoiser of HunyuanVideo that makes a clip section by section."""

from __future__ import annotations

from typing import Any

from library.families.latent_colours import GROUP_T4F8C16
from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    ClipFacts,
    FamilyRecord,
    ModelKind,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)

FAMILY = FamilyRecord(
    name="framepack",
    title="FramePack",
    prefix="fpack_",
    page="docs/fpack_train_network.md",
    place=92,
    family="library.training.wiring.framepack:FramePackFamily",
    denoisers=("HunyuanVideoTransformer3DModelPacked",),
    targets="networks.lora_framepack:TARGETS",
    pipeline="library.generation.framepack_pipeline:FramePackPipeline",
    pictures="fpack_generate_video.py",
    image_script="library.generation.framepack_inference:SCRIPT",
    tiny=(
        TinyModel(
            name="framepack",
            title="FramePack",
            build="library.tiny_models.framepack_tiny:build_tiny_framepack",
            network_module="networks.lora_framepack",
            options=("--live_encoding",),
        ),
    ),
    latent_colours=GROUP_T4F8C16,
    latents=LatentSpec(
        channels=16, spatial_stride=8, temporal_stride=4, patch=2, fingerprint="framepack-t4f8c16", clips=True
    ),
    bucket_step=16,
    caches=CacheNames(latents="_fp.safetensors", text="_fp_te.safetensors"),
    clips=ClipFacts(short="fp", long="framepack", fps=30.0, one_frame=True, sections=True),
    conditioning=(
        TextKey("llama_vec", encoders=(0,)),
        TextKey("llama_attention_mask", rank=1, dtype="bool"),
        TextKey("clip_l_pooler", rank=1, encoders=(1,)),
    ),
    samples=SampleDefaults(
        256, 16, {"sample_steps": 25, "guidance_scale": 10.0, "cfg_scale": 1.0, "frame_count": 1},
        reads=frozenset(
            {"discrete_flow_shift", "image_path", "end_image_path", "control_image_path", "one_frame", "sample_sampler", "sigma_table"}
        ),
    ),
    model_kinds=(
        ModelKind(
            name="framepack",
            wanted="a FramePack denoiser (FramePackI2V_HY_bf16.safetensors, FramePack_F1_I2V_HY_20250503.safetensors)",
            subfolder="transformer",
            base_version="framepack",
            modelspec="framepack",
            signatures=(
                Signature(
                    title="a FramePack denoiser",
                    has=("clean_x_embedder.proj_2x.weight",),
                    detail="library.families.framepack:detail",
                    priority=50,
                ),
            ),
        ),
    ),
    adapters=AdapterFacts(
        title="FramePack", shared_parts=("transformer_blocks",),
        # names of kohya files; with dots they are those of other families in diffusers
        pattern=r"^lora_unet_(single_)?transformer_blocks_\d+_(attn|ff|proj|norm)", base_versions=("framepack",), modelspec=("framepack",),
    ),
)  # fmt: skip


def detail(table: Any) -> str:
    """How deep it is, of a KeyTable."""
    double, single = table.count("transformer_blocks.{}."), table.count("single_transformer_blocks.{}.")
    return f"{double} double and {single} single blocks"
