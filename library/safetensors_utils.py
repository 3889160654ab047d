"""Reading and writing checkpoint files: headers without tensors, tensors one at a time, files that are whole or
absent."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO

import torch
from torch import Tensor

from library.checkpoints.number_formats import AT_LOADING, narrowed, narrowed_all
from library.checkpoints.safetensors_header import (
    DTYPE_NAMES,
    header_bytes,
    read_header,
    read_header_and_start,
)
from library.core.atomic_file import atomic_path
from library.core.console import storable
from library.core.errors import CheckpointError
from library.core.lazy_names import homes, lazy_names
from library.core.postponed_writes import taker_of

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(
    __name__, homes("library.compat.weights", "TensorWeightAdapter", "WeightTransformHooks")
)

FP8_DTYPES = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
WINDOWS_NO_ROOM = (8, 1453, 1455)
"""numbers of Windows: not enough memory, not enough quota, the page file is too small"""
_WRITE_EARLY = 1 << 20  # bytes; for smaller tensors the call costs more than it gains
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_FRAMEWORKS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "ldm.", "sgm.")
_HARMLESS = frozenset(
    {"typing.Any", "collections.defaultdict", "builtins.int", "builtins.list", "builtins.dict", "builtins.set"}
)
"""what checkpoints hold beside weights: left out, whatever it is"""


class MemoryEfficientSafeOpen:
    """Reads a safetensors file tensor by tensor with plain reads: no memory map, no second copy of the file in
    memory."""

    def __init__(self, filename: str | os.PathLike, disable_numpy_memmap: bool = False) -> None:
        """`disable_numpy_memmap`: there is no map in any case."""
        self.path = filename
        self.infos, self._metadata, self._data_start = read_header_and_start(filename)
        self._file = open(filename, "rb")

    def __enter__(self) -> MemoryEfficientSafeOpen:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self.infos)

    def metadata(self) -> dict[str, str]:
        return self._metadata

    def get_tensor(
        self, key: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.infos[key]
        if info.end == info.start:
            return torch.empty(info.shape, dtype=dtype or info.dtype, device=device)
        buffer = torch.empty(
            info.end - info.start, dtype=torch.uint8
        )  # not a bytearray, which would be filled with zeros first
        self._file.seek(self._data_start + info.start)
        if self._file.readinto(memoryview(buffer.numpy())) != len(buffer):
            raise CheckpointError(f"{self.path} became shorter while it was read")
        tensor = buffer.view(info.dtype).reshape(info.shape)
        return tensor.to(device=device, dtype=dtype) if device is not None or dtype is not None else tensor


_WITHOUT_VALUES: ContextVar[bool] = ContextVar("without_values", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, `iterate_tensors` reads headers alone and gives tensors of their shapes and types on the meta device."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def _empty_tensors(path: str | os.PathLike, keys: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
    found = load_pickled_tensors(path) if is_pickled(path) else read_header(path)[0]
    for key in found if keys is None else keys:
        yield key, torch.empty(found[key].shape, dtype=found[key].dtype, device="meta")


def iterate_tensors(
    path: str | os.PathLike, device: torch.device | str | None = None, disable_mmap: bool = False,
    keys: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a checkpoint file in its order, or of the names in `keys`; pickles are read as weights only."""
    if _WITHOUT_VALUES.get():
        yield from _empty_tensors(path, keys)
    elif is_pickled(path):
        state = load_pickled_tensors(path)
        yield from ((key, state[key].to(device)) for key in (state if keys is None else keys))
    elif disable_mmap:
        with MemoryEfficientSafeOpen(path) as file:
            yield from ((key, file.get_tensor(key, device)) for key in (file.keys() if keys is None else keys))
    else:
        yield from _mapped_tensors(path, device, keys)


def _mapped_tensors(
    path: str | os.PathLike, device: torch.device | str | None, keys: Sequence[str] | None
) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    infos, _ = read_header(path)  # its errors name what is wrong with the file
    left = list(infos if keys is None else keys)
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            while left:
                yield left[0], file.get_tensor(left[0])
                del left[0]
        return
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as a safetensors file: {error}") from error
    except (OSError, MemoryError, RuntimeError) as error:
        if not is_mapping_failure(error):
            raise
        logger.warning(
            "%s cannot be mapped into memory (%s), so it is read without mapping; --disable_mmap_load_safetensors does "
            "so from the"
            " start. On Windows a larger page file lets it be mapped", path, _first_line(error),
        )  # fmt: skip
    yield from iterate_tensors(path, device, disable_mmap=True, keys=left)


def is_mapping_failure(error: Exception) -> bool:
    """Whether the system has no room in its address space or its page file for a map of a file."""
    if (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or getattr(error, "winerror", None) in WINDOWS_NO_ROOM
    ):
        return True
    codes = "|".join(map(str, (errno.ENOMEM, *WINDOWS_NO_ROOM)))
    return re.search(rf"unable to mmap|file mapping|paging file|os error ({codes})\b", str(error)) is not None


def is_pickle_name(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(PICKLE_SUFFIXES)


def is_pickled(path: str | os.PathLike) -> bool:
    """Whether a file is to be opened as one of torch: it has such a name, and is no safetensors file under it."""
    if not is_pickle_name(path) or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return not header_bytes(file.read(9))


class _Inert:
    """Stands for an object of a training framework in a file of weights: it takes what was stored and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...

    def __hash__(self) -> int:
        return id(self)


_NESTED = ("state_dict", "module")
"""entries of PyTorch files that hold the weights, beside what the training framework kept"""


def load_pickled_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a PyTorch file; nothing in it is executed. CheckpointError when it is damaged or holds code.

    Old checkpoints hold objects of the framework that wrote them beside the weights (callbacks, settings): those are
    left out.
    """
    state = load_pickled(path)
    state = state if isinstance(state, Mapping) else {}
    state = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), state)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def load_pickled(path: str | os.PathLike, containers: Sequence[type] = ()) -> Any:
    """What a PyTorch file holds; nothing in it is executed. `containers`: classes of torch that it may hold beside
    tensors. CheckpointError when it is damaged or holds code."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} does not exist")
    is_zip = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04" and not is_zip:
            raise CheckpointError(f"{path} is truncated: the table at its end is not there; fetch it again")
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in containers}
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        foreign = [name for name in foreign if name not in known]
        code = [name for name in foreign if not name.startswith(_FRAMEWORKS) and name not in _HARMLESS]
        if code:
            raise CheckpointError(
                f"{path} holds more than weights: opening it in the usual way would call {', '.join(sorted(code)[:3])}."
                " Nothing of it was run; get the safetensors version"
            )
        with torch.serialization.safe_globals([*((_Inert, name) for name in foreign), *containers]):
            return _load_pickle(path, mapped=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than weights; nothing of it was run. Get the safetensors version"
        ) from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise CheckpointError(
            f"{path} cannot be read as a file of weights ({_first_line(error)}); fetch it again"
        ) from error


def _load_pickle(path: str | os.PathLike, *, mapped: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError, RuntimeError) as error:
        if not mapped or not is_mapping_failure(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def load_safetensors(
    path: str | os.PathLike,
    device: torch.device | str | None = None,
    disable_mmap: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """All tensors of a file; `dtype` casts the floating-point ones."""
    return {key: cast_floats(tensor, dtype, key) for key, tensor in iterate_tensors(path, device, disable_mmap)}


def cast_floats(tensor: Tensor, dtype: torch.dtype | None, name: str = "a weight") -> Tensor:
    """A tensor of a model that is loaded; CheckpointError with its `name` for numbers that the format does not hold."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype) if tensor.is_meta else narrowed(name, tensor, dtype, AT_LOADING)


def cast_all(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A state with its floating-point tensors in `dtype`, for a file: CheckpointError that names numbers which do not
    fit."""
    return narrowed_all({key: (tensor, dtype if tensor.is_floating_point() else None) for key, tensor in state.items()})


def get_split_weight_filenames(file_path: str | os.PathLike) -> list[str] | None:
    """All parts of `name-00001-of-00004.safetensors` when `file_path` is one of them, else None.

    CheckpointError when a part is missing.
    """
    match = re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\.[a-z]+)", os.fspath(file_path))
    if match is None:
        return None
    stem, digits, count, suffix = match[1], len(match[2]), int(match[3]), match[4]
    parts = [f"{stem}-{number:0{digits}d}-of-{match[3]}{suffix}" for number in range(1, count + 1)]
    missing = [part for part in parts if not os.path.exists(part)]
    if missing:
        raise CheckpointError(f"{file_path} is one of {count} parts and these are missing: {', '.join(missing)}")
    return parts


def load_split_weights(
    file_path: str | os.PathLike,
    device: torch.device | str | None = None,
    disable_mmap: bool = False,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """All tensors of a file, or of all its parts when it is one of a split set."""
    tensors: dict[str, Tensor] = {}
    for part in get_split_weight_filenames(file_path) or [file_path]:
        tensors.update(load_safetensors(part, device, disable_mmap, dtype))
    return tensors


def find_key(
    safetensors_file: str | os.PathLike, starts_with: str | None = None, ends_with: str | None = None
) -> str | None:
    """The first name in a file with this beginning and this end, or None."""
    infos, _ = read_header(safetensors_file)
    return next((key for key in infos if key.startswith(starts_with or "") and key.endswith(ends_with or "")), None)


def save_pickled_atomic(value: Any, path: str | os.PathLike) -> None:
    """Write a PyTorch file that is either whole or not there; later where that is asked for (postponed_writes)."""
    taker = taker_of(sum(tensor.nbytes for tensor in tensors_in(value)))
    if taker is not None:
        content = pickled(value)
        taker.add(lambda: _write_pickled(path, lambda file: file.write(content)))
        return
    _write_pickled(path, lambda file: torch.save(value, file))


def pickled(value: Any) -> memoryview:
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getbuffer()


def _write_pickled(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # given a name, torch would write that too
        write(file)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Those of nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def save_file_atomic(
    tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that is either whole or not there; equal content gives equal bytes.

    Tensors are written one at a time, widest type first and then by name, so that every one is aligned. Written to a
    temporary name beside the target, flushed to the disk, then renamed; later where that is asked for, with what the
    tensors hold now (postponed_writes).
    """
    infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    taker = taker_of(sum(tensor.nbytes for tensor in tensors.values()))
    if taker is not None:
        copies, told = taker.copied(tensors), None if metadata is None else dict(metadata)
        taker.add(lambda: stream_file_atomic(infos, copies.items(), path, told))
        return
    stream_file_atomic(infos, tensors.items(), path, metadata)


def stream_file_atomic(
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], items: Iterable[tuple[str, Tensor]],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """As save_file_atomic, from tensors that come one by one in any order: `infos` tells their types and shapes before.

    A tensor of `items` is cast to the type told; CheckpointError when that cannot hold its numbers (number_formats).
    ValueError when one is missing, unknown or of another shape.
    """
    header, places = _layout(infos, metadata)
    waiting = dict(places)
    with atomic_path(path) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(1) as writer:
        file.write(header)
        pending: Future[None] | None = None
        for name, tensor in items:
            dtype, shape = infos[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; {list(shape)} was told")
            place, data = len(header) + waiting.pop(name), _bytes_of(narrowed(name, tensor, dtype))
            if pending is not None:
                pending.result()  # one tensor is written while the next one is made, so that two are in memory
            pending = writer.submit(_write_at, file, place, data)
            del tensor, data
        if pending is not None:
            pending.result()
        if waiting:
            raise ValueError(f"{len(waiting)} tensors did not come, the first is {next(iter(waiting))}")


def _layout(
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int]]:
    """(the first bytes of the file, where each tensor starts after them)."""
    order = sorted(infos, key=lambda name: (-infos[name][0].itemsize, name))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {storable(key): storable(str(metadata[key])) for key in sorted(metadata)}
    places, position = {}, 0
    for name in order:
        dtype, shape = infos[name]
        places[name] = position
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


def _write_at(file: BinaryIO, place: int, data: memoryview) -> None:
    """Write, and let the disk begin with it; else all of the file waits for the end."""
    file.seek(place)
    file.write(data)
    if len(data) >= _WRITE_EARLY and hasattr(os, "posix_fadvise"):
        file.flush()
        os.posix_fadvise(file.fileno(), place, len(data), os.POSIX_FADV_DONTNEED)


def file_layout(
    infos: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], int]:
    """(first bytes of a file with these tensors, where each tensor starts in the file, bytes of the file)."""
    header, places = _layout(infos, metadata)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in infos.values())
    return header, {name: len(header) + place for name, place in places.items()}, len(header) + size


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def mem_eff_save_file(
    tensors: Mapping[str, Tensor], filename: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """The name by which other code knows `save_file_atomic`."""
    save_file_atomic(tensors, filename, metadata)
