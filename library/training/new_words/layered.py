"""A word with vectors of its own for each layer with cross-attention: XTI, extended textual inversion,
arXiv 2303.09522."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.checkpoints.embeddings import read_layered
from library.components.word_rows import EmbeddingRows, start_rows
from library.core.errors import CheckpointError, UnsupportedCombination
from library.core.keyed_random import keyed_generator
from library.strategy_layers import LayeredIds, with_layers
from library.training.new_words.learned import LearnedWord

if TYPE_CHECKING:
    from library.dataset.strategies import StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.wiring.base import ModelFamily


class LayeredWord(LearnedWord):
    """A word of `num_vectors_per_token` vectors for each of `layers`, for families with one text encoder. Rows are in
    the order of the layers: row = layer * vectors + vector. In captions stand the tokens of the first layer."""

    layers: Sequence[str] = ()

    def problems(self, family: ModelFamily) -> list[str]:
        try:
            self.layers = family.text_layers()
        except (CheckpointError, OSError, TypeError):
            return []  # what is wrong with the model is told by the family
        if not self.layers:
            raise UnsupportedCombination(f"{family.name} has no words with vectors for each layer of its model")
        return super().problems(family)

    @property
    def parts(self) -> int:
        return len(self.layers)

    def read_start(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        return {keys[0]: self._read(self.opts.weights)} if self.opts.weights else {}

    def _read(self, path: str) -> torch.Tensor:
        """Rows [layers * n, D] of a file."""
        found = read_layered(path, self.opts.token_string or "", self.layers, "weights")
        return torch.cat(list(found.vectors.values()))

    @property
    def words(self) -> list[str]:
        return self.of_layer(self.layers[0])

    @property
    def tokens(self) -> list[str]:
        return [word for layer in self.layers for word in self.of_layer(layer)]

    def of_layer(self, layer: str) -> list[str]:
        """`zyx_MID zyx1_MID`: what a layer reads in the place of the word."""
        return [f"{word}_{layer}" for word in self.opts.words]

    def text_strategies(self, strategies: StrategySet) -> StrategySet:
        (first,) = self._first.values()
        return with_layers(strategies, [LayeredIds(first, self.opts.num_vectors_per_token, self.parts)])

    def fresh_rows(self, key: str, table: nn.Embedding | EmbeddingRows, runtime: Runtime) -> torch.Tensor:
        """Each vector starts as its token of the initial word in every layer."""
        generator, count = keyed_generator(runtime.seed, "new word", key), self.opts.num_vectors_per_token
        if self.init_ids.get(key):
            return start_rows(table, self.init_ids[key], count, generator).repeat(self.parts, 1)
        return start_rows(table, None, count * self.parts, generator)

    @property
    def description(self) -> str:
        vectors = f"{self.opts.num_vectors_per_token} x {self.parts} vectors"
        return f"{vectors} for the word '{self.opts.token_string}', of their own for {', '.join(self.layers)}"

    def file_tensors(self) -> dict[str, torch.Tensor]:
        (rows,) = self.rows.values()
        return dict(zip(self.layers, rows.detach().split(self.opts.num_vectors_per_token), strict=True))

    def load(self, path: str) -> None:
        (rows,) = self.rows.values()
        with torch.no_grad():
            rows.copy_(self._read(path))
