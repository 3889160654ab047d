"""What the data side must know of a model family: latent geometry, bucket step, names of cache files."""

from __future__ import annotations

from dataclasses import dataclass

from library.families.latents import LatentSpec


@dataclass(frozen=True, kw_only=True)
class DataArchitecture:
    """`bucket_step`: what sizes must be a multiple of. `legacy_keys`: latents of old caches carry no size in their keys."""

    name: str
    latents: LatentSpec
    bucket_step: int
    latents_suffix: str
    text_suffix: str | None
    legacy_keys: bool = False


_LDM4 = LatentSpec(channels=4, spatial_stride=8, fingerprint="ldm-f8c4")
_LDM16 = LatentSpec(channels=16, spatial_stride=8, patch=2, fingerprint="ldm-f8c16")

ARCHITECTURES: dict[str, DataArchitecture] = {
    entry.name: entry
    for entry in (
        DataArchitecture(name="sd", latents=_LDM4, bucket_step=64, latents_suffix="_sd.npz", text_suffix=None, legacy_keys=True),
        DataArchitecture(name="sdxl", latents=_LDM4, bucket_step=32, latents_suffix="_sdxl.npz", text_suffix="_te_outputs.npz", legacy_keys=True),
        DataArchitecture(name="sd3", latents=_LDM16, bucket_step=16, latents_suffix="_sd3.npz", text_suffix="_sd3_te.npz"),
        DataArchitecture(name="flux", latents=_LDM16, bucket_step=16, latents_suffix="_flux.npz", text_suffix="_flux_te.npz"),
        DataArchitecture(name="lumina", latents=_LDM16, bucket_step=16, latents_suffix="_lumina.npz", text_suffix="_lumina_te.npz"),
        DataArchitecture(
            name="hunyuan_image", latents=LatentSpec(channels=64, spatial_stride=32, fingerprint="hunyuan-image-f32c64"),
            bucket_step=32, latents_suffix="_hi.npz", text_suffix="_hi_te.npz",
        ),
        DataArchitecture(
            name="anima", latents=LatentSpec(channels=16, spatial_stride=8, temporal_stride=4, patch=2, fingerprint="wan-f8c16"),
            bucket_step=16, latents_suffix="_anima.npz", text_suffix="_anima_te.npz",
        ),
    )
}
