"""Records of the data side: one image with everything known of it before its pixels are read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from library.core.file_limits import stem_of
from library.dataset.clips.settings import WINDOW_SIZE, ClipSettings, OneFrameSettings
from library.dataset.clips.windows import ClipWindow, ControlClip
from library.dataset.native_sizes import NativeSizes
from library.families.latents import PLAIN, Bucket, SampleKind

if TYPE_CHECKING:
    import torch


SOURCES = ("metadata_file", "image_jsonl_file", "video_jsonl_file", "video_directory", "image_dir")
"""keys that say what a subset reads; `image_dir` beside a metadata file only says where its images are"""


@dataclass(frozen=True, kw_only=True)
class SubsetParams:
    """Resolved settings of one subset: a folder or a file that lists its images or videos. Names are those of the
    dataset TOML; `image_directory` of TOML files is `image_dir` here."""

    image_dir: str | None = None
    metadata_file: str | None = None
    image_jsonl_file: str | None = None
    video_directory: str | None = None
    video_jsonl_file: str | None = None
    cache_directory: str | None = None
    """None: caches stand beside the files"""
    control_directory: str | None = None
    control_resolution: tuple[int, int] | None = None
    """(width, height): the area of control pictures that have a bucket of their own"""
    no_resize_control: bool = False
    control_count: int | None = 1
    """control files of each picture or video; None: any number of pictures; 0: the family reads none"""
    multiple_target: bool = False
    """each picture with a caption is followed by its layers: pictures of the same name and a number"""
    clips: ClipSettings | None = None
    """of videos; None where the subset holds pictures"""
    one_frame: OneFrameSettings | None = None
    """None: no such setting is written"""
    window_size: int = WINDOW_SIZE
    """latent frames of a section (fp_latent_window_size)"""
    conditioning_data_dir: str | None = None
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str | None = ".caption"
    """None: there are no caption files"""
    prefer_json: bool = False
    """a JSON file beside an image is its caption, before a file of caption_extension"""
    whole_captions: bool = False
    """captions have all lines of their files, and of a folder with caption files the pictures without one are left
    out"""
    cache_info: bool = False
    alpha_mask: bool = False
    shuffle_caption: bool = False
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    resize_interpolation: str | None = None
    validation_split: float | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    """Where the subset stands in the configuration, for messages: `datasets[0].subsets[1]`."""

    @property
    def reads_json(self) -> bool:
        """Whether captions may be JSON objects (json_captions.py)."""
        return self.prefer_json or self.caption_extension == ".json"

    @property
    def source(self) -> tuple[str, str] | None:
        """(key, path) of what it reads: a folder, or the file that lists its images or videos."""
        return next(((name, path) for name in SOURCES if (path := getattr(self, name)) is not None), None)

    @property
    def is_listed(self) -> bool:
        """Whether a file lists what it reads, captions with it; else it is a folder."""
        return self.source is not None and self.source[0].endswith("_file")

    @property
    def folder(self) -> str:
        """That of which it reads all files; "" where it reads what a file lists."""
        return "" if self.source is None or self.is_listed else self.source[1]

    @property
    def medium(self) -> str:
        """For messages: what it is made of."""
        return "images" if self.clips is None else "videos"


@dataclass(frozen=True, kw_only=True)
class DatasetParams:
    """Resolved settings of one dataset: one resolution, one batch size, one set of buckets."""

    resolution: tuple[int, int]
    """(width, height)"""
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    bucket_rule: str = "steps"
    """steps: buckets from min_bucket_reso to max_bucket_reso in steps; area: all shapes of the resolution's area whose
    sides are multiples of bucket_reso_steps; native: the sizes of the pictures, as `native` says"""
    native: NativeSizes | None = None
    network_multiplier: float = 1.0
    validation_split: float = 0.0
    validation_seed: int | None = None
    resize_interpolation: str | None = None
    skip_image_resolution: tuple[int, int] | None = None
    """images of no more than this many pixels (as width, height) are left out of the dataset"""
    kind: str = "DB"
    """DB (folders with caption files), FT (metadata files) or CN (folders with mask or control images)."""
    holds_control: bool = False
    """whether the conditioning images of CN are control pictures, and no masks"""
    subsets: tuple[SubsetParams, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class SampleFacts:
    """What an encoder may know of a sample beside its pixels: its kind, and which section of its clip is learned (None:
    the whole clip or picture is)."""

    kind: SampleKind = PLAIN
    section: int | None = None


NO_CAPTIONS: Mapping[str, Any] = {}
"""of most items; one for all, as each would take as much as a short caption"""


@dataclass
class ImageItem:
    """One image, or one clip of a video, of one subset. Sizes are (width, height), after the EXIF orientation is
    applied.

    The fields below `bucket_reso` are filled while buckets are made and caches are read; the names are those that the
    caching strategies of `library/strategy_base.py` read and write.
    """

    image_key: str
    absolute_path: str
    caption: str
    subset: SubsetParams
    image_size: tuple[int, int]
    num_repeats: int = 1
    frames: int = 1
    """Of the file, how many are used; a picture has one."""
    clip: ClipWindow | None = None
    """Which frames of a video; None of pictures and animated pictures, which begin with the first."""
    cond_path: str | None = None
    """The mask or control image that belongs to this image (datasets of kind CN)."""
    control_paths: tuple[str, ...] = ()
    """Control pictures, or the one control clip of a clip, of a control_directory or a JSONL file, in order."""
    target_paths: tuple[str, ...] = ()
    """Its layers (multiple_target), in order."""
    control_image_sizes: tuple[tuple[int, int], ...] = ()
    """of their files"""
    control_clip: ControlClip | None = None
    """Which frames of the control clip belong to a clip."""
    captions_extra: Mapping[str, Any] = field(default_factory=lambda: NO_CAPTIONS)

    bucket_reso: tuple[int, int] | None = None
    resized_size: tuple[int, int] | None = None
    control_sizes: tuple[tuple[int, int], ...] = ()
    """of control pictures in training"""

    latents_npz: str | None = None
    latents: torch.Tensor | None = None  # [C, h, w] or [C, F, h, w]
    latents_flipped: torch.Tensor | None = None
    latents_original_size: tuple[int, int] | None = None
    latents_crop_ltrb: tuple[int, int, int, int] | None = None
    alpha_mask: torch.Tensor | None = None  # [H, W] or [F, H, W], weights 0..1
    conditions: dict[str, torch.Tensor] | None = None
    """what is cached beside the latents, by name"""
    conditions_flipped: dict[str, torch.Tensor] | None = None

    text_encoder_outputs_npz: str | None = None
    text_encoder_outputs_suffix: str = ""
    """of the keys in that file that hold this item's caption"""
    text_encoder_outputs: dict[str, torch.Tensor] | None = None

    @property
    def is_reg(self) -> bool:
        return self.subset.is_reg

    @property
    def window_key(self) -> tuple[int, ...]:
        """What tells samples of one file apart, in draws and in names of caches: () of a picture, else (first frame,
        frames) and, where a clip is learned in sections, the section."""
        return () if self.clip is None else self.clip.key

    @property
    def facts(self) -> SampleFacts:
        """For encoders."""
        return SampleFacts(self.kind, None if self.clip is None else self.clip.section)

    @property
    def bucket(self) -> Bucket:
        """Its size in training; known once buckets are made."""
        return Bucket(*self.bucket_reso, self.frames, self.kind)

    @property
    def kind(self) -> SampleKind:
        """What it shares with the samples of its batches beside the size."""
        if self.clip is None and not self.control_sizes and self.subset.one_frame is None:
            return PLAIN
        one_frame = self.subset.one_frame if self.clip is None else None
        is_section = self.clip is not None and self.clip.section is not None
        return sample_kind(self.control_sizes, one_frame, self.subset.window_size if is_section else None)


class _FileBeside:
    """An attribute of an item: the path of a file of its own. Most lie beside the image and bear its name; of these
    only the ending is kept, one text for all items: a fifth less memory for each."""

    def __init__(self, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, item: ImageItem | None, owner: type) -> str | None:
        if item is None:
            return None
        kept = getattr(item, self._name)
        if kept.__class__ is str:
            return stem_of(item.absolute_path) + kept
        return None if kept is None else kept[0]

    def __set__(self, item: ImageItem, path: str | None) -> None:
        kept: str | tuple[str] | None = None
        if path is not None:
            stem = stem_of(item.absolute_path)
            kept = sys.intern(path[len(stem) :]) if path.startswith(stem) else (path,)
        setattr(item, self._name, kept)


for _name in ("latents_npz", "text_encoder_outputs_npz"):
    setattr(ImageItem, _name, _FileBeside(_name))


@lru_cache
def sample_kind(
    controls: tuple[tuple[int, int], ...], one_frame: OneFrameSettings | None, section_frames: int | None
) -> SampleKind:
    """Of a sample with control pictures of these sizes (width, height); one object for all that are alike."""
    one_frame = one_frame or OneFrameSettings()
    return SampleKind(
        controls, one_frame.fp_1f_clean_indices, one_frame.fp_1f_target_index, one_frame.fp_1f_no_post, section_frames
    )


ImageInfo = ImageItem  # the name under which plug-ins know the record
