"""FramePack: the denoiser of HunyuanVideo that makes a clip section by section."""

from __future__ import annotations

from library.families.record import FamilyRecord, ModelKind, Signature

FAMILY = FamilyRecord(
    name="framepack",
    title="FramePack",
    place=92,
    model_kinds=(
        ModelKind(
            name="framepack",
            signatures=(
                Signature(title="a FramePack denoiser", has=("clean_x_embedder.proj_2x.weight",), priority=50),
            ),
        ),
    ),
)
