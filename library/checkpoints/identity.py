"""A cheap identity of a model file, by which a cache knows that it was made with another model."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from library.core.errors import CheckpointError
from library.core.text_files import open_file

BLOCK_BYTES = 64 * 1024
NUM_BLOCKS = 16
MAX_HEADER_BYTES = 100 * 1024 * 1024


def model_identity(path: str | os.PathLike[str] | None) -> str:
    """32 hex digits that stand for the content of a model file, of all files of a split one, or of a folder.

    sha256 over the safetensors header, the file size and 16 evenly spaced blocks of 64 KiB: about a megabyte is read,
    whatever the size of the file. Name, place and time of the file play no part, so that a copy has the same identity.
    An empty text for no path and for a name that is no file (a hub id).
    """
    if not path or not os.path.exists(path):
        return ""
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin", ".json") and p.is_file())
        return combined_identity(f"{p.relative_to(path).as_posix()}={_file_identity(p)}" for p in files)
    parts = _parts_of(path)
    if parts:
        return combined_identity(_file_identity(Path(part)) for part in parts)
    return _file_identity(path)


def _parts_of(path: Path) -> list[str] | None:
    """The files of a model in several, where `path` is one of them or their index, and all are there."""
    from library.checkpoints.loading import files_of_split_model

    try:
        return files_of_split_model(path)
    except CheckpointError:  # told when the model is read
        return None


def combined_identity(parts: Iterable[str]) -> str:
    """One identity for several (both text encoders of a family, say); order counts."""
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _file_identity(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(_safetensors_header(file, size))
        digest.update(struct.pack("<Q", size))
        for offset in _block_offsets(size):
            file.seek(offset)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:32]


def _safetensors_header(file, size: int) -> bytes:
    """Length field and header of a safetensors file; nothing for other files."""
    prefix = file.read(8)
    if len(prefix) < 8:
        return b""
    length = struct.unpack("<Q", prefix)[0]
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        return b""
    return prefix + file.read(length)


def _block_offsets(size: int) -> list[int]:
    """Starts of the blocks: the first at 0, the last ending at the end of the file; fewer in a small file."""
    if size <= BLOCK_BYTES:
        return [0]
    last = size - BLOCK_BYTES
    return sorted({last * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)})
