"""The formats of cache files behind one interface. The ending of a family's cache names (`CacheNames`) chooses: npz
with several sizes and captions of a picture in a file (cache_io.py, text_cache_io.py), or the safetensors files of clips
(tensor_cache_io.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from library.dataset import cache_io, tensor_cache_io, text_cache_io
from library.dataset.architectures import DataArchitecture
from library.dataset.cache_io import LatentArrays, LatentsRecord
from library.dataset.text_cache_io import TextLayout, TextRecord


@dataclass(frozen=True)
class LatentStore:
    """Files of latents. `problem`, `load` and `load_conditions` are called as those of cache_io. `save`: (path,
    architecture, bucket, arrays, record). `most_nan`: part of a tensor that may be NaN, for which 0 is stored."""

    problem: Callable[..., str | None]
    load: Callable[[str, DataArchitecture, Sequence[int]], LatentArrays]
    load_conditions: Callable[..., Mapping[str, cache_io.Array]]
    save: Callable[[str, DataArchitecture, Sequence[int], LatentArrays, LatentsRecord | None], None]
    most_nan: float = 0.0
    has_one_size: bool = False
    """whether a file has room for one size of its picture or clip"""


@dataclass(frozen=True)
class TextStore:
    """Files of text encoder outputs. `find` and `keys_problem` are called as those of text_cache_io, with the
    architecture behind the path; `save` with the caption too. `keeps_bfloat16`: number formats are those of the
    encoders; `keeps_source`: records name the file whose caption it is."""

    find: Callable[..., tuple[str | None, str]]
    keys_problem: Callable[..., str | None]
    load: Callable[..., Mapping[str, cache_io.Array]]
    save: Callable[..., str]
    keeps_bfloat16: bool = False
    keeps_source: bool = False


def _save_npz_latents(
    path: str, architecture: DataArchitecture, bucket: Sequence[int], arrays: LatentArrays,
    record: LatentsRecord | None = None
) -> None:
    cache_io.save_latents(path, cache_io.size_suffix(architecture, bucket), arrays, record)


def _find_npz_text(
    path: str, _: DataArchitecture, layout: TextLayout, expected: TextRecord, **needs: object
) -> tuple[str | None, str]:
    return text_cache_io.find_text(path, layout, expected, **needs)


def _npz_keys_problem(
    path: str, _: DataArchitecture, layout: TextLayout, expected: TextRecord, needed: tuple[str, ...]
) -> str | None:
    return text_cache_io.keys_problem(path, layout, expected, needed)


def _save_npz_text(
    path: str, _: DataArchitecture, layout: TextLayout, outputs: Mapping[str, Tensor], record: TextRecord, *,
    caption: str, in_use: frozenset[str] = frozenset()
) -> str:
    arrays = {name: output.numpy() for name, output in outputs.items()}
    return text_cache_io.save_text(path, layout, arrays, record, in_use=in_use)


_NPZ_LATENTS = LatentStore(
    cache_io.latents_problem, cache_io.load_latents, cache_io.load_conditions, _save_npz_latents
)
_TENSOR_LATENTS = LatentStore(
    tensor_cache_io.latents_problem, tensor_cache_io.load_latents, tensor_cache_io.load_conditions,
    tensor_cache_io.save_latents, most_nan=tensor_cache_io.MOST_NAN, has_one_size=True,
)
_NPZ_TEXT = TextStore(_find_npz_text, _npz_keys_problem, text_cache_io.load_text, _save_npz_text)
_TENSOR_TEXT = TextStore(
    tensor_cache_io.find_text, tensor_cache_io.keys_problem, tensor_cache_io.load_text, tensor_cache_io.save_text,
    keeps_bfloat16=True, keeps_source=True,
)


def latent_store(architecture: DataArchitecture) -> LatentStore:
    return _TENSOR_LATENTS if is_tensor_file(architecture.latents_suffix) else _NPZ_LATENTS


def text_store(architecture: DataArchitecture) -> TextStore:
    return _TENSOR_TEXT if is_tensor_file(architecture.text_suffix or "") else _NPZ_TEXT


def is_tensor_file(name: str) -> bool:
    return name.endswith(".safetensors")
