"""Prompts to conditioning: weights, rows beyond 75 tokens, words of textual inversions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from library.checkpoints.embeddings import WordVectors
from library.components.tokenizers import vocabulary_problem
from library.core.errors import AtelierError, ConfigError
from library.dataset.strategies import Conditioning
from library.dataset.text_cache_io import TextLayout
from library.generation.prompt_weighting import PER_ROW, apply_weights, joined, parse_weights, rows_needed
from library.generation.words import PromptWords
from library.strategy_base import TextEncodingStrategy, TokenizeStrategy
from library.strategy_layers import LayeredEncodingStrategy, layered_layout

logger = logging.getLogger(__name__)


@dataclass
class PromptEncoder:
    """Text encoders and how captions go through them; `layout` names what comes out. `make_tokenize(length)` gives the
    family's token strategy for prompts of `length` tokens; `embedding_keys`: see FamilyRecord."""

    make_tokenize: Callable[[int], TokenizeStrategy]
    encoding: TextEncodingStrategy
    layout: TextLayout
    encoders: Sequence[nn.Module]
    tokenizers: Sequence[Any]
    embedding_keys: Sequence[str]
    max_rows: int = 1
    normalize_mode: str = "original"
    _told: set[str] = field(default_factory=set)

    def rows(self, *texts: str) -> int:
        """Rows of 75 tokens that hold the longest of the texts, at most `max_rows`; tells once what is cut off."""
        longest = 0
        for text in texts:
            count = sum(len(self._ids(piece)) for piece, _ in parse_weights(self.words.text(text)))
            if count > self.max_rows * PER_ROW and text not in self._told:
                self._told.add(text)
                logger.warning(
                    "the prompt '%s' has %d tokens; what is beyond %d is cut off (--max_embeddings_multiples)", text,
                    count, self.max_rows * PER_ROW
                )
            longest = max(longest, count)
        return rows_needed(longest, self.max_rows)

    @torch.no_grad()
    def encode(self, text: str, num_rows: int) -> Conditioning:
        """Conditioning of one prompt: states [1, 75 N + 2, D] (with words of layers [1, layers, 75 N + 2, D]), ..."""
        tokenize = self.make_tokenize(num_rows * PER_ROW)
        ids, weights = tokenize.tokenize_with_weights(self.words.text(text))
        outputs = self.encoding.encode_tokens(tokenize, list(self.encoders), ids)
        for place, weight in enumerate(weights):
            if bool((weight != 1).any()):
                # [1, L, D], or [1, layers, L, D] where words have vectors for each layer
                states, own = outputs[place].flatten(0, -3), joined(weight)
                weighted = apply_weights(states, own.expand(len(states), -1), self.normalize_mode)
                outputs[place] = weighted.reshape(outputs[place].shape)
        return self.layout.named(outputs)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizers[0](text, add_special_tokens=False, verbose=False).input_ids if text else []

    @cached_property
    def words(self) -> PromptWords:
        """Words of embedding files."""
        return PromptWords(self.tokenizers, self.encoders, self.embedding_keys)

    def add_layered(self, words: Sequence[WordVectors]) -> None:
        """Words with vectors for each layer with cross-attention: all texts have states for each of these then."""
        for word in words:
            self.words.add_layered(word)
        self.encoding = LayeredEncodingStrategy(self.encoding, self.words.layered)
        self.layout = layered_layout(self.layout)


def tokenizer_problems(load: Callable[[], Any], num_rows: int) -> list[str]:
    """What is wrong with a CLIP tokenizer that is still to be loaded, for an embedding of `num_rows` rows."""
    try:
        problem = vocabulary_problem(load(), num_rows, "CLIP", "the text encoder of --ckpt")
    except AtelierError as error:
        return [str(error)]
    return [f"{problem}; give its folder with --clip_tokenizer"] if problem else []


def stacked(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of single prompts as one batch."""
    try:
        return {name: torch.cat([entry[name] for entry in conditionings]) for name in conditionings[0]}
    except RuntimeError as error:
        raise ConfigError(f"prompts of different lengths are in one batch ({error}); use --batch_size 1") from error
