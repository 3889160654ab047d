"""Caches in memory as a few large tensors, so that loader workers share them instead of copying them.

A worker that is forked sees the parent's memory. One that is spawned receives the data set pickled: then every tensor
takes a file descriptor of its own, and thousands of small ones exceed the limit. So equal-shaped cache entries are rows
of one tensor, items hold views of the rows, and pickling replaces a view by (tensor, row).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from library.dataset.items import ImageItem

TENSOR_FIELDS = ("latents", "latents_flipped", "alpha_mask")
NAMED_FIELDS = ("conditions", "conditions_flipped", "text_encoder_outputs")


@dataclass(frozen=True)
class Row:
    """Stands for a view in a pickle."""

    tensor: int
    row: int


class SharedTensors:
    """The large tensors, and which of their rows is which view."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._views: dict[int, tuple[Row, torch.Tensor]] = {}

    def absorb(self, items: Iterable[ImageItem]) -> None:
        """Move the cached tensors of the items into large ones; items get views. Entries that are in already stay."""
        items = [item for item in items if _holds_tensors(item)]
        unique = {id(t): t for item in items for t in _tensors_of(item) if id(t) not in self._views}
        by_kind: dict[tuple, list[torch.Tensor]] = {}
        for tensor in unique.values():
            by_kind.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)
        moved: dict[int, torch.Tensor] = {}
        for (shape, dtype), tensors in by_kind.items():
            large = torch.empty((len(tensors), *shape), dtype=dtype)
            for row, tensor in enumerate(tensors):
                large[row] = tensor
                view = large[row]
                moved[id(tensor)] = view
                self._views[id(view)] = (Row(len(self.tensors), row), view)
            self.tensors.append(large)
        for item in items:
            _replace(item, lambda tensor: moved.get(id(tensor), tensor))

    def frozen(self, item: ImageItem) -> ImageItem:
        """A copy of an item for a pickle."""
        frozen = copy.copy(item)
        _replace(frozen, lambda tensor: self._views[id(tensor)][0] if id(tensor) in self._views else tensor)
        return frozen

    def thaw(self, items: Iterable[ImageItem]) -> None:
        """After unpickling: give the items their views."""
        made: dict[Row, torch.Tensor] = {}

        def view(value: Any) -> Any:
            if not isinstance(value, Row):
                return value
            if value not in made:
                made[value] = self.tensors[value.tensor][value.row]
                self._views[id(made[value])] = (value, made[value])
            return made[value]

        for item in items:
            _replace(item, view)

    def __getstate__(self) -> dict[str, Any]:
        return {"tensors": self.tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tensors, self._views = state["tensors"], {}


def _holds_tensors(item: ImageItem) -> bool:
    return not (
        item.latents is None
        and item.text_encoder_outputs is None
        and item.latents_flipped is None
        and item.alpha_mask is None
    )


def _tensors_of(item: ImageItem) -> list[torch.Tensor]:
    fields = [getattr(item, name) for name in TENSOR_FIELDS]
    fields += [value for name in NAMED_FIELDS for value in (getattr(item, name) or {}).values()]
    return [value for value in fields if isinstance(value, torch.Tensor)]


def _replace(item: ImageItem, function) -> None:
    for name in TENSOR_FIELDS:
        if getattr(item, name) is not None:
            setattr(item, name, function(getattr(item, name)))
    for name in NAMED_FIELDS:
        if getattr(item, name) is not None:
            setattr(item, name, {key: function(value) for key, value in getattr(item, name).items()})
