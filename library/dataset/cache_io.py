"""Cache files: names, keys, what is recorded with the data, and when a file may be used.

The arrays lie under the keys that the known trainers read. Beside them stands one record per image size, or per
caption, under a key that those ignore. It says what the data were made of, so that a stale cache is noticed; a file
without it (written by another trainer) is judged by its keys and shapes alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from library.core.errors import CheckpointError
from library.core.file_limits import path_within_limit, stem_of
from library.dataset.architectures import DataArchitecture
from library.dataset.npz_file import UNREADABLE, ArrayHeader, checksum, read_arrays, read_headers, write_arrays
from library.families.latents import Bucket

logger = logging.getLogger(__name__)

Array = np.ndarray | torch.Tensor

FORMAT_VERSION = 1
RECORD_KEY = "atelier_record"
EXIF_POLICY = "transposed"
"""How pictures are read: turned as their EXIF orientation says. Recorded, since latents of a turned picture differ."""
LATENT_KEYS = ("latents", "original_size", "crop_ltrb", "latents_flipped", "alpha_mask")


# ---- names -----------------------------------------------------------------------------------------------------------

def latents_npz_path(architecture: DataArchitecture, image_path: str, image_size: tuple[int, int]) -> str:
    """`<image without extension>_<WWWW>x<HHHH><suffix>`; the size is that of the image. A name that would be too long
    for the file system is cut and ends in a hash, here and for text outputs."""
    width, height = image_size
    return path_within_limit(stem_of(image_path), f"_{width:04d}x{height:04d}{architecture.latents_suffix}")


def text_npz_path(architecture: DataArchitecture, image_path: str) -> str:
    """`<image without extension><suffix>`; ValueError for a family whose text outputs are never cached."""
    if architecture.text_suffix is None:
        raise ValueError(f"{architecture.name} has no cache of text encoder outputs")
    return path_within_limit(stem_of(image_path), architecture.text_suffix)


def image_size_from_latents_path(
    architecture: DataArchitecture, image_path: str, npz_path: str
) -> tuple[int, int] | None:
    """(width, height) from the name of a cache file of exactly this image, or None when the file is another's."""
    found = re.search(r"_(\d+)x(\d+)$", npz_path.removesuffix(architecture.latents_suffix))
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    ending = f"{found[0]}{architecture.latents_suffix}" if found else ""
    is_own = found is not None and npz_path == path_within_limit(stem_of(image_path), ending)
    return size if is_own else None


def source_of(cache_path: str | None, path: str) -> str:
    """The name of a file as a cache of it records it: from the folder of the cache, with "/"."""
    folder = os.path.dirname(os.path.abspath(cache_path or path))
    try:
        return os.path.relpath(os.path.abspath(path), folder).replace(os.sep, "/")
    except ValueError:  # on another drive of Windows
        return os.path.abspath(path).replace(os.sep, "/")


def size_suffix(architecture: DataArchitecture, bucket: Sequence[int]) -> str:
    """`_<h>x<w>` of a picture, `_<F>x<h>x<w>` of a clip, in latent units. `bucket`, here and below: a Bucket or its
    key."""
    return "_" + "x".join(map(str, architecture.latents.latent_shape(bucket)[1:]))


# ---- identity of an image file ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ImageIdentity:
    """What is known of an image file, or of a folder with the frames of a clip. `content` is the sha256 of its bytes,
    "" while nobody needed it."""

    num_bytes: int
    mtime_ns: int
    content: str = ""

    @classmethod
    def of(cls, path: str, with_content: bool = False) -> ImageIdentity:
        stats = [os.stat(file) for file in _files_of(path)]
        size, newest = sum(status.st_size for status in stats), max((status.st_mtime_ns for status in stats), default=0)
        return cls(size, newest, file_content_id(path) if with_content else "")

    @classmethod
    def from_record(cls, values: Any) -> ImageIdentity | None:
        """None where nothing was recorded; what is damaged is the identity of no file."""
        if values is None:
            return None
        return cls(**values) if isinstance(values, dict) and values.keys() == asdict(cls(0, 0)).keys() else cls(-1, -1)

    def is_still(self, path: str) -> bool:
        """Whether the file is the one that was recorded: same size and time, or same bytes (a copied data set)."""
        now = ImageIdentity.of(path)
        if now.num_bytes != self.num_bytes:
            return False
        return now.mtime_ns == self.mtime_ns or file_content_id(path) == self.content


def file_content_id(path: str) -> str:
    """32 hex digits of the sha256 of a file, or of the files of a folder."""
    stamps = tuple((file, (status := os.stat(file)).st_size, status.st_mtime_ns) for file in _files_of(path))
    is_large = sum(size for _, size, _ in stamps) >= _WORTH_REMEMBERING
    return (_content_id if is_large else _content_id.__wrapped__)(stamps)


_WORTH_REMEMBERING = 1 << 24
"""bytes of a file that many clips are cut out of"""


@functools.lru_cache(maxsize=4096)
def _content_id(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Of files by name, size and time, which change when a file does."""
    digest = hashlib.sha256()
    for path, _, _ in stamps:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _files_of(path: str) -> list[str]:
    """The file, or the files of a folder of frames."""
    if not os.path.isdir(path):
        return [path]
    with os.scandir(path) as entries:
        return sorted(entry.path for entry in entries if entry.is_file())


# ---- latents ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class LatentsRecord:
    """What cached latents of one size were made of."""

    model: str
    """identity of the VAE file, "" when unknown"""
    latent_space: str
    resized: tuple[int, int]
    interpolation: str | None
    image: ImageIdentity | None = None
    pictures: Mapping[str, ImageIdentity] = field(default_factory=dict)
    """those beside the image that conditions were made of; not in files of families without"""
    manner: str = ""
    """what the latents hang on beside the VAE's file, in words; not in files where that is nothing"""
    pieces: str | None = None
    """how the VAE computed, in words, "" = at once; None = nothing is known of it, as where a run has no VAE"""
    made_with: Mapping[str, str] = field(default_factory=dict)
    """settings of a clip by which the reason is told, name -> value; not in files of pictures"""
    source: str = ""
    """the file that they were made of, from the folder of the cache; in tensor files"""
    listed_in: str = ""
    """the folder or list that named the source, in the same way"""
    frame_count: int | None = None
    """frames of the clip; not in files of pictures"""
    exif: str = EXIF_POLICY
    version: int = FORMAT_VERSION
    checksums: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LatentArrays:
    """One picture or clip at one size, as stored: npz files hold float32, tensor files what was encoded. `conditions`:
    what the family caches beside latents, by name."""

    latents: Array  # [C, h, w] or [C, F, h, w]
    original_size: Array  # [2] int64 (width, height)
    crop_ltrb: Array  # [4]
    latents_flipped: Array | None = None  # as latents, encoded from the mirrored image
    alpha_mask: Array | None = None  # [H, W] or [F, H, W] float32, in pixels
    conditions: Mapping[str, Array] = field(default_factory=dict)
    conditions_flipped: Mapping[str, Array] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Key without a suffix -> array, in the number formats of npz files."""
        always = {
            "latents": _float32(self.latents),
            "original_size": np.asarray(self.original_size, np.int64),
            "crop_ltrb": np.asarray(self.crop_ltrb, np.float64),
        }
        others = {"latents_flipped": self.latents_flipped, "alpha_mask": self.alpha_mask, **self.conditions}
        others |= {flipped_key(name): array for name, array in self.conditions_flipped.items()}
        return always | {name: _float32(array) for name, array in others.items() if array is not None}


def _float32(array: Array) -> np.ndarray:
    """For files that know no bfloat16; whole numbers as they are."""
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).numpy()
    return np.asarray(array, np.float32 if array.dtype.kind == "f" else array.dtype)


def flipped_key(name: str) -> str:
    """Of a condition made from the mirrored image."""
    return f"{name}_flipped"


def save_latents(path: str, suffix: str, arrays: LatentArrays, record: LatentsRecord | None = None) -> None:
    """Write latents under keys with `suffix`; other sizes that the file holds stay. All older data of this size go, so
    that nothing of another model is left beside the new latents."""
    new = arrays.arrays()
    bare = {*LATENT_KEYS, RECORD_KEY}  # without a size in their names, as old caches have them
    merged = {
        key: array
        for key, array in existing_arrays(path).items()
        if not (key.endswith(suffix) if suffix else key in bare)
    }
    merged |= {name + suffix: array for name, array in new.items()}
    if record is not None:
        sums = {name + suffix: checksum(array) for name, array in new.items()}
        merged[RECORD_KEY + suffix] = record_array(replace(record, checksums=sums))
    write_arrays(path, merged)


def load_latents(path: str, architecture: DataArchitecture, bucket: Sequence[int]) -> LatentArrays:
    """Latents of one size as they are stored. ValueError when the file has no such size, CheckpointError when it is
    damaged."""
    suffix = size_suffix(architecture, bucket)
    try:
        if f"latents{suffix}" not in (headers := read_headers(path)) and architecture.legacy_keys:
            suffix = ""
        if not _has_latents(headers, architecture, bucket, suffix):
            raise LatentsNotFound(f"latents{size_suffix(architecture, bucket)} not found in {path}")
        arrays = read_arrays(path, [name + suffix for name in LATENT_KEYS], headers)
        _check_others(
            headers, {f"latents_flipped{suffix}": headers[f"latents{suffix}"].shape, f"alpha_mask{suffix}": None},
            mask_rank=len(mask_shape(bucket)),
        )
    except LatentsNotFound:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"cache file {path} cannot be read ({error}); delete it and run again to make it anew") from error
    return LatentArrays(**{name: arrays.get(name + suffix) for name in LATENT_KEYS})


def load_conditions(
    path: str, architecture: DataArchitecture, bucket: Sequence[int], shapes: Mapping[str, tuple[int, ...]], *,
    flipped: bool
) -> dict[str, np.ndarray]:
    """What the family caches beside latents of one size. CheckpointError when it is not there, or damaged."""
    suffix = size_suffix(architecture, bucket)
    keys = {name: (flipped_key(name) if flipped else name) + suffix for name in shapes}
    try:
        headers = read_headers(path)
        if problem := _condition_problem(headers, {keys[name]: shape for name, shape in shapes.items()}):
            raise ValueError(problem)
        arrays = read_arrays(path, list(keys.values()), headers)
    except UNREADABLE as error:
        raise CheckpointError(
            f"cache file {path} cannot be read ({error}); delete it and run again to make it anew"
        ) from error
    return {name: arrays[key] for name, key in keys.items()}


def _condition_problem(headers: Mapping[str, ArrayHeader], wanted: Mapping[str, tuple[int, ...]]) -> str | None:
    missing = [
        key for key, shape in wanted.items()
        if key not in headers or not (fits(found := headers[key].shape, shape) and headers[key].holds("fiu", found))
    ]  # fmt: skip
    return f"no {missing[0]}" if missing else None


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a shape is the wanted one, in which -1 stands for any size."""
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted))


def mask_shape(bucket: Sequence[int]) -> tuple[int, ...]:
    """Of the weights of a sample's pixels: [H, W] of a picture, [F, H, W] of a clip, of a section in frames of its
    latents."""
    width, height, frames, kind = Bucket(*bucket)
    return (height, width) if frames == 1 else (kind.section_frames or frames, height, width)


def _check_others(
    headers: Mapping[str, ArrayHeader], wanted: Mapping[str, tuple[int, ...] | None], *, mask_rank: int
) -> None:
    """ValueError when an array that need not be there is, and cannot be used. None: any sides of a mask."""
    for key, shape in wanted.items():
        header = headers.get(key)
        if header is not None and not header.holds(
            "f", header.shape if shape is None and len(header.shape) == mask_rank else shape
        ):
            raise ValueError(f"{key} holds {header.dtype} of shape {list(header.shape)}")


class LatentsNotFound(ValueError):
    """The file is sound and holds no latents of the wanted size."""


def latents_problem(
    path: str,
    architecture: DataArchitecture,
    bucket: Sequence[int],
    *,
    flip_aug: bool,
    alpha_mask: bool,
    expected: LatentsRecord | None = None,
    image_path: str | None = None,
    conditions: Mapping[str, tuple[int, ...]] | None = None,
    picture_paths: Mapping[str, str] = {},
) -> str | None:
    """Why the file cannot serve this size, or None when it can. A damaged file is a problem like another, with a
    warning.

    `expected` and `image_path` are compared with the record, where the file has one. `conditions`: shapes of what has
    to be beside the latents.
    """
    headers = headers_or_reason(path)
    if isinstance(headers, str):
        return headers
    suffix = size_suffix(architecture, bucket)
    if f"latents{suffix}" not in headers and architecture.legacy_keys:
        suffix = ""
    if not _has_latents(headers, architecture, bucket, suffix):
        return f"no latents of size {'x'.join(map(str, Bucket(*bucket).key))}"
    shape = headers[f"latents{suffix}"].shape
    flipped = headers.get(f"latents_flipped{suffix}")
    if flip_aug and (flipped is None or not flipped.holds("f", shape)):
        return "no mirrored latents"
    mask = headers.get(f"alpha_mask{suffix}")
    if alpha_mask and (mask is None or not mask.holds("f", mask_shape(bucket))):
        return "no alpha mask"
    for name, wanted in (conditions or {}).items():
        keys = (name, flipped_key(name)) if flip_aug else (name,)
        if problem := _condition_problem(headers, {key + suffix: wanted for key in keys}):
            return problem
    stored = read_record(path, headers, RECORD_KEY + suffix)
    if stored is None or expected is None:
        return None
    return latents_record_problem(stored, expected, image_path) or pictures_problem(stored, picture_paths)


def _has_latents(
    headers: Mapping[str, ArrayHeader], architecture: DataArchitecture, bucket: Sequence[int], suffix: str
) -> bool:
    needed = {
        "latents": ("f", architecture.latents.latent_shape(bucket)),
        "original_size": ("iuf", (2,)),
        "crop_ltrb": ("iuf", (4,)),
    }
    return all(f"{key}{suffix}" in headers and headers[f"{key}{suffix}"].holds(*what) for key, what in needed.items())


def latents_record_problem(stored: Mapping[str, Any], expected: LatentsRecord, image_path: str | None) -> str | None:
    """Why latents of which a file says `stored` are not those that are expected of this picture or clip; None when they
    are."""
    if stored.get("version") != expected.version:
        return f"record version {stored.get('version')}"
    if differ(stored.get("model"), expected.model) or differ(stored.get("latent_space"), expected.latent_space):
        return "made with another VAE"
    if stored.get("manner", "") != expected.manner:
        return f"encoded {stored.get('manner') or 'in one piece'}, and now {expected.manner or 'in one piece'}"
    pieces = stored.get("pieces", "")
    if expected.pieces is not None and pieces != expected.pieces:
        return f"encoded {pieces or 'in one piece'}, and now {expected.pieces or 'in one piece'}"
    if stored.get("resized") != list(expected.resized) or stored.get("interpolation") != expected.interpolation:
        return "made with other resize settings"
    if stored.get("exif") != expected.exif:
        return "made with another EXIF policy"
    made_with = stored.get("made_with")
    for name, value in expected.made_with.items():
        found = made_with.get(name) if isinstance(made_with, dict) else None
        if found != value:
            return f"made with {name} {found}, and now {value}"
    image = ImageIdentity.from_record(stored.get("image"))
    if image is not None and image_path is not None and not image.is_still(image_path):
        return "the image has changed"
    return None


def pictures_problem(stored: Mapping[str, Any], paths: Mapping[str, str]) -> str | None:
    """Of the pictures beside the image, which must be those that the file was made of."""
    recorded = stored.get("pictures")
    recorded = recorded if isinstance(recorded, dict) else {}
    for name, path in paths.items():
        picture = ImageIdentity.from_record(recorded.get(name))
        if picture is None or not picture.is_still(path):
            return f"{name} has changed"
    return None


# ---- shared ----------------------------------------------------------------------------------------------------------

def differ(stored: str | None, expected: str) -> bool:
    """Whether two identities contradict each other; an unknown one contradicts nothing."""
    return bool(stored and expected and stored != expected)


def headers_or_reason(path: str) -> dict[str, ArrayHeader] | str:
    """The headers, or a text that says why there are none; a damaged file is a warning, not an error."""
    if not os.path.isfile(path):
        return "no file"
    try:
        return read_headers(path)
    except UNREADABLE as error:
        logger.warning("cache file %s cannot be read (%s); it is made anew", path, error)
        return "unreadable"


def existing_arrays(path: str) -> dict[str, np.ndarray]:
    """All arrays of a file that is there and sound, else none."""
    if not os.path.isfile(path):
        return {}
    try:
        return read_arrays(path)
    except UNREADABLE:
        return {}


_ONLY_IF_SET = ("pictures", "manner", "pieces", "made_with", "source", "listed_in", "frame_count")
"""fields of records that files without them do not have"""


def record_text(record: Any) -> str:
    """A record (a dataclass) as JSON."""
    values = {name: value for name, value in asdict(record).items() if value or name not in _ONLY_IF_SET}
    return json.dumps(values, sort_keys=True)


def record_array(record: Any) -> np.ndarray:
    """`record_text` as an array, for npz files."""
    return np.asarray(record_text(record))


def read_record(path: str, headers: Mapping[str, ArrayHeader], key: str) -> dict[str, Any] | None:
    """The record, or None where there is none, or where the arrays are no longer those it was written with (another
    trainer has rewritten them and carried the record along). A damaged record is an empty one, which fits nothing."""
    if key not in headers:
        return None
    try:
        record = parse_record(read_arrays(path, [key], headers)[key]) if headers[key].holds("U", ()) else {}
    except UNREADABLE:
        return {}
    sums = record.get("checksums", {})
    if not isinstance(sums, dict):
        return {}
    return record if all(name in headers and headers[name].crc == crc for name, crc in sums.items()) else None


def parse_record(array: np.ndarray) -> dict[str, Any]:
    """The record in an array of `record_array`; empty when it is damaged."""
    try:
        record = json.loads(str(array))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}
