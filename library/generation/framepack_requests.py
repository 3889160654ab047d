"""FramePack clips as they are asked for: records without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from library.components.framepack_sections import section_texts
from library.generation.video_requests import VideoRequest

MAG_RATIOS = (
    1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632, 1.02974, 1.00984, 1.03028,
    1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726, 1.03727, 1.01502, 1.00992, 1.03371, 0.9976, 1.02742,
    1.0093, 1.01869, 1.00815, 1.01461, 1.01152, 1.03082, 1.0061, 1.02162, 1.01999, 0.99063, 1.01186, 1.0217, 0.99947,
    1.01711, 0.9904, 1.00258, 1.00878, 0.97039, 0.97686, 0.94315, 0.97728, 0.91154, 0.86139, 0.76592,
)  # fmt: skip
"""how the lengths of what the blocks add to tokens change from one of 50 steps to the next, as measured with the
released model"""


@dataclass(frozen=True, kw_only=True)
class MagCacheSettings:
    """When the blocks are left out of a step, and what they added in the step before is added again. `ratios`: from one
    step to the next; those of another number of steps are taken at the nearest places. `retention`: share of the first
    steps that are whole; `threshold`: of the error that adds up; `most`: steps in a row. `calibrate`: leave nothing
    out, and tell the ratios of the clip."""

    ratios: tuple[float, ...] = MAG_RATIOS
    retention: float = 0.2
    threshold: float = 0.24
    most: int = 6
    calibrate: bool = False


@dataclass(frozen=True, kw_only=True)
class FramePackRequest(VideoRequest):
    """One clip, made section by section, or one frame (`one_frame`).

    `sections`: how many; None = as many as `frames` hold. `prompt`, `image_path`: with the notation of sections
    (library/components/framepack_sections), each part for its own. `end_image_path`: what the clip ends with; the model
    that goes forward does not see it. `latent_paddings`: further ones of the first sections that are made.
    `guidance_rescale`: see `with_spread`. `seconds`: how long a script is asked to make it, which says how many
    `sections`; `takes_shape`: a single frame has the shape of its first control picture.
    """

    sections: int | None = None
    seconds: float = 5.0
    takes_shape: bool = False
    latent_paddings: tuple[int, ...] = ()
    guidance_rescale: float = 0.0
    magcache: MagCacheSettings | None = None
    magcache_retention: float | None = None
    magcache_threshold: float | None = None
    magcache_most: int | None = None

    @property
    def own_magcache(self) -> MagCacheSettings | None:
        """`magcache` with the settings that a prompt line gives one by one."""
        given = {"retention": self.magcache_retention, "threshold": self.magcache_threshold, "most": self.magcache_most}
        changes = {name: value for name, value in given.items() if value is not None}
        return self.magcache and dataclasses.replace(self.magcache, **changes)

    @property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        return tuple((text,) for text in section_texts(self.prompt).values())
