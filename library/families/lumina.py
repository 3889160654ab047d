"""Lumina-Image 2.0: how its files are recognised and cached."""

from __future__ import annotations

from typing import Any

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

_NAMES = ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")

FAMILY = FamilyRecord(
    name="lumina",
    title="Lumina-Image 2.0",
    place=70,
    latents=LatentSpec(channels=16, spatial_stride=8, patch=2, fingerprint="ldm-f8c16"),
    bucket_step=16,
    caches=CacheNames(latents="_lumina.npz", text="_lumina_te.npz"),
    conditioning=(
        TextKey("hidden_state", dtype="float32", encoders=(0,), is_sized=True),
        TextKey("input_ids", rank=1, dtype="int64", is_sized=True),
        TextKey("attention_mask", rank=1, dtype="int64", is_sized=True),
    ),
    samples=SampleDefaults(1024, 8, {"sample_steps": 36, "scale": 3.5, "cfg_trunc_ratio": 0.25, "renorm_cfg": 1.0}),
    model_kinds=(
        ModelKind(
            name="lumina2",
            signatures=(
                Signature(
                    title="a Lumina-Image 2.0 denoiser",
                    has=_NAMES,
                    sizes=(("cap_embedder.1.weight", 0, (2304,)),),
                    priority=10,
                ),
            ),
        ),
        ModelKind(
            name="nextdit",
            role="relative",
            signatures=(
                Signature(
                    title="a NextDiT denoiser that is not Lumina-Image 2.0",
                    has=_NAMES,
                    detail="library.families.lumina:width",
                ),
            ),
        ),
    ),
    adapters=AdapterFacts(
        title="Lumina-Image 2.0", parts=("noise_refiner", "context_refiner", "_attention_qkv"), priority=15
    ),
)


def width(table: Any) -> str:
    """How a relative differs, of a KeyTable."""
    return f"width {table.size('cap_embedder.1.weight', 0)}, Lumina has 2304"
