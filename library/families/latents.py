"""Sizes of training samples and of their latents. A picture is a clip of one frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class SampleKind:
    """What samples have in common beside their size, where they are more than a picture or a clip."""

    controls: tuple[tuple[int, int], ...] = ()
    """(width, height) of the control pictures, in order"""
    clean_indices: tuple[int, ...] | None = None
    """latent times of the control pictures, of a single frame that is learned with others as reference"""
    target_index: int | None = None
    """latent time of that frame"""
    no_post: bool = False
    """no zeros stand behind the reference frames"""
    section_frames: int | None = None
    """latent frames of the sections in which a clip is learned; None: whole"""

    def __lt__(self, other: SampleKind) -> bool:
        return repr(self) < repr(other)  # any order will do, of buckets that are sorted


PLAIN = SampleKind()


class Bucket(NamedTuple):
    """What samples of a batch have in common: size in pixels, frames, and what else `kind` says."""

    width: int
    height: int
    frames: int = 1
    kind: SampleKind = PLAIN

    @property
    def key(self) -> tuple[int, ...]:
        """(width, height) of a picture, (width, height, frames) of a clip: how caches, records and random draws name
        it."""
        return self[:2] if self.frames == 1 else self[:3]


@dataclass(frozen=True, kw_only=True)
class SideLimit:
    """Pixels along a side of a picture that a denoiser has positions for. `lifted_by`: the option that makes positions
    for any size, where there is one."""

    pixels: int
    lifted_by: str = ""

    def problem(self, width: int, height: int, what: str = "the picture", otherwise: str = "") -> str | None:
        """A message for a size that is too large, else None. `otherwise`: how to make it smaller."""
        if max(width, height) <= self.pixels:
            return None
        ways = [way for way in (otherwise, self.lifted_by and f"--{self.lifted_by}") if way]
        return (
            f"{what} is {width}x{height}; the model has positions for {self.pixels} pixels a side: needed: at most"
            f" {self.pixels}{''.join(f', or {way}' for way in ways)}"
        )


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Latents of a family. `fingerprint` names the latent space, so that caches of another space are never mixed up.

    `clips`: the family learns from clips too; for the others the first frame of a file is a picture. A VAE with a
    `temporal_stride` encodes the first frame alone and then that many together, so that a clip has 1 + n * stride
    frames.
    """

    channels: int
    spatial_stride: int
    temporal_stride: int | None = None
    patch: int = 1
    fingerprint: str = ""
    clips: bool = False
    joins_references: bool = False
    """whether the latents of a single frame that is learned with others as reference hold these too, a frame each"""

    def latent_shape(self, bucket: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of a sample of this size (a Bucket, or its key): (C, h, w) of a picture, (C, F, h, w) of
        a clip, of a section, or of a frame with its references."""
        width, height, frames, kind = Bucket(*bucket)
        picture = (self.channels, height // self.spatial_stride, width // self.spatial_stride)
        if frames == 1 and self.joins_references and kind.clean_indices:
            return (self.channels, 1 + len(kind.clean_indices), *picture[1:])
        if frames == 1:
            return picture
        return (self.channels, kind.section_frames or 1 + (frames - 1) // (self.temporal_stride or 1), *picture[1:])

    def tokens(self, bucket: Sequence[int]) -> int:
        """Tokens that a denoiser makes of the latents of a sample of this size: square patches of every frame, the last
        ones of a side filled up."""
        *frames, height, width = self.latent_shape(bucket)[1:]
        return math.prod(frames) * -(-height // self.patch) * -(-width // self.patch)

    def sections_in(self, frames: int, section_frames: int) -> int:
        """Whole sections of so many latent frames in a clip, behind its first latent frame; 0 when it is too short."""
        return max((frames - 1) // (self.temporal_stride or 1), 0) // section_frames

    def frames_of_sections(self, sections: int, section_frames: int) -> int:
        """Frames of a clip of so many sections."""
        return 1 + sections * section_frames * (self.temporal_stride or 1)

    def side_limit(self, patches: int, lifted_by: str = "") -> SideLimit:
        """That of a denoiser with positions for this many patches along a side."""
        return SideLimit(pixels=patches * self.patch * self.spatial_stride, lifted_by=lifted_by)

    def usable_frames(self, frames: int) -> int:
        """How many of a file's frames a sample has: as many as the VAE takes, and one where a family makes pictures."""
        stride = self.temporal_stride or 1
        return 1 + (frames - 1) // stride * stride if self.clips else 1
