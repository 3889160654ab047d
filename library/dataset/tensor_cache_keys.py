"""Names of tensors in safetensors caches of clips, as the known video trainer writes and reads them.

`latents_<F>x<H>x<W>_<dtype>` and `latents_<more>_<F>x<H>x<W>_<dtype>`, the size being that of the sample's
latents; `<name>_<dtype>` for all else; a name that ends in `_mask` has no dtype. With `varlen_` before it a batch holds a list of
such tensors, one for each sample, else they are stacked. What dtype a tensor has is told by the tensor: names of files
that exist say otherwise now and then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

VARLEN = "varlen_"
_DTYPES = {str(value).replace("torch.", "_") for value in vars(torch).values() if isinstance(value, torch.dtype)}
"""endings that are names of number formats"""
_SIZE = re.compile(r"_\d+(x\d+){1,2}$")


class KeyName(NamedTuple):
    """What a key is called in a batch, and whether a batch holds a list of it."""

    name: str
    is_list: bool = False


def parse_key(key: str) -> KeyName:
    """The name behind a key, without number format and size."""
    name = key.removeprefix(VARLEN)
    is_list = name != key
    if not name.endswith("_mask"):
        name = name.removesuffix(next((ending for ending in _DTYPES if name.endswith(ending)), ""))
    if name.startswith("latents_"):
        name = _SIZE.sub("", name)
    return KeyName(name, is_list)


def key_of(name: str, dtype: torch.dtype, size: Iterable[int] = (), *, is_list: bool = False) -> str:
    """The key of a tensor; `size`: (F, h, w) of the sample's latents, for names of latents."""
    what = f"{VARLEN if is_list else ''}{name}"
    if name == "latents" or name.startswith("latents_"):
        what = f"{what}_{'x'.join(map(str, size))}"
    return what if name.endswith("_mask") else f"{what}_{str(dtype).removeprefix('torch.')}"


def keys_by_name(keys: Iterable[str]) -> dict[str, str]:
    """Name in a batch -> key."""
    return {parse_key(key).name: key for key in keys}
