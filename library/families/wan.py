"""Wan 2.1 and 2.2: how their files are recognised. Qwen-Image and others use the autoencoder."""

from __future__ import annotations

from typing import Any

from library.families.record import AdapterFacts, FamilyRecord, ModelKind, Signature

FAMILY = FamilyRecord(
    name="wan",
    title="Wan",
    place=95,
    model_kinds=(
        ModelKind(
            name="wan",
            signatures=(
                Signature(
                    title="a Wan denoiser",
                    has=("blocks.0.self_attn.norm_q.weight",),
                    ranks=(("patch_embedding.weight", 5),),
                    detail="library.families.wan:detail",
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
    adapters=AdapterFacts(title="Wan", parts=("blocks_0_self_attn", "blocks.0.self_attn", "blocks_0_cross_attn")),
)


def detail(table: Any) -> str:
    """Size and use, of a KeyTable."""
    size = {1536: "1.3B", 5120: "14B"}.get(table.size("patch_embedding.weight", 0) or 0, "")
    channels = table.size("patch_embedding.weight", 1)
    if table.has("img_emb.proj.1.weight"):
        use = "image to video" + (", first and last frame" if table.has("img_emb.emb_pos") else "")
    else:
        use = {36: "2.2 image to video", 48: "control"}.get(channels or 16, "text to video")
    return f"{size} {use}".strip()
