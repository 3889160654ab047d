"""What the recorded cases of videos must know of the architectures that they name by their short names: facts of the
known tool's table, so that they hold for those too that are no family here."""

from __future__ import annotations

from library.families.latents import LatentSpec
from library.families.record import ClipFacts, DataArchitecture

RATES = {"hv": 24.0, "wan": 16.0, "fp": 30.0, "k5": 24.0, "hv15": 24.0}
"""frames per second of those that learn from videos"""
STEPS = {"ho1": 32}
ANY_NUMBER = ("f2d", "f2k4b", "f2k9b", "qie", "ho1")
"""of control pictures"""
NAMES = (*RATES, "f2d", "f2k4b", "f2k9b", "qi", "qie", "qil", "zi", "fk", "ho1", "i4", "kr2")


def architecture(short: str) -> DataArchitecture:
    clips = ClipFacts(
        short=short, long=short, fps=RATES.get(short), controls=None if short in ANY_NUMBER else 1,
        one_frame=short in ("wan", "fp"), sections=short == "fp", layers=short == "qil",
    )
    return DataArchitecture(
        name=short, latents=LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, clips=short in RATES),
        bucket_step=STEPS.get(short, 16), latents_suffix=f"_{short}.safetensors",
        text_suffix=f"_{short}_te.safetensors", clips=clips,
    )  # fmt: skip


ARCHITECTURES = {name: architecture(name) for name in NAMES}
