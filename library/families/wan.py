"""Wan 2.1 and 2.2. Qwen-Image and others use the autoencoder."""

from __future__ import annotations

from typing import Any

from library.families.latent_colours import RMS_T4F8C16
from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    ClipFacts,
    EncoderFile,
    FamilyRecord,
    ModelKind,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)

_TINY = "library.tiny_models.wan_tiny"
_NETWORK = "networks.lora_wan"
_LIVE = ("--live_encoding",)

FAMILY = FamilyRecord(
    name="wan",
    title="Wan",
    prefix="wan_",
    page="docs/wan_train_network.md",
    place=95,
    family="library.training.wiring.wan:WanFamily",
    denoisers=("WanModel",),
    targets=f"{_NETWORK}:TARGETS",
    pipeline="library.generation.wan_pipeline:WanPipeline",
    pictures="wan_generate_video.py",
    image_script="library.generation.wan_inference:SCRIPT",
    tiny=(
        TinyModel(
            name="wan", title="Wan 2.1, text to video", build=f"{_TINY}:build_tiny_wan", network_module=_NETWORK,
            options=_LIVE,
        ),
        TinyModel(
            name="wan_i2v", title="Wan 2.1, first frame to video", build=f"{_TINY}:build_tiny_wan_i2v",
            network_module=_NETWORK, options=_LIVE, first_frame=True,
        ),
        TinyModel(
            name="wan22", title="Wan 2.2, first frame to video, two experts", build=f"{_TINY}:build_tiny_wan22",
            network_module=_NETWORK, options=_LIVE, first_frame=True,
        ),
    ),
    latent_colours=RMS_T4F8C16,
    latents=LatentSpec(
        channels=16, spatial_stride=8, temporal_stride=4, patch=2, fingerprint="wan-f8c16", clips=True,
        joins_references=True,
    ),
    bucket_step=16,
    clips=ClipFacts(short="wan", long="wan", fps=16.0, one_frame=True),
    caches=CacheNames(latents="_wan.safetensors", text="_wan_te.safetensors"),
    conditioning=(TextKey("t5", encoders=(0,), varlen=True),),
    weighted_texts={"t5": 0},
    samples=SampleDefaults(
        256, 16, {"sample_steps": 20, "frame_count": 1},
        reads=frozenset(
            {
                "cfg_scale", "guidance_scale", "discrete_flow_shift", "image_path", "end_image_path",
                "control_image_path", "control_video_path", "one_frame", "sample_sampler", "sigma_table",
            }
        ),
    ),
    model_kinds=(
        ModelKind(
            name="wan",
            wanted="a Wan 2.1 or 2.2 denoiser (wan2.1_t2v_14B_bf16.safetensors)",
            subfolder="transformer",
            base_version="wan",
            modelspec="wan2.1",
            signatures=(
                Signature(
                    title="a Wan denoiser",
                    has=("blocks.0.self_attn.norm_q.weight",),
                    ranks=(("patch_embedding.weight", 5),),
                    detail="library.families.wan:detail",
                ),
                Signature(
                    title="a Wan denoiser",
                    has=("blocks.0.attn1.norm_q.weight", "condition_embedder.time_proj.weight"),
                    ranks=(("patch_embedding.weight", 5),),
                    detail="library.families.wan:detail",
                    layout="diffusers",
                ),
            ),
        ),
        ModelKind(
            name="vae_wan",
            role="vae",
            wanted="a Qwen-Image / Wan 2.1 autoencoder (qwen_image_vae.safetensors)",
            subfolder="vae",
            signatures=(
                Signature(
                    title="a Wan or Qwen-Image autoencoder",
                    has=("encoder.downsamples.0.residual.0.gamma",),
                    priority=30,
                ),
                Signature(
                    title="a Wan or Qwen-Image autoencoder",
                    ranks=(("encoder.down_blocks.0.conv1.weight", 5), ("quant_conv.weight", 5)),
                    layout="diffusers",
                    priority=30,
                ),
            ),
        ),
    ),
    layouts="library.wan_utils:LAYOUTS",
    encoder_files=(EncoderFile(option="t5", title="umT5"),),
    adapters=AdapterFacts(
        title="Wan",
        # those of other families with such blocks end in _proj
        pattern=r"^([a-z_.]*[._])?(?<!transformer_)blocks[._]\d+[._]"
        r"((self|cross)_attn[._](q|k|v|o|k_img|v_img)|attn[12][._](to|add)_\w+([._]0)?|ffn[._]\w*)\.",
        base_versions=("wan",),
        modelspec=("wan",),
        ai_toolkit="dotted",
    ),
)


def detail(table: Any) -> str:
    """Size and use, of a KeyTable."""
    size = {1536: "1.3B", 5120: "14B"}.get(table.size("patch_embedding.weight", 0) or 0, "")
    channels = table.size("patch_embedding.weight", 1)
    vision = ("img_emb.proj.1.weight", "condition_embedder.image_embedder.ff.net.0.proj.weight")
    positions = ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")
    if channels != 48 and any(map(table.has, vision)):
        use = "image to video" + (", first and last frame" if any(map(table.has, positions)) else "")
    else:
        use = {36: "2.2 image to video", 48: "control"}.get(channels or 16, "text to video")
    return f"{size} {use}".strip()
