"""Its record."""

from __future__ import annotations

from library.families.latents import LatentSpec
from library.families.record import AdapterFacts, CacheNames, FamilyRecord, SampleDefaults, TextKey

FAMILY = FamilyRecord(
    name="toy_video",
    title="Toy video",
    prefix="toy_video_",
    family="tests.toy_video.family:ToyVideoFamily",
    denoisers=("ToyVideoDit",),
    pipeline="tests.toy_video.pipeline:ToyVideoPipeline",
    targets="tests.toy_video.family:TARGETS",
    latents=LatentSpec(channels=4, spatial_stride=8, temporal_stride=2, patch=2, fingerprint="toy-t2f8c4", clips=True),
    bucket_step=16,
    caches=CacheNames(latents="_toy.npz", text="_toy_te.npz"),
    conditioning=(TextKey("states", encoders=(0,), is_sized=True),),
    samples=SampleDefaults(32, 16, {"sample_steps": 3, "cfg_scale": 1.0, "frame_count": 5}),
    adapters=AdapterFacts(title="the toy video family", parts=("toy_blocks_",)),
)
