"""HunyuanVideo, and SkyReels V1, whose models are of the same kind."""

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
    OtherScript,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)
from library.families.stream_parts import STREAM_PARTS

FAMILY = FamilyRecord(
    name="hunyuan_video",
    title="HunyuanVideo",
    prefix="hv_",
    page="docs/hv_train_network.md",
    scripts={
        "full": OtherScript(
            name="hv_train", options=frozenset({"trainable_modules"}),
            foreign={
                **dict.fromkeys(
                    ("use_pinned_memory_for_block_swap", "block_swap_h2d_only"),
                    "an option of hv_train_network; --blocks_to_swap does it by itself",
                ),
                "flash3": "an option of hv_train_network; attention is computed by torch (--sdpa)",
                "use_safetensors": "files are safetensors unless --save_model_as says otherwise",
            },
        )
    },
    place=90,
    family="library.training.wiring.hunyuan_video:HunyuanVideoFamily",
    denoisers=("HYVideoDiffusionTransformer",),
    targets="networks.lora_hunyuan_video:TARGETS",
    pipeline="library.generation.hunyuan_video_pipeline:HunyuanVideoPipeline",
    pictures="hv_generate_video.py",
    image_script="library.generation.hunyuan_video_inference:SCRIPT",
    tiny=(
        TinyModel(
            name="hunyuan_video",
            title="HunyuanVideo",
            build="library.tiny_models.hunyuan_video_tiny:build_tiny_hunyuan_video",
            options=("--live_encoding",),
        ),
    ),
    latent_colours=GROUP_T4F8C16,
    latents=LatentSpec(
        channels=16, spatial_stride=8, temporal_stride=4, patch=2, fingerprint="hunyuan-video-t4f8c16", clips=True
    ),
    bucket_step=16,
    caches=CacheNames(latents="_hv.safetensors", text="_hv_te.safetensors"),
    clips=ClipFacts(short="hv", long="hunyuan_video", fps=24.0),
    conditioning=(
        TextKey("llm", encoders=(0,)),
        TextKey("llm_mask", rank=1, dtype="int64"),
        TextKey("clipL", rank=1, encoders=(1,)),
        TextKey("clipL_mask", rank=1, dtype="int64"),
    ),
    samples=SampleDefaults(
        256, 16,
        {"sample_steps": 20, "guidance_scale": 6.0, "cfg_scale": 1.0, "discrete_flow_shift": 14.5, "frame_count": 1},
        reads=frozenset({"image_path", "sample_sampler", "sigma_table"}),
    ),
    model_kinds=(
        ModelKind(
            name="hunyuan_video",
            wanted="a HunyuanVideo denoiser (mp_rank_00_model_states.pt, hunyuan_video_t2v_720p_bf16.safetensors)",
            subfolder="transformer",
            base_version="hunyuan_video",
            modelspec="hunyuan-video",
            signatures=(
                Signature(
                    title="a HunyuanVideo denoiser",
                    contains=("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
                    ranks=(("img_in.proj.weight", 5),),
                    detail="library.families.hunyuan_video:detail",
                    priority=10,
                ),
                Signature(
                    title="a HunyuanVideo denoiser",
                    has=("double_blocks.0.img_attn.qkv.weight",),
                    ranks=(("img_in.proj.weight", 5),),
                    detail="library.families.hunyuan_video:detail",
                    layout="ComfyUI",
                    priority=11,
                ),
                Signature(
                    title="a HunyuanVideo denoiser",
                    has=(
                        "time_text_embed.text_embedder.linear_1.weight", "transformer_blocks.0.attn.add_k_proj.weight",
                    ),
                    ranks=(("x_embedder.proj.weight", 5),),
                    layout="diffusers",
                    priority=20,
                ),
            ),
        ),
        ModelKind(
            name="vae_hunyuan_video",
            role="vae",
            wanted="a HunyuanVideo autoencoder (hunyuan_video_vae_bf16.safetensors)",
            subfolder="vae",
            signatures=(
                Signature(
                    title="a HunyuanVideo autoencoder",
                    ranks=(("encoder.down_blocks.0.resnets.0.conv1.conv.weight", 5),),
                    priority=20,
                ),
                Signature(
                    title="a HunyuanVideo autoencoder",
                    ranks=(("encoder.down.0.block.0.conv1.conv.weight", 5),),
                    layout="ComfyUI",
                    priority=95,
                ),
            ),
        ),
    ),
    layouts="library.hunyuan_video_utils:LAYOUTS",
    adapters=AdapterFacts(
        title="HunyuanImage or HunyuanVideo", parts=("individual_token_refiner",), priority=61,
        shared_parts=STREAM_PARTS, widths=(3072,),
        base_versions=("hunyuan_video", "hunyuan-video"), modelspec=("hunyuan-video", "hunyuan_video"),
    ),
)


def detail(table: Any) -> str:
    """What the first layer says, of a KeyTable."""
    return "text to video" if table.size("img_in.proj.weight", 1) == 16 else "image to video"
