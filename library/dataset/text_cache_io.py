"""Cache files of text encoder outputs: layouts of the families, several captions in one file, validity."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from library.core.errors import CheckpointError, TrainingError
from library.dataset.cache_io import (
    FORMAT_VERSION,
    RECORD_KEY,
    differ,
    existing_arrays,
    headers_or_reason,
    parse_record,
    read_record,
    record_array,
)
from library.dataset.npz_file import UNREADABLE, ArrayHeader, checksum, read_arrays, read_headers, write_arrays
from library.families.record import FamilyRecord, TextKey
from library.families.registry import by_family

_STORED_KINDS = {"float": "f", "float32": "f", "bool": "biu"}
"""dtype of an output -> letters of numpy's `dtype.kind` that another trainer may have stored it in; the others are
whole numbers"""


@dataclass(frozen=True)
class TextLayout:
    """The conditioning of a family: `keys` in the order of the lists that plug-ins know; `flags`: options stored beside
    them that must be equal to use a file; `partial`: encoders that learn where a caller of the known classes says
    `is_partial` and no more; `foreign`: how the numbers in files of known trainers differ from ours."""

    keys: tuple[TextKey, ...]
    flags: tuple[str, ...] = ()
    partial: tuple[int, ...] = ()
    foreign: str = ""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(key.name for key in self.keys)

    @cached_property
    def lists(self) -> frozenset[str]:
        """Keys of which a batch has a list, one tensor for each caption."""
        return frozenset(key.name for key in self.keys if key.varlen)

    def made_by(self, encoders: Collection[int]) -> frozenset[str]:
        """The keys that change with any of these encoders: what cannot be cached while they learn."""
        if not encoders:  # asked in every step
            return frozenset()
        return frozenset(key.name for key in self.keys if not set(encoders).isdisjoint(key.encoders))

    def encoders_for(self, names: Collection[str]) -> frozenset[int]:
        """The encoders that must be in memory to make these keys."""
        return frozenset(encoder for key in self.keys if key.name in names for encoder in key.encoders)

    def named(
        self, outputs: Sequence[Any | None], origin: str = "the text encoders", *, has_batch: bool = True
    ) -> dict[str, Any]:
        """The list that strategies of plug-ins give, [B, ...] each or None, by name and without the None. `has_batch`:
        else of one caption, without B.

        Raises TrainingError for what is not the conditioning of the family; `origin` says whose list it is.
        """
        keys = self.keys if len(outputs) == len(self.keys) else tuple(key for key in self.keys if key.constant is None)
        if len(outputs) != len(keys):
            raise TrainingError(
                f"{origin} gave {len(outputs)} outputs; needed: {len(keys)}, {', '.join(key.name for key in keys)}"
            )
        found = {key.name: output for key, output in zip(keys, outputs) if output is not None}
        self.check(found, origin, has_batch=has_batch)
        return found

    def listed(self, conditioning: Mapping[str, Any]) -> list[Any | None]:
        """As plug-ins know it: in the order of the keys, None for what is not there."""
        return [conditioning.get(name) for name in self.names]

    def check(
        self, conditioning: Mapping[str, Any], origin: str = "the text encoders", *, has_batch: bool = True
    ) -> None:
        """Names, ranks and kinds of numbers; TrainingError says what is wrong and what is needed."""
        unknown = [name for name in conditioning if name not in self.names]
        if unknown:
            raise TrainingError(f"{origin} gave {', '.join(unknown)}; the conditioning has {', '.join(self.names)}")
        for key in self.keys:
            given = conditioning.get(key.name)
            if key.varlen and has_batch and isinstance(given, Sequence):
                for tensor in given:
                    _check_tensor(tensor, key, origin, has_batch=False)
            elif given is not None:
                _check_tensor(given, key, origin, has_batch)

    def check_complete(self, conditioning: Mapping[str, Any], origin: str) -> None:
        """TrainingError when a key that the model reads is not there."""
        missing = [key.name for key in self.keys if key.constant is None and key.name not in conditioning]
        if missing:
            raise TrainingError(f"{origin} gave no {', '.join(missing)}, which the model is conditioned on")


def _check_tensor(tensor: Any, key: TextKey, origin: str, has_batch: bool) -> None:
    """TrainingError for an output of another rank or kind of numbers."""
    if tensor.dim() != key.rank + has_batch:
        needed = f"{key.rank + has_batch} dimensions{', the batch first' if has_batch else ''}"
        raise TrainingError(f"{origin} gave {key.name} of shape {list(tensor.shape)}; needed: {needed}")
    if key.dtype == "float" and not tensor.is_floating_point():
        raise TrainingError(
            f"{origin} gave {key.name} as {str(tensor.dtype).removeprefix('torch.')}; needed: floating-point numbers"
        )


def layout_of(record: FamilyRecord) -> TextLayout | None:
    """The layout of a family's conditioning; None where it is not known."""
    if not record.conditioning:
        return None
    return TextLayout(record.conditioning, record.text_flags, record.learning_encoders, record.foreign_text)


TEXT_LAYOUTS: Mapping[str, TextLayout] = by_family(layout_of)


MERGED = "adapter merged into the text encoders"
"""in the settings of a record, in words"""


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """What cached text encoder outputs were made of."""

    caption: str
    """caption_hash of the encoded text"""
    model: str
    max_token_length: int | None = None
    is_weighted: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    """options that `model` and the length hang on too -> their values, by which the reason is told"""
    source: str = ""
    """the file whose caption it is, from the folder of the cache; in tensor files"""
    listed_in: str = ""
    """the folder or list that named the source, in the same way"""
    version: int = FORMAT_VERSION
    checksums: Mapping[str, int] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """Of the keys, for a caption that is not the file's first."""
        return f"_{self.caption[:8]}"


def caption_hash(caption: str) -> str:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()


def find_text(
    path: str, layout: TextLayout, expected: TextRecord, *, needed: tuple[str, ...], accept_unrecorded: bool = True
) -> tuple[str | None, str]:
    """(suffix of the keys that hold this caption, "") or (None, why there are none).

    `needed` are the outputs that must be there (all, or fewer in a partial cache). `accept_unrecorded`: whether bare
    keys that another trainer wrote may be taken for this caption (no, when the image has several captions in this run).
    """
    headers = headers_or_reason(path)
    if isinstance(headers, str):
        return None, headers
    reasons = []
    for suffix in ("", expected.suffix):
        reason = _text_keys_problem(headers, layout, suffix, needed, expected.max_token_length)
        if reason is None:
            stored = read_record(path, headers, RECORD_KEY + suffix)
            if stored is not None:
                reason = text_record_problem(stored, expected)
            elif suffix or not accept_unrecorded:
                reason = "no record of its caption"
            else:
                reason = _flags_problem(path, layout, expected)
        if reason is None:
            return suffix, ""
        reasons.append(reason)
    return None, reasons[0]


def keys_problem(path: str, layout: TextLayout, expected: TextRecord, needed: tuple[str, ...]) -> str | None:
    """Why the bare keys cannot serve any caption, or None: keys, shapes and flags are looked at, the record is not."""
    headers = headers_or_reason(path)
    if isinstance(headers, str):
        return headers
    reason = _text_keys_problem(headers, layout, "", needed, expected.max_token_length)
    return reason or _flags_problem(path, layout, expected)


def load_text(
    path: str, layout: TextLayout, suffix: str = "", leave_out: frozenset[str] = frozenset()
) -> dict[str, np.ndarray]:
    """The outputs by name, as stored, in the order of the layout; without those in `leave_out` and those not stored."""
    wanted = {key.name + suffix: key for key in layout.keys if key.name not in leave_out}
    try:
        headers = read_headers(path)
        for name, key in wanted.items():
            if name in headers and not _has_kind(headers[name], key):
                raise ValueError(f"{name} holds {headers[name].dtype}")
            if name in headers and len(headers[name].shape) != key.rank:
                raise ValueError(f"{name} has shape {list(headers[name].shape)}")
        arrays = read_arrays(path, list(wanted), headers)
    except UNREADABLE as error:
        raise CheckpointError(
            f"cache file {path} cannot be read ({error}); delete it and run again to make it anew"
        ) from error
    return {key.name: arrays[name] for name, key in wanted.items() if name in arrays}


def save_text(
    path: str, layout: TextLayout, outputs: Mapping[str, np.ndarray], record: TextRecord, *,
    in_use: frozenset[str] = frozenset()
) -> str:
    """Write the outputs of one caption and return the suffix of their keys.

    `in_use` holds the hashes of all captions that this run keeps in the file. Bare keys belong to the first of them;
    data of captions that nobody uses any more go.
    """
    existing = existing_arrays(path)
    kept = {
        suffix: caption
        for suffix, caption in _captions_in(existing).items()
        if caption in in_use and caption != record.caption
    }
    suffix = "" if "" not in kept else record.suffix
    names = [*(key.name for key in layout.keys), *layout.flags, RECORD_KEY]
    merged = {name + s: existing[name + s] for s in kept for name in names if name + s in existing}
    new = {name + suffix: array for name, array in outputs.items()}
    new |= {name + suffix: np.asarray(bool(record.flags[name])) for name in layout.flags}
    sums = {key: checksum(array) for key, array in new.items()}
    merged |= new | {RECORD_KEY + suffix: record_array(replace(record, checksums=sums))}
    write_arrays(path, merged)
    return suffix


def _captions_in(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Suffix -> caption hash of the captions that a text cache file holds."""
    return {
        key.removeprefix(RECORD_KEY): parse_record(array).get("caption", "")
        for key, array in arrays.items()
        if key.startswith(RECORD_KEY)
    }


def _text_keys_problem(
    headers: Mapping[str, ArrayHeader], layout: TextLayout, suffix: str, needed: tuple[str, ...],
    max_token_length: int | None
) -> str | None:
    for key in layout.keys:
        if key.name not in needed:
            continue
        header = headers.get(key.name + suffix)
        if header is None:
            return f"no {key.name}"
        if key.constant is not None:
            continue  # another trainer may store it in another shape; nobody reads it
        if len(header.shape) != key.rank:
            return f"{key.name} has shape {list(header.shape)}"
        if not _has_kind(header, key):
            return f"{key.name} holds {header.dtype}"
        if key.is_sized and max_token_length is not None and header.shape[0] != max_token_length:
            return f"{key.name} has {header.shape[0]} tokens, {max_token_length} are needed"
    missing = [
        name for name in layout.flags if name + suffix not in headers or not headers[name + suffix].holds("biu", ())
    ]
    return f"no {missing[0]}" if missing else None


def _has_kind(header: ArrayHeader, key: TextKey) -> bool:
    return header.holds(_STORED_KINDS.get(key.dtype, "iu"), header.shape)


def _flags_problem(path: str, layout: TextLayout, expected: TextRecord) -> str | None:
    stored = read_arrays(path, list(layout.flags))
    wrong = [name for name in layout.flags if bool(stored[name]) != bool(expected.flags[name])]
    return f"made with another {wrong[0]}" if wrong else None


def text_record_problem(stored: Mapping[str, Any], expected: TextRecord) -> str | None:
    """Why outputs of which a file says `stored` are not those that are expected of this caption; None when they are."""
    if stored.get("version") != expected.version:
        return f"record version {stored.get('version')}"
    if stored.get("caption") != expected.caption:
        return "made with another caption"
    settings = stored.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    for name in sorted(settings.keys() & expected.settings.keys()):
        if settings[name] != expected.settings[name]:
            return f"made with another {name}"
    if differ(stored.get("model"), expected.model):
        return "made with other text encoders"
    for name, option in (("max_token_length", "max_token_length"), ("is_weighted", "weighted_captions")):
        if stored.get(name) != getattr(expected, name):
            return f"made with another {option}"
    flags = stored.get("flags")
    for name, value in expected.flags.items():
        if not isinstance(flags, dict) or flags.get(name) != value:
            return f"made with another {name}"
    return None
