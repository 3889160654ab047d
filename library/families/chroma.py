"""Chroma: its files are told from those of FLUX.1, whose adapters it shares."""

from __future__ import annotations

from library.families.record import AdapterFacts, FamilyRecord, ModelKind, SampleDefaults, Signature

FAMILY = FamilyRecord(
    name="chroma",
    title="Chroma",
    place=60,
    samples=SampleDefaults(512, 16, {"sample_steps": 20, "scale": 1.0, "guidance_scale": 3.5}),
    model_kinds=(
        ModelKind(
            name="chroma",
            wanted="a Chroma denoiser",
            base_version="chroma",
            modelspec="chroma",
            signatures=(
                Signature(title="a Chroma denoiser", has=("distilled_guidance_layer.in_proj.weight",), priority=60),
            ),
        ),
    ),
    adapters=AdapterFacts(title="FLUX.1 or Chroma", base_versions=("chroma",), modelspec=("chroma",)),
    adapters_of="flux",
    variant_of=("flux", "model_type", "chroma"),
)
