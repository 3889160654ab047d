"""Caches of clips in safetensors files, one sample each, in the format of the known video trainer
(tensor_cache_keys.py).

The header says for which architecture a file was made, of which size and how many frames, or of which caption. Beside
that stands our record (cache_io.py) as one more text, which that trainer passes over. A file without it is judged by
header, keys and shapes.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from library.core.errors import CheckpointError
from library.dataset.architectures import DataArchitecture
from library.dataset.cache_io import (
    LATENT_KEYS,
    RECORD_KEY,
    LatentArrays,
    LatentsNotFound,
    LatentsRecord,
    fits,
    flipped_key,
    latents_record_problem,
    mask_shape,
    pictures_problem,
    record_text,
)
from library.dataset.tensor_cache_keys import key_of, keys_by_name, parse_key
from library.dataset.text_cache_io import TextLayout, TextRecord, caption_hash, text_record_problem
from library.families.latents import Bucket
from library.families.record import TextKey
from library.safetensors_utils import MemoryEfficientSafeOpen, save_file_atomic

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1.0.1"
"""of the known format, as its headers say"""
MOST_NAN = 0.01
"""part of a tensor that may be NaN: these become 0 with a warning, and more than that stops"""


@dataclass(frozen=True)
class TensorFile:
    """The header of a cache file. `keys`: name in a batch -> key."""

    path: str
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, path: str) -> TensorFile:
        """Raises CheckpointError for a damaged file."""
        with MemoryEfficientSafeOpen(path) as file:
            names = {key: name for name, key in keys_by_name(file.keys()).items()}
            infos = {name: file.infos[key] for key, name in names.items()}
            return cls(
                path, {name: key for key, name in names.items()}, {name: info.shape for name, info in infos.items()},
                {name: info.dtype for name, info in infos.items()}, file.metadata(),
            )

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of the names that are there, in their number formats, with 0 in the place of NaN."""
        with MemoryEfficientSafeOpen(self.path) as file:
            return {
                name: without_nans(file.get_tensor(self.keys[name]), f"{self.keys[name]} of {self.path}")
                for name in names if name in self.keys
            }  # fmt: skip

    def nan_problem(self, names: Iterable[str]) -> str | None:
        """The first of these tensors in which too much is NaN; told of files that no record vouches for."""
        with MemoryEfficientSafeOpen(self.path) as file:
            for name in names:
                if name in self.keys and (problem := nan_problem(file.get_tensor(self.keys[name]))):
                    return f"{problem} in {name}"
        return None

    def record(self, suffix: str = "") -> dict[str, Any] | None:
        """Our record; None where there is none, or where the tensors are no longer those it was written with. A damaged
        one is an empty one, which fits nothing."""
        record = self._noted(suffix)
        if record is None:
            return None
        sums = record.get("checksums")
        if not isinstance(sums, dict):
            return {}
        with MemoryEfficientSafeOpen(self.path) as file:
            is_kept = all(key in file.infos and checksum(file.get_tensor(key)) == crc for key, crc in sums.items())
        return record if is_kept else None

    def _noted(self, suffix: str) -> dict[str, Any] | None:
        """The record as it stands there."""
        text = self.metadata.get(RECORD_KEY + suffix)
        try:
            record = None if text is None else json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return record if record is None or isinstance(record, dict) else {}

    def listed_in(self) -> str | None:
        """The folder or list that our record says; None in a file of another program."""
        record = self._noted("")
        return None if record is None else str(record.get("listed_in", ""))


def checksum(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy()) if flat.numel() else 0


def without_nans(tensor: Tensor, what: str) -> Tensor:
    """The tensor with 0 in the place of NaN, which a warning counts. CheckpointError, where more than MOST_NAN of it
    are: nothing could be learned from it."""
    bad = _nans(tensor)
    count = int(bad.sum())
    if not count:
        return tensor
    if problem := nan_problem(tensor):
        raise CheckpointError(
            f"{what}: {problem}, and at most {MOST_NAN:.0%} may be; delete the file and make it anew, with the model in"
            " bfloat16 or float32"
        )
    logger.warning("%s: %d of %d numbers are NaN and count as 0", what, count, tensor.numel())
    return tensor.masked_fill(bad, 0) if tensor.itemsize > 1 else tensor.float().masked_fill(bad, 0).to(tensor.dtype)


def _nans(tensor: Tensor) -> Tensor:
    """Where a tensor of any number format is NaN."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=torch.bool)
    return torch.isnan(tensor.float() if tensor.itemsize == 1 else tensor)  # 8-bit numbers have no operations


def nan_problem(tensor: Tensor) -> str | None:
    """In words, where more of a tensor is NaN than may be."""
    count = int(_nans(tensor).sum())
    return f"{count} of {tensor.numel()} numbers are NaN" if count > MOST_NAN * tensor.numel() else None


def header_or_reason(path: str) -> TensorFile | str:
    """The header, or a text that says why there is none; a damaged file is a warning, not an error."""
    if not os.path.isfile(path):
        return "no file"
    try:
        return TensorFile.of(path)
    except CheckpointError as error:
        logger.warning("cache file %s cannot be used (%s); it is made anew", path, error)
        return "unreadable"


def architecture_id(architecture: DataArchitecture) -> str:
    """What headers of the family's caches say."""
    return architecture.clips.long if architecture.clips else architecture.name


def architecture_problem(file: TensorFile, architecture: DataArchitecture) -> str | None:
    found, wanted = file.metadata.get("architecture"), architecture_id(architecture)
    return f"made for {found}, and not for {wanted}" if found not in (None, wanted) else None


# ---- latents ---------------------------------------------------------------------------------------------------------

def save_latents(
    path: str, architecture: DataArchitecture, bucket: Sequence[int], arrays: LatentArrays,
    record: LatentsRecord | None = None
) -> None:
    """Write one sample; what the file held before is gone. A picture has an axis of one frame in the file."""
    named = {"latents": arrays.latents, "latents_flipped": arrays.latents_flipped, **arrays.conditions}
    named |= {flipped_key(name): value for name, value in arrays.conditions_flipped.items()}
    tensors = {name: torch.as_tensor(value) for name, value in named.items() if value is not None}
    size = _with_frames(tensors["latents"]).shape[-3:]
    data = {}
    for name, tensor in tensors.items():
        tensor = _with_frames(tensor) if name.split("_")[0] == "latents" else tensor
        key = key_of(name, tensor.dtype, size)
        data[key] = without_nans(tensor, f"{key} of {path}")
    if arrays.alpha_mask is not None:
        data["alpha_mask"] = torch.as_tensor(arrays.alpha_mask, dtype=torch.float32)
    width, height = (int(side) for side in arrays.original_size)
    metadata = {
        "architecture": architecture_id(architecture), "width": str(width), "height": str(height),
        "format_version": FORMAT_VERSION,
    }  # fmt: skip
    frames = record.frame_count if record is not None else _frames_of(bucket)
    if frames is not None:
        metadata["frame_count"] = str(frames)
    if record is not None:
        sums = {key: checksum(tensor) for key, tensor in data.items()}
        metadata[RECORD_KEY] = record_text(replace(record, checksums=sums))
    save_file_atomic(data, path, metadata)


def _with_frames(latents: Tensor) -> Tensor:
    """[C, F, h, w]; a picture is a clip of one frame."""
    return latents.unsqueeze(1) if latents.ndim == 3 else latents


def _frames_of(bucket: Sequence[int]) -> int | None:
    frames = Bucket(*bucket).frames
    return frames if frames > 1 else None


def latents_problem(
    path: str, architecture: DataArchitecture, bucket: Sequence[int], *, flip_aug: bool, alpha_mask: bool,
    expected: LatentsRecord | None = None, image_path: str | None = None,
    conditions: Mapping[str, tuple[int, ...]] | None = None, picture_paths: Mapping[str, str] = {},
) -> str | None:
    """As `cache_io.latents_problem`."""
    file = header_or_reason(path)
    if isinstance(file, str):
        return file
    wanted = {"latents": architecture.latents.latent_shape(bucket), **(conditions or {})}
    if flip_aug:
        wanted |= {flipped_key(name): shape for name, shape in wanted.items()}
    if alpha_mask:
        wanted["alpha_mask"] = mask_shape(bucket)
    if problem := architecture_problem(file, architecture) or _frames_problem(file, expected):
        return problem
    if problem := _shapes_problem(file, wanted):
        return problem
    stored = file.record() if expected is not None else None
    if stored is None:
        return file.nan_problem(wanted)
    return latents_record_problem(stored, expected, image_path) or pictures_problem(stored, picture_paths)


def _frames_problem(file: TensorFile, expected: LatentsRecord | None) -> str | None:
    found = file.metadata.get("frame_count")
    if expected is None or expected.frame_count is None or found in (None, str(expected.frame_count)):
        return None
    return f"made of {found} frames, and now {expected.frame_count}"


def _shapes_problem(file: TensorFile, wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    for name, shape in wanted.items():
        if name not in file.shapes:
            return f"no {name}"
        if not _fits(file.shapes[name], shape):
            return f"{name} of shape {list(file.shapes[name])}, needed: {list(shape)}"
        if name.split("_")[0] == "latents" and not file.dtypes[name].is_floating_point:
            return f"{name} holds {str(file.dtypes[name]).removeprefix('torch.')}"
    return None


def _fits(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """A picture may have its one frame in the file."""
    return fits(stored, wanted) or (len(wanted) == 3 and stored == (wanted[0], 1, *wanted[1:]))


def load_latents(path: str, architecture: DataArchitecture, bucket: Sequence[int]) -> LatentArrays:
    """As `cache_io.load_latents`, with tensors in the number formats of the file."""
    file, shape = TensorFile.of(path), architecture.latents.latent_shape(bucket)
    if problem := _shapes_problem(file, {"latents": shape}):
        raise LatentsNotFound(f"{path}: {problem}")
    tensors = file.read(LATENT_KEYS)
    known = {name: tensor.reshape(shape) for name, tensor in tensors.items() if name.startswith("latents")}
    texts = [file.metadata.get(side, "") for side in ("width", "height")]
    size = [int(text) if text.isdecimal() and len(text) < 9 else 0 for text in texts]
    return LatentArrays(
        **known, alpha_mask=tensors.get("alpha_mask"), original_size=torch.tensor(size), crop_ltrb=torch.zeros(4)
    )


def load_conditions(
    path: str, architecture: DataArchitecture, bucket: Sequence[int], shapes: Mapping[str, tuple[int, ...]], *,
    flipped: bool
) -> dict[str, Tensor]:
    """As `cache_io.load_conditions`, with tensors in the number formats of the file."""
    file = TensorFile.of(path)
    names = {name: flipped_key(name) if flipped else name for name in shapes}
    if problem := _shapes_problem(file, {names[name]: shape for name, shape in shapes.items()}):
        raise CheckpointError(f"cache file {path} cannot be used ({problem}); delete it and run again to make it anew")
    tensors = file.read(list(names.values()))
    return {name: tensors[names[name]].reshape(tuple(shape)) for name, shape in shapes.items()}


# ---- text ------------------------------------------------------------------------------------------------------------

def _stored_name(name: str, suffix: str) -> str:
    """Of an output of a caption that is not the file's first: `<hash>.<name>`, which no other reader takes for the
    first one's."""
    return f"{suffix.removeprefix('_')}.{name}" if suffix else name


def _suffix_in(name: str) -> str:
    """The suffix of the caption that a stored name belongs to."""
    head, point, _ = name.partition(".")
    return f"_{head}" if point else ""


def save_text(
    path: str, architecture: DataArchitecture, layout: TextLayout, outputs: Mapping[str, Tensor], record: TextRecord, *,
    caption: str, in_use: frozenset[str] = frozenset()
) -> str:
    """Write outputs of one caption and return the suffix of their keys ("" of the file's first caption, the one that
    other trainers read). Outputs of other encoders for the same caption stay, and so do captions that `in_use` names by
    their hashes.

    CheckpointError when the file belongs to another architecture.
    """
    old = header_or_reason(path)
    file = None if isinstance(old, str) else old
    if file is not None and (problem := architecture_problem(file, architecture)):
        raise CheckpointError(f"{path} was {problem}; give the datasets cache directories of their own")
    first = None if file is None else _first_caption(file)
    suffix = record.suffix if first != record.caption and first in in_use else ""
    data, metadata, sums = _kept(file, record, suffix, in_use)
    new = {
        key_of(_stored_name(name, suffix), tensor.dtype, is_list=name in layout.lists): without_nans(
            tensor, f"{name} of {path}"
        )
        for name, tensor in outputs.items()
    }
    replaced = set(keys_by_name(new))
    data = {key: tensor for key, tensor in data.items() if parse_key(key).name not in replaced} | new
    if not suffix:
        metadata |= {
            "architecture": architecture_id(architecture), "caption1": caption, "format_version": FORMAT_VERSION
        }
    sums = {key: crc for key, crc in sums.items() if key in data} | {key: checksum(new[key]) for key in new}
    metadata[RECORD_KEY + suffix] = record_text(replace(record, checksums=sums))
    save_file_atomic(data, path, metadata)
    return suffix


def _first_caption(file: TensorFile) -> str | None:
    """Hash of the caption that other trainers find in the file."""
    text = file.metadata.get("caption1")
    return None if text is None else caption_hash(text)


def _kept(
    file: TensorFile | None, record: TextRecord, suffix: str, in_use: frozenset[str]
) -> tuple[dict[str, Tensor], dict[str, str], Mapping[str, int]]:
    """What stays of a file beside outputs that are written under `suffix`: tensors and metadata of captions in use, and
    other outputs of this caption that were made in the same way; of those the checksums too."""
    if file is None:
        return {}, {}, {}
    suffixes = {key.removeprefix(RECORD_KEY) for key in file.metadata if key.startswith(RECORD_KEY)} | {""}
    records = {found: file.record(found) for found in suffixes}
    captions = {found: str((records[found] or {}).get("caption")) for found in suffixes} | {"": _first_caption(file)}
    kept = {found for found in suffixes - {suffix} if captions[found] in in_use and captions[found] != record.caption}
    sums: Mapping[str, int] = {}
    if suffix in suffixes and captions[suffix] == record.caption:
        stored = records[suffix]
        if stored is None or text_record_problem(stored, record) is None:
            kept.add(suffix)
            sums = (stored or {}).get("checksums", {})
    metadata = {
        key: text for key, text in file.metadata.items()
        if (key.removeprefix(RECORD_KEY) if key.startswith(RECORD_KEY) else "") in kept
    }  # fmt: skip
    with MemoryEfficientSafeOpen(file.path) as opened:
        data = {key: opened.get_tensor(key) for name, key in file.keys.items() if _suffix_in(name) in kept}
    return data, metadata, sums


def find_text(
    path: str, architecture: DataArchitecture, layout: TextLayout, expected: TextRecord, *, needed: tuple[str, ...],
    accept_unrecorded: bool = True
) -> tuple[str | None, str]:
    """As `text_cache_io.find_text`. A file without a record says in its header which caption it holds."""
    file = header_or_reason(path)
    if isinstance(file, str):
        return None, file
    if problem := architecture_problem(file, architecture):
        return None, problem
    reasons = []
    for suffix in ("", expected.suffix):
        reason = _text_keys_problem(file, layout, suffix, needed, expected.max_token_length)
        if reason is None:
            stored = file.record(suffix)
            caption = _first_caption(file)
            if not suffix and caption not in (None, expected.caption):
                reason = "made with another caption"
            elif stored is not None:
                reason = text_record_problem(stored, expected)
            elif suffix or (caption is None and not accept_unrecorded):
                reason = "no record of its caption"
            else:
                reason = file.nan_problem(_stored_name(name, suffix) for name in needed)
        if reason is None:
            return suffix, ""
        reasons.append(reason)
    return None, reasons[0]


def keys_problem(
    path: str, architecture: DataArchitecture, layout: TextLayout, expected: TextRecord, needed: tuple[str, ...]
) -> str | None:
    """As `text_cache_io.keys_problem`."""
    file = header_or_reason(path)
    if isinstance(file, str):
        return file
    return architecture_problem(file, architecture) or _text_keys_problem(
        file, layout, "", needed, expected.max_token_length
    )


def _text_keys_problem(
    file: TensorFile, layout: TextLayout, suffix: str, needed: tuple[str, ...], max_token_length: int | None
) -> str | None:
    for key in layout.keys:
        name = _stored_name(key.name, suffix)
        if key.name not in needed or key.constant is not None:
            continue
        if name not in file.shapes:
            return f"no {key.name}"
        if problem := _text_key_problem(file, name, key):
            return problem
        if key.is_sized and max_token_length is not None and file.shapes[name][0] != max_token_length:
            return f"{key.name} has {file.shapes[name][0]} tokens, {max_token_length} are needed"
    return None


def _text_key_problem(file: TensorFile, name: str, key: TextKey) -> str | None:
    """Of a stored output: its rank and kind of numbers."""
    if len(file.shapes[name]) != key.rank:
        return f"{key.name} has shape {list(file.shapes[name])}"
    if file.dtypes[name].is_floating_point != key.dtype.startswith("float"):
        return f"{key.name} holds {str(file.dtypes[name]).removeprefix('torch.')}"
    return None


def load_text(
    path: str, layout: TextLayout, suffix: str = "", leave_out: frozenset[str] = frozenset()
) -> dict[str, Tensor]:
    """As `text_cache_io.load_text`, with tensors in the number formats of the file."""
    file = TensorFile.of(path)
    stored = {key.name: _stored_name(key.name, suffix) for key in layout.keys if key.name not in leave_out}
    for key in layout.keys:
        name = stored.get(key.name)
        if name in file.keys and (problem := _text_key_problem(file, name, key)):
            raise CheckpointError(f"cache file {path} cannot be used ({problem}); delete it and run again")
    tensors = file.read(list(stored.values()))
    return {name: tensors[key] for name, key in stored.items() if key in tensors}
