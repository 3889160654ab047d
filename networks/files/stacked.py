"""A fused layer whose parts have adapters of their own: what files of programs hold whose models keep query, key and
value apart.

Parts that are plain LoRA become one LoRA (networks/files/lora_conversion.py); of LoKr, LoHa, DoRA and the like no
single one has the same change, so they stay side by side: `part.<number>.<name of the tensor>`, and `part.rows`, the
rows of every part. For merging and making images only: no file is written with these names, and nothing is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from library.core.errors import CheckpointError
from networks.kinds.adapter_module import AdapterModule, change_of
from networks.kinds.registry import NetworkKind, known_kind_of

ROWS = "part.rows"
_PART = re.compile(r"part\.(\d+)\.(.+)")
Tensors = Mapping[str, torch.Tensor]


def stacked(parts: Sequence[Tensors | None], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """The tensors of one layer, made of those of its parts; None for a part that does not change."""
    named = {
        f"part.{number}.{name}": tensor for number, part in enumerate(parts) for name, tensor in (part or {}).items()
    }
    return {ROWS: torch.tensor(list(rows)), **named}


def parts_of(tensors: Tensors) -> dict[int, dict[str, torch.Tensor]]:
    """Number of a part -> its tensors."""
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match:
            parts.setdefault(int(match[1]), {})[match[2]] = tensor
    return parts


class StackedModule(AdapterModule):
    """Rows of the change are those of the parts, one below the other."""

    weight_keys = (ROWS,)
    layer_classes = ("Linear",)
    has_alpha = False
    decomposable = False  # lengths belong to its parts

    def build(self, *, tensors: Tensors) -> None:
        """Buffers with the shapes of a file's tensors; dots cannot stand in their names."""
        for name, tensor in tensors.items():
            self.register_buffer(_own_name(name), torch.zeros_like(tensor))
        self._names = tuple(tensors)

    @classmethod
    def unknown_keys(cls, names: Iterable[str]) -> list[str]:
        return sorted(name for name in names if name != ROWS and not _PART.fullmatch(name))

    @staticmethod
    def weight_change(tensors: Tensors, weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        rows, parts = tensors[ROWS].tolist(), parts_of(tensors)
        if len(rows) - 1 not in parts:  # how many rows it has, only the weight tells
            rows[-1] = len(weight) - sum(rows[:-1])
        if min(rows) < 0 or sum(rows) != len(weight):
            raise ValueError(f"parts of {rows} rows do not make up the {len(weight)} rows of the weight")
        changes = [
            change_of(known_kind_of(parts[number], f"part {number}").module_class, parts[number], piece, multiplier)
            if number in parts else torch.zeros_like(piece, dtype=torch.float32, device=tensors[ROWS].device)
            for number, piece in enumerate(weight.split(rows))
        ]  # fmt: skip
        return torch.cat(changes)

    @staticmethod
    def bias_change(tensors: Tensors, multiplier: float) -> torch.Tensor | None:
        parts = parts_of(tensors)
        own = {
            n: known_kind_of(part, f"part {n}").module_class.bias_change(part, multiplier) for n, part in parts.items()
        }
        if all(change is None for change in own.values()):
            return None
        rows = tensors[ROWS].tolist()
        return torch.cat(
            [
                torch.zeros(size, device=tensors[ROWS].device) if own.get(n) is None else own[n]
                for n, size in enumerate(rows)
            ]
        )

    @staticmethod
    def change_shape(tensors: Tensors) -> tuple[int, ...] | None:
        parts = parts_of(tensors)
        if any("dora_scale" in part for part in parts.values()):
            return None
        shapes = [known_kind_of(part, f"part {n}").module_class.change_shape(part) for n, part in parts.items()]
        return None if None in shapes else (int(tensors[ROWS].sum()), shapes[0][1])

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, _own_name(name)) for name in self._names}

    def bias_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors()

    def output_change(self, x: torch.Tensor) -> torch.Tensor:
        change, bias = super().output_change(x), self.bias_change(self.tensors(), self.multiplier)
        return change if bias is None else change + bias.to(change)

    def file_tensors(self) -> dict[str, torch.Tensor]:
        raise CheckpointError(
            f"{self.lora_name} has adapters on parts of it, for which files have no names; take the file that it was "
            "loaded from"
        )

    def load_file_tensors(self, tensors: Tensors) -> None:
        if set(tensors) != set(self._names):
            raise CheckpointError(
                f"{self.lora_name}: the file has {', '.join(sorted(tensors))}; this network needs "
                f"{', '.join(sorted(self._names))}"
            )
        for name, tensor in tensors.items():
            getattr(self, _own_name(name)).copy_(tensor)

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Values come from a file."""

    def scale_weight(self, ratio: torch.Tensor) -> None:
        raise CheckpointError(f"{self.lora_name} has adapters on parts of it, which cannot be trained")


def _own_name(name: str) -> str:
    return name.replace(".", "/")


def shape_from_file(tensors: Tensors, split: Sequence[int] | None) -> tuple[int, float | None, dict[str, Any]]:
    return 1, None, {"tensors": dict(tensors)}


KIND = NetworkKind("parts", StackedModule, shape_from_file)
