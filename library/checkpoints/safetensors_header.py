"""The header of a safetensors file, checked before anything in it is used.

What the format's own library accepts is accepted, and nothing else: names and shapes of a file that passes can be
trusted, its tensors follow each other without a hole, and all of them are there.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.core.errors import CheckpointError

_DTYPE_ATTRIBUTES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, own) for name, own in _DTYPE_ATTRIBUTES.items() if hasattr(torch, own)
}
"""names in a header -> types that this torch has"""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_REMEMBERED_BYTES = 4_000_000  # more than any model's header
_LARGEST = 2**63 - 1
_DAMAGED = "is not a safetensors file: its header is damaged"


@dataclass(frozen=True)
class TensorInfo:
    """Entry of a header. `start` and `end` are byte positions after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def as_meta(self) -> Tensor:
        """A tensor of this shape and type without data."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Names with shapes, and the metadata, of a safetensors file; no tensor is read.

    CheckpointError when the file is missing, empty, truncated, damaged or something else; the message says what it
    looks like.
    """
    infos, metadata, _ = read_header_and_start(path)
    return infos, metadata


def read_header_and_start(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """As `read_header`, and the byte position of the first tensor in the file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path} is a folder; a safetensors file is needed here")
        if not stat.S_ISREG(mode):  # a pipe would be waited for
            raise CheckpointError(f"{path} is no file but a pipe or a device; a safetensors file is needed here")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
            length = header_bytes(start)
            if not length:
                raise CheckpointError(f"{path} is not a safetensors file: {_looks_like(start, size)}")
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(text) < length:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes, less than its header of {length} bytes; fetch it again"
        )
    return *_parse_header(path, text, size - 8 - length), 8 + length


def header_bytes(start: bytes) -> int:
    """The length of the header by the first bytes of a file (9 or more); 0 when it is no safetensors file."""
    length = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
    return length if 2 <= length <= MAX_HEADER_BYTES and start[8] in b"{ \t\r\n" else 0


def _parse_header(
    path: str | os.PathLike, text: bytes, data_bytes: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        read = _checked_header if len(text) <= _REMEMBERED_BYTES else _checked_header.__wrapped__
        infos, metadata, needed = read(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} {_DAMAGED} (values are nested too deeply)") from None
    except ValueError as error:
        raise CheckpointError(f"{path} {_DAMAGED} ({str(error)[:300]})") from error
    if needed > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: {data_bytes} of {needed} bytes of tensors are there; fetch it again"
        )
    if needed < data_bytes:
        raise CheckpointError(
            f"{path} is damaged: {data_bytes - needed} bytes follow its last tensor that belong to none; fetch it again"
        )
    return dict(infos), dict(metadata)  # callers may change theirs


@functools.lru_cache(maxsize=32)
def _checked_header(text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Entries, metadata and the end of the last tensor. Remembered by content: a start reads the header of each of its
    files in many places, and a file that has changed in between is read anew."""
    header = json.loads(text.decode("utf-8"))  # without decode, json would guess other encodings
    if not isinstance(header, dict):
        raise ValueError("it is no object")
    metadata = _checked_metadata(header.pop("__metadata__", None))
    infos = {name: _checked_entry(name, entry) for name, entry in header.items()}
    return infos, metadata, _checked_places(infos)


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"__metadata__ is {_shown(metadata)}; an object is needed")
    for key, value in metadata.items():
        _check_text(key)
        if not isinstance(value, str):
            raise ValueError(f"__metadata__ has {_shown(value)} under '{key}'; only texts can stand there")
        _check_text(value)
    return metadata


def _checked_entry(name: str, entry: Any) -> TensorInfo:
    """The entry of a tensor when each of its parts is what it has to be."""
    _check_text(name)
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of '{name}' is {_shown(entry)}; an object is needed")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        raise ValueError(f"the entry of '{name}' has no {', '.join(missing)}")
    kind, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"the shape of '{name}' is {_shown(shape)}; whole numbers of 0 or more are needed")
    if not isinstance(places, list) or len(places) != 2 or not all(map(_is_count, places)):
        raise ValueError(f"the place of '{name}' is {_shown(places)}; two whole numbers of 0 or more are needed")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"stores '{name}' as {_shown(kind)}, which cannot be read here")
    dtype = DTYPES[kind]
    if math.prod(side for side in shape if side) * dtype.itemsize > _LARGEST:
        raise ValueError(f"the shape of '{name}' is {_shown(shape)}, more than any file holds")
    wanted = math.prod(shape) * dtype.itemsize
    if places[1] - places[0] != wanted:
        raise ValueError(
            f"'{name}' has {places[1] - places[0]} bytes; its shape {_shown(shape)} in {kind} needs {wanted}"
        )
    return TensorInfo(dtype, tuple(shape), *places)


def _checked_places(infos: Mapping[str, TensorInfo]) -> int:
    """The end of the last tensor. ValueError when tensors overlap or leave a hole."""
    position = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            what = (
                "overlaps the tensor before it"
                if info.start < position
                else f"leaves {info.start - position} bytes before it unused"
            )
            raise ValueError(f"'{name}' {what}")
        position = info.end
    return position


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _check_text(text: str) -> None:
    """ValueError for a text with half a surrogate pair, which JSON can spell and no other reader takes."""
    if not text.isascii():
        text.encode("utf-8")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _looks_like(start: bytes, size: int) -> str:
    """What a file that is no safetensors file seems to be, by its first bytes."""
    text = start.lstrip().lower()
    if size == 0:
        return "it is empty (0 bytes)"
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return "it is a pickle (a PyTorch .pt/.ckpt/.bin file); convert it to safetensors first"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably a failed download"
    if text.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; fetch the real file with git lfs pull"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file, which is for inference only"
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        return "it is an image"
    return "its first bytes are those of no known model file"
