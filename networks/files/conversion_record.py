"""What a rewritten adapter file remembers of the file it came from, so that the way back gives that file bit by bit.

Most rewritings lose nothing and leave no record. One is kept where the plain way back would differ: alpha was folded
into the weights, parts of a fused layer became one module, a name had another spelling. It stands in the metadata under
`KEY` as compressed JSON and holds differences only; the tensors that it belongs to are told by their hash, so that a
file that was changed since is rewritten plainly.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from library.core.errors import CheckpointError
from networks.files.lora_conversion import fold_factors
from networks.files.lora_layouts import AdapterFile, Layout, kohya_tensors, layout_of, rewritten
from networks.files.peft_config import METADATA_KEY

logger = logging.getLogger(__name__)

KEY = "atelier_conversion"
MAX_BYTES = 64 << 20
"""of a record; the header of a safetensors file ends at 100 MB"""
MOST_UNPACKED = 1 << 30
"""bytes of a record in memory"""
_HASHES = ("sshs_model_hash", "sshs_legacy_hash")
_DOWN, _UP = "lora_down.weight", "lora_up.weight"


def converted(family: str, file: AdapterFile, layout: Layout) -> AdapterFile:
    """`file` in another layout, with a record where the way back needs one. A file that carries a valid record is first
    put back into what it was, so that nothing is lost over several steps."""
    source, is_restored = restored(family, file)
    is_alike = _like(layout_of(source, family), layout)
    if is_restored and is_alike:
        return source
    result = rewritten(family, source, layout)
    record = None if is_alike or _equal(result, source) else _record(family, source, result, layout)
    if record is None:
        return result
    packed = base64.b64encode(zlib.compress(json.dumps(record, sort_keys=True).encode(), 9)).decode("ascii")
    if len(packed) > MAX_BYTES:
        logger.warning(
            "the way back from this layout rounds: what it would have to remember is %d MB, too much for a header",
            len(packed) >> 20,
        )
        return result
    return replace(result, metadata={**result.metadata, KEY: packed})


def restored(family: str, file: AdapterFile) -> tuple[AdapterFile, bool]:
    """(the file that a record speaks of, True), or (the file itself without a record, False)."""
    if KEY not in file.metadata:
        return file, False
    metadata = {key: value for key, value in file.metadata.items() if key != KEY}
    plain = replace(file, metadata=metadata)
    try:
        record = json.loads(_unpacked(file.metadata[KEY], MOST_UNPACKED))
        if record["content"] != _content(file.tensors):
            logger.info(
                "the tensors were changed since this file was rewritten; its record of the file before is left aside"
            )
            return plain, False
        tensors = _patched(_base(family, replace(plain, prefix=record["prefix"]), record), record)
        changes, absent = record["metadata"], set(record["absent"])
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        RuntimeError,
        zlib.error,
        CheckpointError,
    ) as error:
        logger.warning("the record of the file before (%s in the metadata) is damaged (%s) and left aside", KEY, error)
        return plain, False
    old = {key: value for key, value in {**metadata, **changes}.items() if key not in absent}
    return AdapterFile(tensors, old, record["configs"]), True


def _like(first: Layout, second: Layout) -> bool:
    """Whether files of two layouts have the same names and the strength in the same kind of place."""
    return _traits(first) == _traits(second)


def _traits(layout: Layout) -> tuple[object, ...]:
    return layout.names, layout.config, layout.wrapped, bool(layout.fold), layout.prefix


def _record(family: str, source: AdapterFile, result: AdapterFile, layout: Layout) -> dict[str, Any] | None:
    """What is to be remembered; None when the plain way back gives the same tensors."""
    record: dict[str, Any] = {
        "layout": asdict(layout_of(source, family)), "fold": layout.fold,
        "alphas": _alphas(family, source) if layout.fold else {},
        "renamed": {}, "changed": {}, "metadata": {}, "absent": [], "configs": source.configs, "prefix": result.prefix,
    }  # fmt: skip
    plain = rewritten(family, result, layout_of(source, family))
    if _equal(plain, source):
        return None
    base = _base(family, result, record)
    _note_differences(record, base, source.tensors)
    kept = {key: value for key, value in source.metadata.items() if result.metadata.get(key) != value or key in _HASHES}
    record["metadata"], record["absent"] = kept, sorted(set(result.metadata) - set(source.metadata))
    record["content"] = _content(result.tensors)
    return record


def _equal(first: AdapterFile, second: AdapterFile) -> bool:
    in_metadata = METADATA_KEY in first.metadata and METADATA_KEY in second.metadata
    if first.tensors.keys() != second.tensors.keys() or not (in_metadata or first.configs == second.configs):
        return False
    same_metadata = all(
        first.metadata.get(key) == value for key, value in second.metadata.items() if key not in _HASHES
    )
    return same_metadata and all(_same(first.tensors[key], tensor) for key, tensor in second.tensors.items())


def _alphas(family: str, file: AdapterFile) -> dict[str, float]:
    tensors = kohya_tensors(family, file)
    return {key.removesuffix(".alpha"): float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}


def _base(family: str, file: AdapterFile, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The plain way back, with alpha taken out of the weights again."""
    tensors = kohya_tensors(family, file)
    for name, alpha in record["alphas"].items():
        down, up = tensors.get(f"{name}.{_DOWN}"), tensors.get(f"{name}.{_UP}")
        if down is None or up is None or not math.isfinite(alpha) or alpha == 0:
            continue
        factors = fold_factors(record["fold"], alpha / down.shape[0])
        for key, tensor, factor in ((_DOWN, down, factors[0]), (_UP, up, factors[1])):
            tensors[f"{name}.{key}"] = tensor if factor == 1 else (tensor.float() / factor).to(tensor.dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    layout = Layout(**record["layout"])
    return rewritten(family, AdapterFile(tensors), layout).tensors


def _note_differences(
    record: dict[str, Any], base: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]
) -> None:
    """Fill `renamed` (key -> key of the base with the same content) and `changed` (key -> its bytes, or how they
    differ)."""
    spare: dict[str, str] = {}
    if set(base) - set(wanted):
        spare = {_digest(tensor): key for key, tensor in base.items() if key not in wanted}
    for key, tensor in wanted.items():
        own = base.get(key)
        if own is not None and _same(own, tensor):
            record["renamed"][key] = ""
            continue
        twin = spare.get(_digest(tensor)) if own is None and spare else None
        if twin is not None:
            record["renamed"][key] = twin
            continue
        is_alike = own is not None and own.dtype == tensor.dtype and own.shape == tensor.shape
        data = _bytes(tensor) ^ _bytes(own) if is_alike else _bytes(tensor)
        planes = (
            data.view(-1, tensor.element_size()).t().contiguous()
        )  # equal bytes of all numbers together compress better
        packed = base64.b64encode(zlib.compress(planes.numpy().tobytes(), 9)).decode("ascii")
        record["changed"][key] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), is_alike, packed]


def _patched(base: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {key: base[twin or key] for key, twin in record["renamed"].items()}
    for key, (kind, shape, is_difference, packed) in record["changed"].items():
        dtype = getattr(torch, kind)
        planes = torch.frombuffer(bytearray(_unpacked(packed, math.prod(shape) * dtype.itemsize)), dtype=torch.uint8)
        data = planes.view(dtype.itemsize, -1).t().contiguous().view(-1)
        if is_difference:
            data = data ^ _bytes(base[key])
        tensors[key] = data.view(dtype).view(shape)
    return tensors


def _unpacked(packed: str, most: int) -> bytes:
    """The bytes behind a packed text. ValueError for more than `most`: a few kilobytes can stand for gigabytes."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(packed), most + 1)
    if len(content) > most:
        raise ValueError(f"it would unpack to more than {most} bytes")
    return content


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(_bytes(first), _bytes(second))


def _digest(tensor: torch.Tensor) -> str:
    what = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    what.update(memoryview(_bytes(tensor).numpy()))
    return what.hexdigest()


def _content(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of names and tensors, whatever their order."""
    what = hashlib.sha256()
    for key in sorted(tensors):
        what.update(f"{key}:{_digest(tensors[key])};".encode())
    return what.hexdigest()
