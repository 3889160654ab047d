"""Settings of a subset of clips, in the words of the dataset TOML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
AUTO_FPS = "auto"
"""of source_fps: the times in the files count"""
WINDOW_SIZE = 9
"""latent frames of a section where nothing else is written"""


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Which clips are cut out of each video, as written; `in_effect` is what is done."""

    target_frames: tuple[int, ...] = (1,)
    frame_extraction: str = "head"
    """one of FRAME_EXTRACTIONS"""
    frame_stride: int = 1
    """frames between the starts of clips (slide)"""
    frame_sample: int = 1
    """clips of each length (uniform)"""
    max_frames: int = 129
    """of a whole video (full)"""
    source_fps: float | str | None = None
    """frames per second that the files are taken to have, AUTO_FPS, or None: every frame of a file is used"""

    def in_effect(self, temporal_stride: int | None) -> ClipSettings:
        """Lengths that a VAE of this stride takes, rising and once each; `uniform` with one clip is `head`."""
        stride = temporal_stride or 1
        lengths = {whole_frames(frames, stride) for frames in self.target_frames}
        is_head = self.frame_extraction == "uniform" and self.frame_sample == 1
        extraction = "head" if is_head else self.frame_extraction
        return dataclasses.replace(self, target_frames=tuple(sorted(lengths)), frame_extraction=extraction)


@dataclass(frozen=True, kw_only=True)
class OneFrameSettings:
    """Training of single frames with other frames as reference, as written."""

    fp_1f_clean_indices: tuple[int, ...] | None = None
    """latent times of the control pictures"""
    fp_1f_target_index: int | None = None
    """latent time of the picture that is learned"""
    fp_1f_no_post: bool = False
    """no zeros stand behind the reference frames"""


def whole_frames(frames: int, stride: int) -> int:
    """The largest 1 + n * stride of no more than `frames`, which are 1 or more."""
    return 1 + (frames - 1) // stride * stride
