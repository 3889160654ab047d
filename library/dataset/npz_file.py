"""Reading and writing npz files: headers without data, and writes that are either whole or not there."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.lib import format as npy_format

from library.atomic_file import atomic_path

FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # so that the same arrays give the same file
UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError)
"""What reading a damaged npz raises, whichever part is damaged."""


@dataclass(frozen=True)
class ArrayHeader:
    """Shape and dtype of an array in a file; `crc` is the checksum that the zip directory holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int


def read_headers(path: str | os.PathLike[str]) -> dict[str, ArrayHeader]:
    """Key -> header of every array; the data are not read. Raises one of UNREADABLE for a damaged file."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                version = npy_format.read_magic(member)
                if version not in ((1, 0), (2, 0)):
                    raise ValueError(f"{info.filename} has npy version {version}")
                read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
                shape, _, dtype = read(member)
            headers[info.filename.removesuffix(".npy")] = ArrayHeader(shape, dtype, info.CRC)
    return headers


def read_arrays(path: str | os.PathLike[str], keys: list[str] | None = None) -> dict[str, np.ndarray]:
    """The named arrays, all without `keys`; absent ones are left out. Raises one of UNREADABLE for a damaged file."""
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files if keys is None else [key for key in keys if key in archive.files]
        return {name: archive[name] for name in names}


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
