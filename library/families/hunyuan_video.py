"""HunyuanVideo: how its files are recognised."""

from __future__ import annotations

from typing import Any

from library.families.record import AdapterFacts, FamilyRecord, ModelKind, Signature

FAMILY = FamilyRecord(
    name="hunyuan_video",
    title="HunyuanVideo",
    place=90,
    model_kinds=(
        ModelKind(
            name="hunyuan_video",
            signatures=(
                Signature(
                    title="a HunyuanVideo denoiser",
                    contains=("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
                    ranks=(("img_in.proj.weight", 5),),
                    detail="library.families.hunyuan_video:detail",
                    priority=10,
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
    adapters=AdapterFacts(title="HunyuanImage or HunyuanVideo", parts=("individual_token_refiner",), priority=61),
)


def detail(table: Any) -> str:
    """What the first layer says, of a KeyTable."""
    return "text to video" if table.size("img_in.proj.weight", 1) == 16 else "image to video"
