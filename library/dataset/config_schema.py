"""The keys of a dataset configuration: where each may stand, for which kinds of dataset, and which values it takes.

Levels: G = [general], D = [[datasets]], S = [[datasets.subsets]]. Kinds: DB = folders with caption files, FT = metadata
files, CN = folders with masks or control images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from library.core.errors import nearest_name
from library.core.options import LARGEST_BATCH, LARGEST_SEED, LARGEST_SIDE, LARGEST_WHOLE, number_problem
from library.dataset import INTERPOLATIONS, parse_resolution

ALL_KINDS = frozenset({"DB", "FT", "CN"})


class WrongType(ValueError):
    """A value of another type than the key takes; the text says what is needed."""


class OutOfRange(ValueError):
    """A value of the right type outside the accepted range; the text says what is accepted."""

    def __init__(self, needed: str, nearest: str | None = None) -> None:
        super().__init__(needed)
        self.nearest = nearest


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise WrongType("true or false (without quotes) is needed")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise WrongType("a text in quotes is needed")
    return value


def _path(value: Any) -> str:
    if not _text(value):
        raise OutOfRange("a path that is not empty is needed")
    return value


def _integer(minimum: int | None = None, maximum: int = LARGEST_WHOLE) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongType("a whole number is needed" + (f", {minimum} or more" if minimum is not None else ""))
        if minimum is not None and value < minimum:
            raise OutOfRange(f"{minimum} or more is needed")
        if abs(value) > maximum:
            raise OutOfRange(f"at most {maximum} is possible")
        return value

    return parse


def _number(minimum: float | None = None, maximum: float | None = None) -> Callable[[Any], float]:
    wanted = "a number"
    if minimum is not None:
        wanted += f" from {minimum} to {maximum}" if maximum is not None else f" of {minimum} or more"

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise WrongType(f"{wanted} is needed")
        if value != value or (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            raise OutOfRange(f"{wanted} is needed")
        if number_problem(value, is_whole=False):
            raise OutOfRange("a finite number is needed, within those of float32")
        return value

    return parse


def _multiplier(value: Any) -> float:
    """Strength of the network; a negative one trains it to be taken away."""
    if _number()(value) == 0:
        raise OutOfRange(
            "0 leaves nothing to learn from these images; leave the dataset out, or give a number above or below 0"
        )
    return value


def _resolution(value: Any) -> tuple[int, int]:
    try:
        size = parse_resolution(value)
    except argparse.ArgumentTypeError:
        raise WrongType('one whole number (1024), two ([1024, 768]) or a text ("1024,768") is needed') from None
    if min(size) < 1:
        raise OutOfRange("both sides must be 1 or more")
    if max(size) > LARGEST_SIDE:
        raise OutOfRange(f"sides of at most {LARGEST_SIDE} are possible")
    return size


def _face_range(value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise WrongType("two numbers are needed, e.g. [1.0, 3.0]")
    if any(isinstance(part, bool) or not isinstance(part, (int, float)) for part in value):
        raise WrongType("two numbers are needed, e.g. [1.0, 3.0]")
    low, high = float(value[0]), float(value[1])
    if not 0 < low <= high or number_problem(high, is_whole=False):
        raise OutOfRange("two numbers with 0 < lo <= hi are needed, e.g. [1.0, 3.0]")
    return low, high


def _interpolation(value: Any) -> str:
    if _text(value) not in INTERPOLATIONS:
        raise OutOfRange(f"one of {', '.join(INTERPOLATIONS)} is needed", nearest_name(value, INTERPOLATIONS))
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise WrongType("a table is needed, e.g. { note = \"x\" }")
    return dict(value)


@dataclass(frozen=True)
class Key:
    """One key. `option` is the command-line option that stands in when no table has the key."""

    name: str
    parse: Callable[[Any], Any]
    levels: str
    kinds: frozenset[str] = ALL_KINDS
    option: str | None = None
    default: Any = None
    is_dropout: bool = False


def _keys() -> dict[str, Key]:
    """All keys by name; the order is that of the documentation."""
    table: list[Key] = []

    def add(names: str, parse: Callable[[Any], Any], levels: str, option: bool | str = True, **more: Any) -> None:
        for name in names.split():
            table.append(Key(name, parse, levels, option=(name if option is True else option or None), **more))

    folders = frozenset({"DB", "CN"})
    add("resolution", _resolution, "GD")
    add("batch_size", _integer(1, LARGEST_BATCH), "GD", option="train_batch_size")
    add("enable_bucket bucket_no_upscale", _boolean, "GD")
    add("min_bucket_reso max_bucket_reso bucket_reso_steps", _integer(1, LARGEST_SIDE), "GD")
    add("skip_image_resolution", _resolution, "GD")
    add("network_multiplier", _multiplier, "GD", option=False, default=1.0)
    add("validation_seed", _integer(maximum=LARGEST_SEED), "GD")
    add("validation_split", _number(0, 1), "GDS")
    add("resize_interpolation", _interpolation, "GDS")
    add("num_repeats", _integer(0), "GDS", option="dataset_repeats")
    add("shuffle_caption enable_wildcard color_aug flip_aug random_crop", _boolean, "GDS")
    add("caption_separator keep_tokens_separator secondary_separator caption_prefix caption_suffix", _text, "GDS")
    add("keep_tokens token_warmup_min", _integer(0), "GDS")
    add("token_warmup_step", _number(0), "GDS")
    add("face_crop_aug_range", _face_range, "GDS")
    add("custom_attributes", _table, "GDS", option=False)
    add("caption_dropout_rate caption_tag_dropout_rate", _number(0, 1), "GDS", is_dropout=True)
    add("caption_dropout_every_n_epochs", _integer(0), "GDS", is_dropout=True)
    add("caption_extension", _text, "GDS", kinds=folders, option="effective_caption_extension", default=".caption")
    add("cache_info", _boolean, "GDS", kinds=folders, default=False)
    add("class_tokens", _text, "GDS", kinds=frozenset({"DB"}), option=False)
    add("alpha_mask", _boolean, "GDS", kinds=frozenset({"DB", "FT"}), default=False)
    add("image_dir", _path, "S", option=False)
    add("is_reg", _boolean, "S", kinds=frozenset({"DB"}), option=False, default=False)
    add("metadata_file", _path, "S", kinds=frozenset({"FT"}), option=False)
    add("conditioning_data_dir", _path, "S", kinds=frozenset({"CN"}), option=False)
    return {key.name: key for key in table}


KEYS: dict[str, Key] = _keys()
RENAMED = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats", "caption_extention": "caption_extension"}
"""options of the command line whose key has another name"""
COMMAND_LINE_ONLY = frozenset({
    "prior_loss_weight", "debug_dataset", "max_token_length", "masked_loss", "train_data_dir", "reg_data_dir",
    "in_json",
    "dataset_config", "dataset_class", "check_images", "skip_bad_images", "fail_on_missing_captions", "cache_latents",
    "cache_latents_to_disk",
    "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "vae_batch_size", "skip_cache_check", "seed",
})
LEVEL_NAMES = {"G": "[general]", "D": "[[datasets]]", "S": "[[datasets.subsets]]"}


def keys_of(level: str, kinds: frozenset[str] = ALL_KINDS) -> list[str]:
    """Names of the keys that may stand at a level for these kinds of dataset."""
    keys = [key.name for key in KEYS.values() if level in key.levels and key.kinds & kinds]
    return [*keys, "subsets"] if level == "D" else keys
