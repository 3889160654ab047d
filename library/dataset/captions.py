"""Captions: from files and metadata entries to the text that is tokenized. Pure functions; random parts take a
generator."""

from __future__ import annotations

import codecs
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from library.core.errors import ConfigError
from library.core.file_limits import stem_of
from library.core.text_files import read_bytes
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.json_captions import caption_of_json, parsed_caption

Replacements = Mapping["str | re.Pattern[str]", "str | Sequence[str]"]
WILDCARD = re.compile(r"\{([^}]+)\}")
JSON = ".json"
OPEN_BRACE, CLOSE_BRACE = "\x00", "\x01"  # stand for {{ and }} while alternatives are chosen

RANDOM_SETTINGS = ("shuffle_caption", "enable_wildcard", "token_warmup_step", "caption_tag_dropout_rate")
"""Settings that make a caption another one at each use. Whole-caption dropout is not among them: it swaps in the empty
caption, whose encoding can be cached."""


def process_caption(
    caption: str,
    params: SubsetParams,
    *,
    rng: random.Random,
    epoch: int,
    step: int,
    max_train_steps: int,
    replacements: Replacements | None = None,
) -> str:
    """The caption as one sample uses it: dropout, line, prefix and suffix, alternatives, tags, separators,
    replacements.

    `epoch` counts from 1, `step` is the global step of the sample, `rng` belongs to this sample alone. `replacements`
    are those of textual inversion: text or pattern -> text (or a list to choose from), the key "" replaces the whole
    caption.
    """
    if is_dropped(params, rng, epoch):
        return ""
    return _compose(caption, params, rng, step, max_train_steps, replacements)


def is_dropped(params: SubsetParams, rng: random.Random, epoch: int) -> bool:
    """Whether the whole caption is left out this time. Consumes one number of `rng` at most."""
    if params.caption_dropout_rate > 0 and rng.random() < params.caption_dropout_rate:
        return True
    every = params.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


class _FixedChoice(random.Random):
    """A generator that always takes the first alternative, keeps every tag and the order."""

    def random(self) -> float:
        return 1.0

    def choice(self, options):
        return options[0]

    def shuffle(self, items) -> None:
        return None


_FIXED_CHOICE = _FixedChoice()


def deterministic_caption(caption: str, params: SubsetParams, replacements: Replacements | None = None) -> str:
    """The caption without its random parts: what a text cache stores and validation uses.

    First line, first alternative, all tags in their order, no dropout; prefix, suffix and separators as always.
    """
    return _compose(caption, params, _FIXED_CHOICE, step=0, max_train_steps=0, replacements=replacements, warm_up=False)


def random_caption_settings(params: SubsetParams) -> list[str]:
    """The settings of a subset that make its captions random, and so unfit for a text cache."""
    return [name for name in RANDOM_SETTINGS if getattr(params, name)]


def _compose(
    caption: str,
    params: SubsetParams,
    rng: random.Random,
    step: int,
    max_train_steps: int,
    replacements: Replacements | None,
    *,
    warm_up: bool = True,
) -> str:
    limit = warm_up_limit(params, step, max_train_steps) if warm_up else None
    categories = parsed_caption(caption) if params.reads_json else None
    if categories is None:
        caption = _choose_line(caption, params, rng)
    else:
        caption = categories.compose(
            joint_of("", params.caption_separator), rng, shuffle=params.shuffle_caption,
            dropout=params.caption_tag_dropout_rate,
            limit=None if limit is None else _warmed_up(len(categories.tags) - len(categories.fixed), params, limit),
        )
    if params.caption_prefix:
        caption = f"{params.caption_prefix} {caption}"
    if params.caption_suffix:
        caption = f"{caption} {params.caption_suffix}"
    if params.enable_wildcard:
        caption = expand_wildcards(caption, rng)
    joint = joint_of(caption, params.caption_separator)
    if categories is None:
        caption = _process_tags(caption, params, rng, limit, joint)
    if params.secondary_separator:
        caption = _with_joint(caption, params.secondary_separator, "," if params.caption_separator == "," else joint)
    return replaced(caption, replacements, rng)


def replaced(caption: str, replacements: Replacements | None, rng: random.Random) -> str:
    """The caption with the replacements of textual inversion; see `process_caption`."""
    for old, new in (replacements or {}).items():
        text = new if isinstance(new, str) else rng.choice(list(new))
        if isinstance(old, str):
            caption = text if old == "" else caption.replace(old, text)
        else:
            caption = old.sub(lambda _, text=text: text, caption)
    return caption


def _choose_line(caption: str, params: SubsetParams, rng: random.Random) -> str:
    """The line is chosen before prefix and suffix are attached, so that every line carries them."""
    if "\n" not in caption or (params.whole_captions and not params.enable_wildcard):
        return caption
    lines = caption.split("\n")
    return rng.choice(lines) if params.enable_wildcard else lines[0]


def expand_wildcards(text: str, rng: random.Random) -> str:
    """Replace each {a|b|c} by one alternative; {{ and }} are literal braces. No nesting, no weights."""
    text = text.replace("{{", OPEN_BRACE).replace("}}", CLOSE_BRACE)
    text = WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(OPEN_BRACE, "{").replace(CLOSE_BRACE, "}")


def warm_up_limit(params: SubsetParams, step: int, max_train_steps: int) -> tuple[int, int] | None:
    """(step, warm-up steps) while the token warm-up lasts, else None. Below 1 the setting is a part of all steps."""
    steps = params.token_warmup_step
    if steps < 1:
        steps = math.floor(steps * max_train_steps)
    return (step, steps) if step < steps else None


def _process_tags(
    caption: str, params: SubsetParams, rng: random.Random, warm_up: tuple[int, int] | None, joint: str
) -> str:
    """Fixed head, flexible middle, fixed tail; the middle is warmed up, shuffled and thinned."""
    has_separator = bool(params.keep_tokens_separator) and params.keep_tokens_separator in caption
    active = params.shuffle_caption or params.token_warmup_step > 0 or params.caption_tag_dropout_rate > 0
    if not active and not has_separator:
        return caption
    tail: list[str] = []
    if has_separator:
        first, _, rest = caption.partition(params.keep_tokens_separator)
        middle, _, last = rest.partition(params.keep_tokens_separator)
        head, flexible, tail = (split_tags(part, params.caption_separator) for part in (first, middle, last))
    else:
        tags = split_tags(caption, params.caption_separator)
        head, flexible = tags[: params.keep_tokens], tags[params.keep_tokens :]
    if warm_up is not None:
        flexible = flexible[: _warmed_up(len(flexible), params, warm_up)]
    if params.shuffle_caption:
        rng.shuffle(flexible)
    if params.caption_tag_dropout_rate > 0:
        flexible = [tag for tag in flexible if rng.random() >= params.caption_tag_dropout_rate]
    return joint.join([*head, *flexible, *tail])


def _warmed_up(count: int, params: SubsetParams, warm_up: tuple[int, int]) -> int:
    """How many of `count` tags are used at a step of the warm-up."""
    step, steps = warm_up
    return max(math.floor(step * (count - params.token_warmup_min) / steps) + params.token_warmup_min, 0)


def split_tags(text: str, separator: str) -> list[str]:
    """Stripped tags; empty ones are left out."""
    parts = map(str.strip, text.split(separator) if separator else [text])
    return [part for part in parts if part]


def joint_of(caption: str, separator: str) -> str:
    """What joins the tags of a caption again: the separator and a space, without the space where the caption writes
    none behind its first separator. A comma always has one."""
    if separator == "," or not separator.strip() or separator[-1:].isspace():
        return ", " if separator == "," else separator
    behind = caption.partition(separator)[2][:1]
    return separator if behind and not behind.isspace() else f"{separator} "


def _with_joint(caption: str, separator: str, joint: str) -> str:
    """The caption with `joint` for every `separator`; a space of the joint takes the place of those around the
    separator."""
    if not joint.endswith(" "):
        return caption.replace(separator, joint)
    return joint.join(part.strip(" ") for part in caption.split(separator))


# ---------------------------------------------------------------- reading


def dotted(extension: str) -> str:
    return extension if extension.startswith(".") or not extension else f".{extension}"


def caption_ending(params: SubsetParams) -> str | None:
    """What the name of a caption file has in place of its image's extension; None where there are no such files. Of a
    dataset without subsets, what has a dot stays as it is: `_cap.txt`."""
    extension = params.caption_extension
    if extension is None or (params.whole_captions and "." in extension):
        return extension
    return dotted(extension)


def caption_endings(params: SubsetParams) -> list[str]:
    """What the names of caption files may have in place of their images' extension, best first."""
    ending, first = caption_ending(params), [JSON] if params.prefer_json else []
    return first if ending is None or ending in first else [*first, ending]


def face_numbers(path: str) -> tuple[int, int, int, int] | None:
    """(centre x, centre y, width, height) of a face when the file name ends with these as `_cx_cy_w_h`, else None."""
    parts = os.path.splitext(os.path.basename(path))[0].rsplit("_", 4)
    if len(parts) != 5 or not all(re.fullmatch(r"\d+", part) for part in parts[1:]):
        return None
    return tuple(int(part) for part in parts[1:])  # type: ignore[return-value]


def caption_paths(image_path: str, params: SubsetParams) -> list[str]:
    """Where the caption of an image may lie, best place first, with `prefer_json` that of a JSON file. Images cut out
    around faces share the caption of the picture that they come from: with face crop on, `img_10_20_30_40.png` also
    takes `img.txt`."""
    stem = stem_of(image_path)
    stems = [stem]
    if params.face_crop_aug_range is not None and face_numbers(image_path) is not None:
        stems.append(stem.rsplit("_", 4)[0])
    return [stem + ending for stem in stems for ending in caption_endings(params)]


def read_caption(image_path: str, params: SubsetParams) -> str | None:
    """The raw caption of an image from its caption file; None when there is no file, "" when the file is empty.

    Without wildcards it is the first line (the whole text with `whole_captions`); with them all lines that are not
    blank, joined by newlines. A byte order mark is removed. Raises ConfigError with the path when the file is not
    UTF-8, or no caption in JSON where it should be one.
    """
    for path in caption_paths(image_path, params):
        try:
            text = read_bytes(path).removeprefix(codecs.BOM_UTF8).decode("utf-8")
            if params.reads_json and path.endswith(JSON):
                return caption_of_json(text, path)
            return caption_of_text(text if "\r" not in text else text.replace("\r\n", "\n").replace("\r", "\n"), params)
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    return None


def caption_of_text(text: str, params: SubsetParams) -> str:
    """The raw caption in the text of a caption file."""
    if params.enable_wildcard:  # not splitlines, which also cuts at form feeds and Unicode separators
        return "\n".join(line.strip() for line in text.split("\n") if line.strip())
    return text.strip() if params.whole_captions else text.partition("\n")[0].strip()


def metadata_caption(entry: Mapping[str, Any], params: SubsetParams) -> str:
    """The raw caption of a metadata entry: caption, separator, tags; with wildcards the tags follow every line."""
    separator = params.caption_separator
    caption = entry.get("caption") or ""
    tags = entry.get("tags") or ""
    if not isinstance(tags, str):
        tags = (separator if separator == "," else joint_of("", separator)).join(str(tag) for tag in tags)
    if separator != ",":
        separator = joint_of(f"{caption}{tags}", separator)
    if params.enable_wildcard:
        tags = tags.replace("\n", separator)
        lines = [line for line in caption.split("\n") if line.strip()]
        if not lines:
            return tags
        return "\n".join(f"{line}{separator}{tags}" if tags else line for line in lines)
    return f"{caption}{separator}{tags}" if caption and tags else caption or tags


def tag_frequency(texts: Iterable[tuple[str, SubsetParams]]) -> dict[str, int]:
    """How many captions (or tag lists of metadata) hold each tag: split as training splits them, stripped, in lower
    case. With wildcards a caption holds the tags of all its lines and alternatives."""
    counts: dict[str, int] = {}
    for text, params in texts:
        categories = parsed_caption(text) if params.reads_json else None
        if categories is not None:
            tags = list(categories.tags)
        else:
            tags = [tag for caption in _possible_captions(text, params) for tag in _tags_of(caption, params)]
        for tag in dict.fromkeys(map(str.lower, tags)):
            counts[tag] = counts.get(tag, 0) + 1
    return counts


def tags_of_folders(items: Iterable[ImageItem]) -> dict[str, dict[str, int]]:
    """Folder (of captions) or metadata file (of its `tags` only) -> tag -> number of images that have it."""
    texts: dict[str, list[tuple[str, SubsetParams]]] = {}
    of_subset: dict[int, list[tuple[str, SubsetParams]]] = {}
    for item in items:
        subset = item.subset
        if id(subset) not in of_subset:
            of_subset[id(subset)] = texts.setdefault(subset_name(subset), [])
        of_subset[id(subset)].append(
            (item.captions_extra.get("tags", "") if subset.metadata_file else item.caption, subset)
        )
    return {name: tag_frequency(entries) for name, entries in texts.items()}


def subset_name(subset: SubsetParams) -> str:
    """The base name of a subset's folder or metadata file, as metadata records it."""
    _, path = subset.source or ("", "")
    return os.path.basename(os.path.normpath(path))


def _possible_captions(text: str, params: SubsetParams) -> Iterable[str]:
    """Every line; with wildcards each alternative once, beside the first one of the others."""
    return _with_alternatives(text) if params.enable_wildcard else text.split("\n")


def _with_alternatives(text: str) -> Iterable[str]:
    for line in text.split("\n"):
        groups = [
            match[1].split("|")
            for match in WILDCARD.finditer(line.replace("{{", OPEN_BRACE).replace("}}", CLOSE_BRACE))
        ]
        yield expand_wildcards(line, _Picks([0] * len(groups)))
        for place, group in enumerate(groups):
            for number in range(1, len(group)):
                yield expand_wildcards(line, _Picks([number if i == place else 0 for i in range(len(groups))]))


class _Picks(_FixedChoice):
    """Takes the alternatives of these numbers, in turn."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = iter(numbers)

    def __new__(cls, numbers: Sequence[int]) -> _Picks:
        return super().__new__(cls)

    def choice(self, options):
        return options[next(self._numbers)]


def _tags_of(caption: str, params: SubsetParams) -> list[str]:
    for separator in (params.keep_tokens_separator, params.secondary_separator):
        if separator:
            caption = caption.replace(separator, params.caption_separator or ",")
    return split_tags(caption, params.caption_separator)
