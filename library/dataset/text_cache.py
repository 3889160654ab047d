"""The text cache of every family: which keys it holds, where they lie, whether a file may be used, and how captions are
encoded for it. What a family writes is a tokenizer and a text encoder; its keys are those of its record."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from library.core.errors import TrainingError
from library.dataset import cache_io, text_cache_io
from library.dataset.cache_names import text_base
from library.dataset.cache_stores import text_store
from library.dataset.strategies import Conditioning, StrategySet
from library.dataset.text_cache_io import MERGED, TEXT_LAYOUTS, TextLayout, TextRecord

if TYPE_CHECKING:
    from library.dataset.cache_index import CacheIndex
    from library.dataset.items import ImageItem
    from library.families.record import DataArchitecture, TextKey


class TextCache:
    """Outputs of text encoders of one family, in memory or on the disk."""

    architecture: DataArchitecture
    settings: Mapping[str, str] = {}
    """what the outputs hang on beside the files, by which it is told why a cache cannot be used: option -> value"""

    def __init__(
        self, architecture: DataArchitecture | None, *, to_disk: bool, batch_size: int | None = None,
        skip_check: bool = False,
        trained: Sequence[bool] = (), is_weighted: bool = False, flags: Mapping[str, bool] | None = None,
        model_identity: str = "",
        max_token_length: int | None = None,
        settings: Mapping[str, str] = {},
    ) -> None:
        if architecture is not None:
            self.architecture = architecture
        self.cache_to_disk = to_disk
        self.batch_size = batch_size
        self.skip_disk_cache_validity_check = skip_check
        self.trained = trained
        """per text encoder, whether it learns"""
        self.is_weighted = is_weighted
        self._flags = flags or {}
        self.model_identity = model_identity
        """library.checkpoints.identity of the text encoder files together, "" = not compared"""
        self.max_token_length = max_token_length
        """the family's token length, where it has one, None = not compared"""
        self.settings = {MERGED: "", **settings}

    @cached_property
    def layout(self) -> TextLayout:
        return TEXT_LAYOUTS[self.architecture.name]

    @property
    def flags(self) -> Mapping[str, bool]:
        """Values of the layout's flags in this run."""
        return self._flags

    @property
    def live(self) -> frozenset[str]:
        """Keys that are not cached, because an encoder that makes them learns."""
        return self.layout.made_by([number for number, learns in enumerate(self.trained) if learns])

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in self.layout.names if name not in self.live)

    @property
    def stores_batches(self) -> bool:
        """Whether batches are encoded and stored by `cache_batch_outputs` of a plug-in."""
        return False

    # ---- files -------------------------------------------------------------------------------------------------------

    def get_outputs_npz_path(self, image_abs_path: str) -> str:
        return cache_io.text_npz_path(self.architecture, image_abs_path)

    def path_of(self, item: ImageItem, path: str | None = None) -> str:
        """The cache file of an item's caption, in its cache_directory. `path` stands for the item's own."""
        return self.get_outputs_npz_path(text_base(item, path))

    def record_of(self, caption: str) -> TextRecord:
        return TextRecord(
            caption=text_cache_io.caption_hash(caption), model=self.model_identity,
            max_token_length=self.max_token_length,
            is_weighted=self.is_weighted, flags=self.flags, settings=self.settings,
        )

    def find_with(self, index: CacheIndex) -> Callable[[str, str, bool], tuple[str | None, str]]:
        """`find`, which an index may know without reading the file; for many captions, with the settings of now."""
        made = self.record_of("")
        questions = [
            f"{type(self).__qualname__} {self.architecture.name} {made.model} {made.max_token_length} "
            f"{made.is_weighted} {made.flags}"
            f" {made.settings} {made.version} {self.needed} {accept_unrecorded} {self.skip_disk_cache_validity_check}"
            for accept_unrecorded in (False, True)
        ]

        def find(npz_path: str, caption: str, accept_unrecorded: bool) -> tuple[str | None, str]:
            return index.find(
                npz_path, questions[accept_unrecorded], lambda: self.find(npz_path, caption, accept_unrecorded),
                detail=text_cache_io.caption_hash(caption),
            )

        return find

    def find(self, npz_path: str, caption: str, accept_unrecorded: bool = True) -> tuple[str | None, str]:
        """(suffix of the keys that hold this caption, "") or (None, why there are none)."""
        store = text_store(self.architecture)
        if self.skip_disk_cache_validity_check and os.path.exists(npz_path):
            expected = replace(self.record_of(caption), model="")
            suffix, _ = store.find(npz_path, self.architecture, self.layout, expected, needed=self.needed)
            return suffix or "", ""
        return store.find(
            npz_path, self.architecture, self.layout, self.record_of(caption), needed=self.needed,
            accept_unrecorded=accept_unrecorded
        )

    def outputs_of(self, item: ImageItem) -> Conditioning | None:
        """The cached outputs of an item, from memory or from its file; None when it has none."""
        if item.text_encoder_outputs is not None or item.text_encoder_outputs_npz is None:
            return item.text_encoder_outputs
        return self.read(item.text_encoder_outputs_npz, item.text_encoder_outputs_suffix)

    def read(self, npz_path: str, suffix: str) -> Conditioning:
        """The outputs of one caption, dtypes as stored. CheckpointError when the file is damaged."""
        constants = {key.name for key in self.layout.keys if key.constant is not None}  # which nobody reads
        arrays = text_store(self.architecture).load(npz_path, self.layout, suffix, self.live | constants)
        return {name: torch.as_tensor(array) for name, array in arrays.items()}

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def encode(
        self, strategies: StrategySet, models: Sequence[torch.nn.Module | None], captions: list[str]
    ) -> Conditioning:
        """Conditioning [B, ...] of some captions, by name, without what is not cached."""
        tokenize, length = strategies.tokenize, len(captions)
        with torch.no_grad():
            tokens = (
                tokenize.tokenize_with_weights(captions) if self.is_weighted else (tokenize.tokenize(captions), None)
            )
            found = strategies.encode(models, *tokens)
        found |= {key.name: torch.full((length,), key.constant) for key in self.layout.keys if key.constant is not None}
        if missing := [name for name in self.needed if name not in found]:
            raise TrainingError(f"{type(strategies.text_encoding).__name__} gave no {', '.join(missing)} to cache")
        return {name: found[name] for name in self.needed}


def row_as_stored(
    batch: Conditioning, index: int, layout: TextLayout, *, keeps_bfloat16: bool = False
) -> Conditioning:
    """The outputs of one caption of a batch, each in the dtype and the length that the cache gives it. A caption
    without any token keeps one row."""
    row = {key.name: as_stored(batch[key.name][index], key, keeps_bfloat16) for key in layout.keys if key.name in batch}
    lengths = {key.mask: _num_rows(row[key.mask]) for key in layout.keys if key.mask in row}
    return {
        key.name: row[key.name][: lengths[key.mask]] if key.mask in lengths else row[key.name]
        for key in layout.keys
        if key.name in row
    }


def _num_rows(mask: torch.Tensor) -> int:
    """Up to its last 1, at least one."""
    return max(1, int(mask.nonzero().max()) + 1 if mask.any() else 0)


def as_stored(output: torch.Tensor, key: TextKey, keeps_bfloat16: bool = False) -> torch.Tensor:
    """One output of one caption in the dtype that the cache gives it: bfloat16 becomes float32 where files do not know
    it, masks and ids integers."""
    output = output.detach().cpu()
    if key.dtype == "float":
        return output.float() if output.dtype == torch.bfloat16 and not keeps_bfloat16 else output
    return output.to(getattr(torch, key.dtype))
