"""The schema of a dataset configuration, in voluptuous: which keys there are, where each may stand, for which kinds of
dataset, and which values it takes.

Levels: G = [general], D = [[datasets]], S = [[datasets.subsets]]; F = [[datasets]] without subsets, which names its own
source and takes what D and S take. Kinds: DB = folders with caption files, FT = metadata
files, CN = folders with masks or control images. Every check has the words for the user; config_reading.py makes
messages of them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from voluptuous import (
    All,
    Extra,
    In,
    Invalid,
    Length,
    Match,
    Optional,
    Range,
    RangeInvalid,
    Required,
    RequiredFieldInvalid,
    Schema,
    TypeInvalid,
)

from library.core.options import LARGEST_BATCH, LARGEST_NUMBER, LARGEST_SEED, LARGEST_SIDE, LARGEST_WHOLE
from library.dataset import INTERPOLATIONS, parse_resolution
from library.dataset.clips.settings import AUTO_FPS, FRAME_EXTRACTIONS, WINDOW_SIZE, ClipSettings

ALL_KINDS = frozenset({"DB", "FT", "CN"})
CONTROL = "control"
"""of keys: datasets of kind CN whose conditioning images are control pictures, and no masks"""
SHAPE_HINT = (
    "datasets are written as [[datasets]] with [[datasets.subsets]], or, with a name, as [datasets.NAME] with"
    " [[datasets.NAME.subsets]]"
)
SOURCE_KEYS = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")
"""with one of them a dataset needs no subsets"""
MEDIA = {"image": "pictures", "video": "videos"}


class UnknownKey(Invalid):
    """A key that the schema does not have at this place."""


class LooseKeys(Invalid):
    """Keys of a dataset that stand where only datasets may."""


# ---------------------------------------------------------------- values


def _of_type(needed: str, *types: type) -> Callable[[Any], Any]:
    """A value of one of the types; true and false are no numbers."""

    def check(value: Any) -> Any:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeInvalid(needed)
        return value

    return check


def _whole(minimum: int | None = None, maximum: int = LARGEST_WHOLE) -> All:
    return All(
        _of_type("a whole number is needed" + (f", {minimum} or more" if minimum is not None else ""), int),
        Range(min=minimum, msg=f"{minimum} or more is needed"),
        Range(-maximum, maximum, msg=f"at most {maximum} is possible"),
    )


def _number(minimum: float | None = None, maximum: float | None = None) -> All:
    limits = "" if minimum is None else f" of {minimum} or more" if maximum is None else f" from {minimum} to {maximum}"
    wanted = f"a number{limits} is needed"
    return All(
        _of_type(wanted, int, float),
        Range(minimum, maximum, msg=wanted),
        Range(-LARGEST_NUMBER, LARGEST_NUMBER, msg="a finite number is needed, within those of float32"),
    )


def _not_zero(value: float) -> float:
    if value == 0:
        raise RangeInvalid(
            "0 leaves nothing to learn from these images; leave the dataset out, or give a number above or below 0"
        )
    return value


def _sides(value: Any) -> tuple[int, int]:
    try:
        return parse_resolution(value)
    except argparse.ArgumentTypeError:
        raise TypeInvalid('one whole number (1024), two ([1024, 768]) or a text ("1024,768") is needed') from None


def _each(check: Callable[[Any], Any]) -> Callable[[tuple], tuple]:
    """A check of every entry, as a check of the whole."""
    return lambda values: tuple(check(value) for value in values)


def _two_numbers(value: Any) -> tuple[float, float]:
    needed = "two numbers are needed, e.g. [1.0, 3.0]"
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeInvalid(needed)
    return _each(_of_type(needed, int, float))(value)


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= LARGEST_NUMBER:
        raise RangeInvalid("two numbers with 0 < lo <= hi are needed, e.g. [1.0, 3.0]")
    return float(value[0]), float(value[1])


def _whole_numbers(minimum: int | None = None) -> Callable[[Any], tuple[int, ...]]:
    needed = "a list of whole numbers is needed, e.g. [1, 25]"
    return All(_of_type(needed, list, tuple), Length(min=1, msg=needed), _each(Schema(_whole(minimum))))


def _frame_rate(value: Any) -> float | str:
    needed = f'a number above 0 is needed, or "{AUTO_FPS}" for the times in the files'
    if value == AUTO_FPS:
        return value
    rate = _of_type(needed, int, float)(value)
    if not 0 < rate <= LARGEST_NUMBER:
        raise RangeInvalid(needed)
    return float(rate)


BOOLEAN = _of_type("true or false (without quotes) is needed", bool)
TEXT = _of_type("a text in quotes is needed", str)
PATH = All(
    TEXT, Length(min=1, msg="a path that is not empty is needed"),
    Match(r"[^\0]+\Z", msg="a path without zero characters is needed"),
)  # fmt: skip
INTERPOLATION = All(TEXT, In(INTERPOLATIONS, msg=f"one of {', '.join(INTERPOLATIONS)} is needed"))
ATTRIBUTES = All(_of_type('a table is needed, e.g. { note = "x" }', Mapping), dict)
FACE_RANGE = All(_two_numbers, _rising)
MULTIPLIER = All(_number(), _not_zero)
"""strength of the network; a negative one trains it to be taken away"""
RESOLUTION = All(
    _sides,
    _each(Range(min=1, msg="both sides must be 1 or more")),
    _each(Range(max=LARGEST_SIDE, msg=f"sides of at most {LARGEST_SIDE} are possible")),
)

# ---------------------------------------------------------------- keys


@dataclass(frozen=True)
class Key:
    """One key. `check` is its part of the schema; out of it comes the value in its type. `option` is the command-line
    option that stands in when no table has the key; `choices` are the only texts that it takes, where it has a list."""

    name: str
    check: Schema
    levels: str
    kinds: frozenset[str] = ALL_KINDS
    option: str | None = None
    default: Any = None
    choices: tuple[str, ...] = ()
    is_dropout: bool = False
    media: str = ""
    """image or video: the only ones that it is for"""

    def fits(self, level: str) -> bool:
        """Whether it may stand at a level."""
        return level in self.levels or (level == "F" and self.levels != "G" and self.name not in NOT_FLAT)


def _keys() -> dict[str, Key]:
    """All keys by name; the order is that of the documentation."""
    table: list[Key] = []

    def add(names: str, check: Callable[[Any], Any], levels: str, option: bool | str = True, **more: Any) -> None:
        for name in names.split():
            table.append(Key(name, Schema(check), levels, option=(name if option is True else option or None), **more))

    folders = frozenset({"DB", "CN"})
    add("resolution", RESOLUTION, "GD")
    add("batch_size", _whole(1, LARGEST_BATCH), "GD", option="train_batch_size")
    add("enable_bucket bucket_no_upscale", BOOLEAN, "GD")
    add("min_bucket_reso max_bucket_reso bucket_reso_steps", _whole(1, LARGEST_SIDE), "GD")
    add("skip_image_resolution", RESOLUTION, "GD")
    add("network_multiplier", MULTIPLIER, "GD", option=False, default=1.0)
    add("validation_seed", _whole(maximum=LARGEST_SEED), "GD")
    add("validation_split", _number(0, 1), "GDS")
    add("resize_interpolation", INTERPOLATION, "GDS", choices=INTERPOLATIONS)
    add("num_repeats", _whole(0), "GDS", option="dataset_repeats")
    add("shuffle_caption enable_wildcard color_aug flip_aug random_crop", BOOLEAN, "GDS")
    add("caption_separator keep_tokens_separator secondary_separator caption_prefix caption_suffix", TEXT, "GDS")
    add("keep_tokens token_warmup_min", _whole(0), "GDS")
    add("token_warmup_step", _number(0), "GDS")
    add("face_crop_aug_range", FACE_RANGE, "GDS")
    add("custom_attributes", ATTRIBUTES, "GDS", option=False)
    add("caption_dropout_rate caption_tag_dropout_rate", _number(0, 1), "GDS", is_dropout=True)
    add("caption_dropout_every_n_epochs", _whole(0), "GDS", is_dropout=True)
    add("caption_extension", TEXT, "GDS", kinds=folders, option="effective_caption_extension", default=".caption")
    add("prefer_json", BOOLEAN, "GDS", kinds=folders, default=False)
    add("cache_info", BOOLEAN, "GDS", kinds=folders, default=False)
    add("class_tokens", TEXT, "GDS", kinds=frozenset({"DB"}), option=False)
    add("alpha_mask", BOOLEAN, "GDS", kinds=frozenset({"DB", "FT", CONTROL}), default=False)
    add("image_dir", PATH, "S", option=False)
    add("is_reg", BOOLEAN, "S", kinds=frozenset({"DB"}), option=False, default=False)
    add("metadata_file", PATH, "S", kinds=frozenset({"FT"}), option=False)
    add("conditioning_data_dir", PATH, "S", kinds=frozenset({"CN"}), option=False)
    add("image_directory image_jsonl_file", PATH, "S", option=False, media="image")
    add("video_directory video_jsonl_file", PATH, "S", option=False, media="video")
    add("cache_directory control_directory", PATH, "S", option=False)
    add("control_resolution", RESOLUTION, "DS", option=False, media="image")
    add("no_resize_control", BOOLEAN, "DS", option=False, default=False, media="image")
    add("multiple_target", BOOLEAN, "S", option=False, default=False, media="image")
    clips, video = ClipSettings(), {"option": False, "media": "video"}
    add("target_frames", _whole_numbers(1), "DS", default=clips.target_frames, **video)
    extraction = All(TEXT, In(FRAME_EXTRACTIONS, msg=f"one of {', '.join(FRAME_EXTRACTIONS)} is needed"))
    add("frame_extraction", extraction, "DS", default=clips.frame_extraction, choices=FRAME_EXTRACTIONS, **video)
    add("frame_stride frame_sample", _whole(1), "DS", default=clips.frame_stride, **video)
    add("max_frames", _whole(1), "DS", default=clips.max_frames, **video)
    add("source_fps", _frame_rate, "DS", **video)
    add("fp_latent_window_size", _whole(1), "DS", option=False, default=WINDOW_SIZE)
    add("fp_1f_clean_indices", _whole_numbers(), "DS", option=False, media="image")
    add("fp_1f_target_index", _whole(), "DS", option=False, media="image")
    add("fp_1f_no_post", BOOLEAN, "DS", option=False, default=False, media="image")
    return {key.name: key for key in table}


BUCKET_KEYS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
_OF_ONE_AREA = "its buckets are all shapes of one area; remove the key, or write the folder in [[datasets.subsets]]"
NOT_FLAT: dict[str, str] = {
    "image_dir": "write image_directory", "metadata_file": "write it in [[datasets.subsets]], or use image_jsonl_file",
    **dict.fromkeys(BUCKET_KEYS, _OF_ONE_AREA),
}
"""keys of D and S that a dataset without subsets has no use for -> what to do"""

KEYS: dict[str, Key] = _keys()
RENAMED = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats", "caption_extention": "caption_extension"}
"""options of the command line whose key has another name"""
COMMAND_LINE_ONLY = frozenset({
    "prior_loss_weight", "debug_dataset", "max_token_length", "masked_loss", "train_data_dir", "reg_data_dir",
    "in_json", "dataset_config", "dataset_class", "check_images", "skip_bad_images", "fail_on_missing_captions",
    "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
    "vae_batch_size", "skip_cache_check", "seed",
})  # fmt: skip
OLD_NAMES = {
    "flux_kontext_no_resize_control": "no_resize_control", "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}  # fmt: skip
"""keys that were renamed"""
SECTIONS = ("general", "datasets")
LEVEL_NAMES = {
    "G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]", "F": "[[datasets]] without subsets",
}  # fmt: skip


def keys_of(level: str, kinds: frozenset[str] = ALL_KINDS) -> list[str]:
    """Names of the keys that may stand at a level for these kinds of dataset."""
    keys = [key.name for key in KEYS.values() if key.fits(level) and key.kinds & kinds]
    return [*keys, "subsets"] if level == "D" else keys


# ---------------------------------------------------------------- the whole file


def by_place(found: Any) -> dict[int | str, Any]:
    """Tables by their place: those of a list by number, those with names by name."""
    return dict(enumerate(found)) if isinstance(found, list) else dict(found)


def is_flat(found: Any, learns_videos: bool = False) -> bool:
    """Whether a dataset has no subsets and names its own source; one with neither is such a dataset where the family
    learns from videos."""
    return isinstance(found, Mapping) and "subsets" not in found and (learns_videos or bool(found.keys() & SOURCE_KEYS))


def _no_loose_keys(found: Any) -> Any:
    names = {*KEYS, "subsets"}
    loose = [name for name, value in by_place(found).items() if name in names and not isinstance(value, Mapping)]
    if loose:
        raise LooseKeys(f"the keys {', '.join(loose)} stand directly under [datasets]; {SHAPE_HINT}")
    return found


def _some(needed: str) -> Callable[[Any], Any]:
    """One entry at least."""

    def check(found: Any) -> Any:
        if not found:
            raise RequiredFieldInvalid(needed)
        return found

    return check


def _refuse_key(value: Any) -> Any:
    raise UnknownKey("unknown key")


def _table(needed: str, keys: Mapping[Any, Any]) -> All:
    return All(_of_type(needed, Mapping), dict, {**keys, Extra: _refuse_key})


@functools.cache
def schema_of(kinds: frozenset[str], supports_dropout: bool, learns_videos: bool = False) -> Schema:
    """What a configuration may be for a script that takes these kinds of dataset.

    In datasets and subsets the keys of all kinds may stand: whether one fits is known when the kind of the dataset is.
    Lists become tables by number, because of a table voluptuous tells the faults of all entries, of a list those of the
    first faulty one.
    """

    def keys(level: str) -> dict[Any, Any]:
        fitting = (key for key in KEYS.values() if key.fits(level) and (level != "G" or key.kinds & kinds))
        return {Optional(key.name): key.check for key in fitting if supports_dropout or not key.is_dropout}

    subsets = All(
        _of_type("a list of tables is needed, [[...subsets]]", list),
        _some("the dataset has no subsets; give each folder or metadata file a [[...subsets]] table"),
        by_place, {int: _table("a table is needed, [[...subsets]]", keys("S"))},
    )  # fmt: skip
    flat = Schema(_table(SHAPE_HINT, keys("F")))
    with_subsets = Schema(_table(SHAPE_HINT, {**keys("D"), Required("subsets", default=list): subsets}))
    datasets = All(
        _of_type(SHAPE_HINT, list, Mapping),
        _some(f"the dataset config has no [[datasets]]; {SHAPE_HINT}"),
        _no_loose_keys, by_place,
        {object: lambda found: (flat if is_flat(found, learns_videos) else with_subsets)(found)},
    )  # fmt: skip
    sections = {
        Optional("general"): _table("a table [general] is needed", keys("G")),
        Required("datasets", default=list): datasets,
    }
    return Schema(_table("a table with [[datasets]] is needed", sections))
