"""From videos that were looked at to their clips: rates, windows and sections by the settings of a subset, and what is
to be told of videos that fit them badly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.core.errors import listed
from library.dataset.architectures import DataArchitecture
from library.dataset.clips.rates import Conversion, converted_count, differs_from, exact_rate
from library.dataset.clips.settings import AUTO_FPS, ClipSettings
from library.dataset.clips.video_check import VideoCheck
from library.dataset.clips.windows import ClipWindow, ControlClip, frames_needed, windows_of
from library.dataset.items import SubsetParams


@dataclass(frozen=True)
class Cutter:
    """Cuts the videos of one subset. `section_frames`: latent frames of the sections in which a clip is learned."""

    settings: ClipSettings
    architecture: DataArchitecture
    section_frames: int | None = None

    @classmethod
    def of(cls, subset: SubsetParams, architecture: DataArchitecture | None) -> Cutter | None:
        """None for pictures, and for a family that learns no videos, which the configuration is refused for."""
        facts = None if architecture is None else architecture.clips
        if subset.clips is None or facts is None or facts.fps is None:
            return None
        return cls(subset.clips, architecture, subset.window_size if facts.sections else None)

    @property
    def target_fps(self) -> float:
        assert self.architecture.clips is not None and self.architecture.clips.fps is not None
        return self.architecture.clips.fps

    @property
    def stride(self) -> int:
        return self.architecture.latents.temporal_stride or 1

    def conversion(self, video: VideoCheck) -> Conversion | None:
        """None: every frame of the file is used. A folder of frames has no times of its own."""
        source = self.settings.source_fps
        if source is None or (source == AUTO_FPS and video.rate is None):
            return None
        if source == AUTO_FPS:
            return Conversion.own(video.rate, video.times, self.target_fps)
        return Conversion.given(source, self.target_fps)

    def frames_of(self, video: VideoCheck) -> int:
        """Frames of the list that clips are cut from."""
        return converted_count(video.frames, self.conversion(video))

    def clips_of(self, video: VideoCheck) -> list[ClipWindow]:
        """By length, start and section. Empty where the video is too short."""
        conversion = self.conversion(video)
        windows = windows_of(self.frames_of(video), self.settings, self.stride)
        return [
            ClipWindow(start, length, section, conversion, video.even_rate)
            for start, length in windows for section in self._sections(length)
        ]

    def control_clip(self, control: VideoCheck, video: VideoCheck) -> ControlClip:
        """Of a control video, or of a picture that stands beside all frames. Frames without times of their own are those
        of the video, one for one."""
        conversion = self.conversion(video if control.rate is None else control)
        count = converted_count(control.frames, conversion)
        while conversion is not None and conversion.frame(count - 1) >= control.frames:
            count -= 1
        return ControlClip(count, conversion, control.even_rate)

    def _sections(self, length: int) -> Sequence[int | None]:
        if self.section_frames is None:
            return [None]
        return range((length - 1) // self.stride // self.section_frames)

    @property
    def needed(self) -> int:
        """The fewest frames of a clip that can be used."""
        fewest = frames_needed(self.settings, self.stride)
        return fewest if self.section_frames is None else max(fewest, self.stride * self.section_frames + 1)

    def settings_problem(self) -> str | None:
        """Lengths of which no section can be made."""
        if self.section_frames is None or self.settings.frame_extraction == "full":
            return None
        least = self.stride * self.section_frames + 1
        short = [length for length in self.settings.in_effect(self.stride).target_frames if length < least]
        if not short:
            return None
        return (
            f"target_frames {short} are too few for a section of {self.section_frames} latent frames"
            f" (fp_latent_window_size), which {self.architecture.name} learns: needed are {least} or more"
        )

    def too_short(self, videos: Sequence[tuple[str, VideoCheck]]) -> str | None:
        """One line about the videos of which no clip can be cut."""
        short = [(path, self.frames_of(video), video) for path, video in videos if not self.clips_of(video)]
        if not short or self.settings_problem():  # then not the videos are at fault
            return None
        found = [f"{path} ({_frames(count, video)})" for path, count, video in short]
        return (
            f"{len(short)} of {len(videos)} videos are shorter than the shortest clip, which has {self.needed} frames,"
            f" and are left out: {listed(found)}"
        )

    def notices(self, videos: Sequence[tuple[str, VideoCheck]]) -> list[str]:
        """What else is to be known of these videos: other rates than they are taken for, damage, odd frames."""
        cut = [f"{path} ({video.frames} of {video.promised} frames)" for path, video in videos if video.is_cut]
        mixed = [path for path, video in videos if video.mixed_sizes]
        lines = [
            f"{len(cut)} videos break off; what is there is used: {listed(cut)}" if cut else None,
            f"{len(mixed)} folders hold frames of several sizes, which are all scaled to one: {listed(mixed)}"
            if mixed else None,
            self._length_notice(videos),
            self._rate_notice(videos),
        ]
        return [line for line in lines if line is not None]

    def _length_notice(self, videos: Sequence[tuple[str, VideoCheck]]) -> str | None:
        """Lengths that no video has, beside others that some have."""
        if self.settings.frame_extraction == "full":
            return None
        lengths = self.settings.in_effect(self.stride).target_frames
        longest = max((self.frames_of(video) for _, video in videos), default=0)
        unmade = [length for length in lengths if length > longest]
        if not unmade or len(unmade) == len(lengths):
            return None
        return f"no clip has the length {listed([str(length) for length in unmade])} of target_frames: the longest video has {longest} frames"

    def _rate_notice(self, videos: Sequence[tuple[str, VideoCheck]]) -> str | None:
        source, target = self.settings.source_fps, self.target_fps
        if source == AUTO_FPS:
            still = [path for path, video in videos if video.rate is None]
            return still and (
                f"source_fps is auto, and {len(still)} folders of frames have no times, so that every frame is used:"
                f" {listed(still)}"
            ) or None
        taken_for = target if source is None else source
        others = [
            f"{path} ({float(video.rate):.5g} fps)" for path, video in videos
            if video.rate is not None and differs_from(video.rate, taken_for)
        ]
        if others and source is None:
            have = "1 video has" if len(others) == 1 else f"{len(others)} videos have"
            return (
                f"{have} another frame rate than the {target:g} fps of {self.architecture.name};"
                f" every frame is used, so that movements get another speed: {listed(others)}. source_fps = \"auto\""
                " converts them by their own times"
            )
        if others:
            say = "1 video says" if len(others) == 1 else f"{len(others)} videos say"
            return (
                f"source_fps is {source:g}, and {say} otherwise: {listed(others)}. source_fps ="
                " \"auto\" goes by what they say"
            )
        if source is not None and exact_rate(source) < exact_rate(target):
            name = self.architecture.name
            return f"source_fps {source:g} is less than the {target:g} fps of {name}; frames are repeated"
        return None


def _frames(count: int, video: VideoCheck) -> str:
    words = f"{count} frame{'' if count == 1 else 's'}"
    return words if count == video.frames else f"{words} of {video.frames} after the conversion"
