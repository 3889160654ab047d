"""Reading and writing npz files: headers without data, arrays read in one go, and writes that are either whole or not
there."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.lib import format as npy_format

from library.core.atomic_file import atomic_path
from library.core.text_files import require_file

FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # so that the same arrays give the same file
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError)
"""What reading a damaged npz raises, whichever part is damaged."""

ENTRY_BYTES = 30
"""of an entry's header in a zip file, before its name"""
MOST_UNPACKED = 1 << 30
"""bytes; caches are written as they are, and packed ones of other programs are smaller by far"""


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and dtype of an array in a file; `crc` is the checksum that the zip directory holds. `place`: where in the
    file its entry begins, and how long its npy header is; None where it is packed or not in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int
    place: tuple[int, int] | None = field(default=None, compare=False)

    def holds(self, kinds: str, shape: tuple[int, ...] | None) -> bool:
        """Whether the array has numbers of one of these kinds (letters of numpy's `dtype.kind`) in this machine's byte
        order, and this shape."""
        return self.dtype.kind in kinds and self.dtype.isnative and self.shape == shape


def read_headers(path: str | os.PathLike[str]) -> dict[str, ArrayHeader]:
    """Key -> header of every array; the data are not read. Raises one of UNREADABLE for a damaged file: one of an array
    that holds more or less than its header says, or would unpack to more than memory should hold."""
    require_file(path)
    with _only_unreadable(), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        unpacked = sum(info.file_size for info in infos if info.compress_size != info.file_size)
        if unpacked > MOST_UNPACKED:
            raise ValueError(f"its packed arrays would unpack to {unpacked} bytes")
        return {info.filename.removesuffix(".npy"): _header_of(archive, info) for info in infos}


def _header_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArrayHeader:
    if (
        info.file_size == info.compress_size and info.file_size > archive.start_dir
    ):  # it is stored as it is, in this file
        raise ValueError(f"{info.filename} is longer than the file")
    with archive.open(info) as member:
        version = npy_format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} has npy version {version}")
        size = member.read(2 if version == (1, 0) else 4)
        shape, in_fortran_order, dtype = _parsed(version, size + member.read(int.from_bytes(size, "little")))
        length = member.tell()
    num_bytes = info.file_size - length
    if any(side < 0 for side in shape) or num_bytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{info.filename} has {num_bytes} bytes, which is not {dtype} of shape {list(shape)}")
    is_plain = info.compress_type == zipfile.ZIP_STORED and not in_fortran_order and not dtype.hasobject
    return ArrayHeader(tuple(map(int, shape)), dtype, info.CRC, (info.header_offset, length) if is_plain else None)


@lru_cache(maxsize=1024)
def _parsed(version: tuple[int, int], header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype in the header of an npy file; thousands of files have the same ones."""
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    return read(io.BytesIO(header))


def read_arrays(
    path: str | os.PathLike[str], keys: list[str] | None = None, headers: Mapping[str, ArrayHeader] | None = None
) -> dict[str, np.ndarray]:
    """The named arrays, all without `keys`; absent ones are left out. Raises one of UNREADABLE for a damaged file.
    `headers`: those of the file, where the caller has read them.

    What is not packed is read straight into its array. It is not mapped: a program that rewrites a cache in its place
    would end the run without a word."""
    headers = read_headers(path) if headers is None else headers
    names = [name for name in (headers if keys is None else keys) if name in headers]
    with _only_unreadable():
        found = _plain_arrays(path, {name: headers[name] for name in names})
        if len(found) == len(names):
            return found
        with np.load(path, allow_pickle=False) as archive:  # packed, damaged, or another file than when it was opened
            return {name: archive[name] for name in names}


def _plain_arrays(path: str | os.PathLike[str], headers: Mapping[str, ArrayHeader]) -> dict[str, np.ndarray]:
    """Those that lie in the file as they are, and whole."""
    with open(path, "rb", buffering=0) as file:
        arrays = {name: _plain_array(file, header) for name, header in headers.items() if header.place is not None}
    return {name: array for name, array in arrays.items() if array is not None}


def _plain_array(file: io.FileIO, header: ArrayHeader) -> np.ndarray | None:
    """None where the checksum is another one."""
    offset, length = header.place or (0, 0)
    file.seek(offset)
    entry = file.read(ENTRY_BYTES)
    if len(entry) < ENTRY_BYTES:
        return None
    file.seek(sum(struct.unpack_from("<HH", entry, ENTRY_BYTES - 4)), os.SEEK_CUR)  # name, further fields
    npy_header = file.read(length)
    array = np.empty(header.shape, header.dtype)
    content = array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
    count = 0
    while count < len(content) and (read := file.readinto(content[count:])):
        count += read
    is_whole = count == len(content) and zlib.crc32(content, zlib.crc32(npy_header)) == header.crc
    return array if is_whole else None


@contextmanager
def _only_unreadable() -> Iterator[None]:
    """Damaged bytes bring zipfile and numpy to raise nearly anything; callers get one of UNREADABLE."""
    try:
        yield
    except UNREADABLE:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    npy_format.write_array(buffer, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def checksum(array: np.ndarray) -> int:
    """The checksum that the zip directory will hold for this array."""
    return zlib.crc32(npy_bytes(array))


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed npz under a temporary name in the same folder, then put it in place of an older one."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for key, array in arrays.items():
            archive.writestr(zipfile.ZipInfo(f"{key}.npy", FIXED_DATE), npy_bytes(array))
