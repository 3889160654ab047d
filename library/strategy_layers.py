"""Text states of their own for each cross-attention of a denoiser: words with vectors for each layer (XTI)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TextLayout
from library.strategy_base import TextEncodingStrategy, TokenizeStrategy


@dataclass(frozen=True)
class LayeredIds:
    """The ids of a word of `count` vectors for each of `layers` layers: tokens hold those of the first layer, which
    begin at `first`; those of layer n are n * `count` further on."""

    first: int
    count: int
    layers: int

    def of_layer(self, ids: Tensor, layer: int) -> Tensor:
        """Ids as that layer reads them; the shape stays."""
        is_own = (ids >= self.first) & (ids < self.first + self.count)
        return torch.where(is_own, ids + layer * self.count, ids)


class LayeredEncodingStrategy(TextEncodingStrategy):
    """Another strategy, with one axis more: states [B, layers, L, D]. All `words` have the same layers."""

    def __init__(self, inner: TextEncodingStrategy, words: Sequence[LayeredIds]) -> None:
        self.inner = inner
        self.words = words

    def encode_tokens(
        self, tokenize_strategy: TokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        return self._layered(lambda own: self.inner.encode_tokens(tokenize_strategy, models, own), tokens)

    def encode_tokens_with_weights(
        self, tokenize_strategy: TokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor],
        weights: list[Tensor],
    ) -> list[Tensor | None]:
        return self._layered(
            lambda own: self.inner.encode_tokens_with_weights(tokenize_strategy, models, own, weights), tokens
        )

    def _layered(
        self, encode: Callable[[list[Tensor]], list[Tensor | None]], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        layers = self.words[0].layers
        each = [self._of_layer(tokens, layer) for layer in range(layers)]
        if all(torch.equal(a, b) for own in each[1:] for a, b in zip(own, tokens)):  # none of the words is there
            return [_repeated(output, layers) for output in encode(tokens)]
        made = [encode(own) for own in each]
        return [None if outputs[0] is None else torch.stack(outputs, dim=1) for outputs in zip(*made, strict=True)]

    def _of_layer(self, tokens: list[Tensor], layer: int) -> list[Tensor]:
        for word in self.words:
            tokens = [word.of_layer(ids, layer) for ids in tokens]
        return tokens


def _repeated(output: Tensor | None, layers: int) -> Tensor | None:
    """[B, ...] -> [B, layers, ...]."""
    return None if output is None else output[:, None].expand(-1, layers, *output.shape[1:])


def layered_layout(layout: TextLayout) -> TextLayout:
    """The layout of what a LayeredEncodingStrategy makes of it."""
    return dataclasses.replace(layout, keys=tuple(dataclasses.replace(key, rank=key.rank + 1) for key in layout.keys))


def with_layers(strategies: StrategySet, words: Sequence[LayeredIds]) -> StrategySet:
    """Strategies whose texts have states for each layer."""
    return dataclasses.replace(
        strategies, text_encoding=LayeredEncodingStrategy(strategies.text_encoding, words),
        text_layout=layered_layout(strategies.layout),
    )
