"""HunyuanImage 2.1: how its files are recognised, cached and renamed."""

from __future__ import annotations

from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    FamilyRecord,
    ModelKind,
    SampleDefaults,
    Signature,
    TextKey,
)

FAMILY = FamilyRecord(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    place=80,
    layer_names="networks.files.hunyuan_image_names",
    latents=LatentSpec(channels=64, spatial_stride=32, fingerprint="hunyuan-image-f32c64"),
    bucket_step=32,
    caches=CacheNames(latents="_hi.npz", text="_hi_te.npz"),
    conditioning=(
        TextKey("vlm_embed", encoders=(0,)),
        TextKey("vlm_mask", rank=1, dtype="int64"),
        TextKey("byt5_embed", encoders=(1,)),
        TextKey("byt5_mask", rank=1, dtype="int64"),
        TextKey("ocr_mask", rank=0, dtype="bool"),
    ),
    samples=SampleDefaults(512, 16, {"sample_steps": 20, "scale": 3.5, "flow_shift": 5.0}),
    model_kinds=(
        ModelKind(
            name="hunyuan_image",
            signatures=(
                Signature(
                    title="a HunyuanImage 2.1 denoiser",
                    has=("byt5_in.fc1.weight",),
                    ranks=(("img_in.proj.weight", 4),),
                    priority=20,
                ),
            ),
        ),
        ModelKind(
            name="vae_hunyuan_image",
            role="vae",
            signatures=(
                Signature(
                    title="a HunyuanImage autoencoder",
                    has=("encoder.down.0.block.0.norm1.weight",),
                    contains=("encoder.down.5.",),
                    priority=90,
                ),
            ),
        ),
    ),
    adapters=AdapterFacts(
        title="HunyuanImage or HunyuanVideo",
        parts=("double_blocks_0_img_mlp_fc1", "double_blocks.0.img_mlp.fc1"),
        priority=60,
        base_versions=("hunyuan-image", "hunyuan_image"),
        modelspec=("hunyuan-image", "hunyuan_image"),
    ),
)
