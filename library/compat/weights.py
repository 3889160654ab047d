"""Names and tensors of a file changed while they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SplitHook = Callable[[str, "Mapping[str, Tensor] | None"], "tuple[list[str] | None, Mapping[str, Tensor] | None]"]
ConcatHook = Callable[[str, "Mapping[str, Tensor] | None"], "tuple[str | None, Tensor | None]"]


@dataclass
class WeightTransformHooks:
    """How names of a file become others; a hook that gives None leaves a name alone.

    `split_hook(key, tensors)` -> (new names, name -> tensor), of one tensor; `concat_hook(key, tensors)` -> (new name,
    tensor), of all tensors that have this new name; both get None for `tensors` when only names are asked for.
    `rename_hook(key)` -> new name.
    """

    split_hook: SplitHook | None = None
    concat_hook: ConcatHook | None = None
    rename_hook: Callable[[str], str | None] | None = None


class TensorWeightAdapter:
    """A file as it is after its hooks: `keys()` and `get_tensor()` of a MemoryEfficientSafeOpen with the new names."""

    def __init__(self, weight_convert_hook: WeightTransformHooks, original_f: Any) -> None:
        self.hooks, self.original_f = weight_convert_hook, original_f
        self._split: dict[str, str] = {}
        self._joined: dict[str, list[str]] = {}
        self._renamed: dict[str, str] = {}
        self._names: dict[str, None] = {}
        for key in original_f.keys():
            self._add(key)

    def _add(self, key: str) -> None:
        hooks = self.hooks
        parts = hooks.split_hook(key, None)[0] if hooks.split_hook else None
        joined = hooks.concat_hook(key, None)[0] if hooks.concat_hook and parts is None else None
        if parts is not None:
            self._split.update(dict.fromkeys(parts, key))
            self._names.update(dict.fromkeys(parts))
        elif joined is not None:
            self._joined.setdefault(joined, []).append(key)
            self._names[joined] = None
        else:
            name = (hooks.rename_hook(key) if hooks.rename_hook else None) or key
            self._renamed[name] = key
            self._names[name] = None

    def keys(self) -> list[str]:
        return list(self._names)

    def get_tensor(
        self, new_key: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        def read(key: str) -> Tensor:
            return self.original_f.get_tensor(key, device=device, dtype=dtype)

        if new_key in self._split:
            key = self._split[new_key]
            return self.hooks.split_hook(key, {key: read(key)})[1][new_key]
        if new_key in self._joined:
            keys = self._joined[new_key]
            return self.hooks.concat_hook(keys[0], {key: read(key) for key in keys})[1]
        return read(self._renamed[new_key])
