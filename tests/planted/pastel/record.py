"""The facts."""

from __future__ import annotations

from library.families.latents import LatentSpec
from library.families.record import (
    AdapterFacts,
    CacheNames,
    EncoderFile,
    FamilyRecord,
    ModelKind,
    SampleDefaults,
    Signature,
    TextKey,
    TinyModel,
)

FAMILY = FamilyRecord(
    name="pastel",
    title="Pastel",
    prefix="pastel_",
    family="pastel.wiring:PastelFamily",
    denoisers=("PastelDenoiser",),
    targets="pastel.adapters:TARGETS",
    pipeline="pastel.pipeline:PastelPipeline",
    tiny=(TinyModel(name="pastel", title="Pastel", build="pastel.files:build_tiny_pastel"),),
    latents=LatentSpec(channels=4, spatial_stride=8, fingerprint="pastel-f8c4"),
    bucket_step=16,
    caches=CacheNames(latents="_pastel.npz", text="_pastel_te.npz"),
    conditioning=(
        TextKey("words", encoders=(0,), is_sized=True),
        TextKey("words_mask", rank=1, dtype="int64", is_sized=True),
    ),
    samples=SampleDefaults(64, 16, {"sample_steps": 2, "scale": 1.0}),
    model_kinds=(
        ModelKind(
            name="pastel",
            wanted="a Pastel denoiser",
            base_version="pastel",
            modelspec="pastel-1",
            signatures=(
                Signature(title="a Pastel denoiser", has=("strokes.0.mix.weight",), detail="pastel.record:strokes"),
            ),
        ),
        ModelKind(
            name="vae_pastel",
            role="vae",
            wanted="a Pastel autoencoder",
            signatures=(Signature(title="a Pastel autoencoder", has=("paper.weight", "ink.weight"), priority=10),),
        ),
        ModelKind(
            name="pastel_words",
            role="text_encoder",
            wanted="the words of Pastel",
            signatures=(Signature(title="the words of Pastel", has=("vocabulary.weight",), priority=10),),
        ),
    ),
    encoder_files=(EncoderFile(option="pastel_words", title="Pastel"),),
    adapters=AdapterFacts(
        title="Pastel", parts=("strokes_", "strokes."), priority=10, base_versions=("pastel",), modelspec=("pastel",)
    ),
)


def strokes(table) -> str:
    """What the names of a denoiser say."""
    return f"{table.count('strokes.{}.')} strokes"
