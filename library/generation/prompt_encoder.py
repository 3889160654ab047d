"""Prompts to conditioning: weights, rows beyond 75 tokens, words of textual inversions."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoints.embeddings import read_inversion
from library.components.tokenizers import vocabulary_problem
from library.core.errors import AtelierError, CheckpointError, ConfigError
from library.dataset.strategies import Conditioning
from library.dataset.text_cache_io import TextLayout
from library.generation.prompt_weighting import PER_ROW, apply_weights, joined, parse_weights, rows_needed
from library.strategy_base import TextEncodingStrategy, TokenizeStrategy

logger = logging.getLogger(__name__)

@dataclass
class WordTokenizer:
    """A CLIP tokenizer that knows further words, each with ids of its own: those of textual inversions."""

    tokenizer: Any
    words: dict[str, list[int]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __call__(self, text: str, **how: Any) -> Any:
        if not self.words:
            return self.tokenizer(text, **how)
        pattern = "|".join(re.escape(word) for word in sorted(self.words, key=len, reverse=True))
        ids: list[int] = []
        for piece in re.split(rf"(?<!\w)({pattern})(?!\w)", text):
            if piece in self.words:
                ids += self.words[piece]
            elif piece.strip():
                ids += self.tokenizer(piece, **how).input_ids
        return _Encoded(ids)


@dataclass(frozen=True)
class _Encoded:
    input_ids: list[int]


@dataclass
class PromptEncoder:
    """Text encoders and how captions go through them; `layout` names what comes out. `make_tokenize(length)` gives the
    family's token strategy for prompts of `length` tokens; `embedding_keys`: see FamilyRecord."""

    make_tokenize: Callable[[int], TokenizeStrategy]
    encoding: TextEncodingStrategy
    layout: TextLayout
    encoders: Sequence[nn.Module]
    tokenizers: Sequence[WordTokenizer]
    embedding_keys: Sequence[str]
    max_rows: int = 1
    normalize_mode: str = "original"
    _told: set[str] = field(default_factory=set)

    def rows(self, *texts: str) -> int:
        """Rows of 75 tokens that hold the longest of the texts, at most `max_rows`; tells once what is cut off."""
        longest = 0
        for text in texts:
            count = sum(len(self._ids(piece)) for piece, _ in parse_weights(text))
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
        """Conditioning of one prompt: states [1, 75 N + 2, D], ..."""
        tokenize = self.make_tokenize(num_rows * PER_ROW)
        ids, weights = tokenize.tokenize_with_weights(text)
        outputs = self.encoding.encode_tokens(tokenize, list(self.encoders), ids)
        for place, weight in enumerate(weights):
            if bool((weight != 1).any()):
                outputs[place] = apply_weights(outputs[place], joined(weight), self.normalize_mode)
        return self.layout.named(outputs)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizers[0](text, add_special_tokens=False, verbose=False).input_ids if text else []

    def add_inversion(self, path: str) -> None:
        """A textual inversion under the name of its file. CheckpointError when its vectors do not fit the encoders."""
        word = Path(path).stem
        parts = read_inversion(path, self.embedding_keys)
        for tokenizer, encoder, vectors in zip(self.tokenizers, self.encoders, parts, strict=True):
            table = encoder.text_model.embeddings.token_embedding
            if vectors.shape[1] != table.weight.shape[1]:
                raise CheckpointError(
                    f"{path} holds vectors of {vectors.shape[1]} values; the text encoder has {table.weight.shape[1]}. "
                    "It belongs to another model"
                )
            first = len(table.weight)
            table.weight = nn.Parameter(torch.cat((table.weight, vectors.to(table.weight))), requires_grad=False)
            table.num_embeddings = len(table.weight)
            tokenizer.words[word] = list(range(first, first + len(vectors)))
        logger.info("textual inversion '%s': %d vectors", word, len(parts[0]))


def tokenizer_problems(load: Callable[[], Any], num_rows: int) -> list[str]:
    """What is wrong with a CLIP tokenizer that is still to be loaded, for an embedding of `num_rows` rows."""
    try:
        problem = vocabulary_problem(load(), num_rows, "CLIP", "the text encoder of --ckpt")
    except AtelierError as error:
        return [str(error)]
    return [f"{problem}; give its folder with --clip_tokenizer"] if problem else []


def checked_inversions(paths: Sequence[str]) -> list[str]:
    """What is wrong with the list, before any model is loaded."""
    found = [
        f"--textual_inversion_embeddings: {path}: there is no such file" for path in paths if not Path(path).is_file()
    ]
    stems = [Path(path).stem for path in paths]
    return found + [
        f"--textual_inversion_embeddings: two files give the word '{stem}'"
        for stem in sorted({s for s in stems if stems.count(s) > 1})
    ]


def stacked(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of single prompts as one batch."""
    try:
        return {name: torch.cat([entry[name] for entry in conditionings]) for name in conditionings[0]}
    except RuntimeError as error:
        raise ConfigError(f"prompts of different lengths are in one batch ({error}); use --batch_size 1") from error
