"""Hashes by which other programs recognise model and adapter files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from library.core.atomic_file import write_text_atomically
from library.core.console import storable
from library.core.text_files import open_file

logger = logging.getLogger(__name__)

LEGACY_OFFSET = 0x100000
LEGACY_LENGTH = 0x10000
CHUNK = 1 << 22

# In the order of the safetensors library, which sorts tensors by type, last type first, then by name.
_TYPE_ORDER = (
    "bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "int16", "uint16", "float16", "bfloat16", "int32",
    "uint32",
    "float32", "complex64", "float64", "int64", "uint64",
)  # fmt: skip
_HEADER_NAMES = {
    "bool": "BOOL", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip


def adapter_hashes(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], read: Callable[[str], torch.Tensor] | None = None
) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` of an adapter file with these tensors and this metadata.

    Both are taken from the file as the safetensors library would write it with only the ss_* keys: sha256 of the tensor
    data, and 8 digits of the sha256 of 64 KiB at 1 MiB. The data are read tensor by tensor; no file is built in memory.
    `read` gives a tensor by its name, where `tensors` have shapes alone.
    """
    names = sorted(tensors, key=lambda name: (-_TYPE_ORDER.index(_type_name(tensors[name])), name))
    start = 8 + len(_header({key: str(metadata[key]) for key in metadata if key.startswith("ss_")}, tensors, names))
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    for name in names:
        tensor = tensors[name] if read is None else read(name)
        data = memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()).cast("B")
        whole.update(data)
        first, last = max(LEGACY_OFFSET - start, 0), max(LEGACY_OFFSET + LEGACY_LENGTH - start, 0)
        legacy.update(data[first:last])
        start += len(data)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def _type_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _header(metadata: dict[str, str], tensors: Mapping[str, torch.Tensor], names: list[str]) -> bytes:
    """The header that the safetensors library writes, up to the order of the metadata."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        kind = _type_name(tensor)
        short = _HEADER_NAMES.get(kind) or kind.upper().replace("UINT", "U").replace("INT", "I")
        header[name] = {"dtype": short, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = storable(json.dumps(header, separators=(",", ":"), ensure_ascii=False)).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def model_hash(filename: str | os.PathLike[str]) -> str:
    """The short hash of a base model: 8 digits of the sha256 of 64 KiB at 1 MiB."""
    if os.path.isdir(filename):
        return "IsADirectory"
    try:
        with open_file(filename) as file:
            file.seek(LEGACY_OFFSET)
            return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"


def calculate_sha256(filename: str | os.PathLike[str]) -> str:
    """sha256 of a whole file; `IsADirectory` or `NOFILE` when there is no such file."""
    if os.path.isdir(filename):
        return "IsADirectory"
    digest = hashlib.sha256()
    try:
        with open_file(filename) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return "NOFILE"
    return digest.hexdigest()


def precalculate_safetensors_hashes(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[str, str]:
    """The name by which other code knows adapter_hashes: (model hash, legacy hash)."""
    hashes = adapter_hashes(tensors, metadata)
    return hashes["sshs_model_hash"], hashes["sshs_legacy_hash"]


def default_memory() -> Path:
    """Where hashes of large files are remembered from run to run."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "atelier" / "model_hashes.json"


class BackgroundHashes:
    """Hashes of base model files, taken in a thread while training runs and waited for when they are needed.

    A whole-file hash is remembered by (path, size, modification time), so that a file of many gigabytes is read once.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory or default_memory()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="model-hash")
        self._pending: dict[str, Future[tuple[str, str]]] = {}

    def start(self, path: str | os.PathLike[str]) -> None:
        """Begin with a file; asking twice reads it once."""
        key = os.path.abspath(path)
        if key not in self._pending:
            self._pending[key] = self._executor.submit(self._hashes, key)

    def result(self, path: str | os.PathLike[str]) -> tuple[str, str]:
        """(short hash, whole-file hash), waiting for the thread when needed."""
        self.start(path)
        return self._pending[os.path.abspath(path)].result()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _hashes(self, path: str) -> tuple[str, str]:
        if not os.path.isfile(path):
            return model_hash(path), calculate_sha256(path)
        stat = os.stat(path)
        key = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        known = self._read()
        if key not in known:
            known = {**self._read(), key: calculate_sha256(path)}
            self._write(known)
        return model_hash(path), known[key]

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.memory.read_text(encoding="utf-8"))
            return content if isinstance(content, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def _write(self, known: dict[str, str]) -> None:
        try:
            write_text_atomically(self.memory, json.dumps(known))
        except OSError as error:
            logger.debug("hashes are not remembered in %s: %s", self.memory, error)
