"""Words of embedding files in prompts: their tokens, their vectors in the text encoders, prompts as they are read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.checkpoints.embeddings import Widths, WordVectors, bundled_words, read_layered, read_word
from library.components.word_rows import EmbeddingRows, add_tokens
from library.core.errors import Problems
from library.strategy_layers import LayeredIds
from library.training.sampling_prompts import whole_word

logger = logging.getLogger(__name__)


@dataclass
class PromptWords:
    """Words with vectors of their own, for the tokenizers and text encoders of a model (None: left out), which have
    `keys` as names in embedding files. In prompts a word stands for all of its vectors, also where the tokenizer knows
    a word of that name."""

    tokenizers: Sequence[Any]
    encoders: Sequence[nn.Module | None]
    keys: Sequence[str]
    layered: list[LayeredIds] = field(default_factory=list)
    """the words that have vectors for each layer with cross-attention"""
    _tokens: dict[str, str] = field(default_factory=dict)
    """word -> its tokens"""
    _added: int = 0

    def add(self, word: WordVectors) -> None:
        """A word with vectors for each text encoder."""
        tokens = self._register(word)
        for key, tokenizer, encoder in zip(self.keys, self.tokenizers, self.encoders):
            if tokenizer is not None and encoder is not None:
                self._extend(key, tokenizer, encoder, tokens, word.vectors[key])

    def join(self, encoders: Sequence[nn.Module | None], words: Iterable[WordVectors]) -> None:
        """Text encoders that were not there yet, and their words."""
        self.encoders = encoders
        for word in words:
            self.add(word)

    def add_layered(self, word: WordVectors) -> None:
        """A word with vectors for each layer, of the only text encoder; rows are in the order of the layers."""
        first_layer = self._register(word)
        rows = torch.cat(list(word.vectors.values()))  # [layers * n, D]
        others = [f"{token}{layer}" for layer in list(word.vectors)[1:] for token in first_layer]
        first = self._extend(self.keys[0], self.tokenizers[0], self.encoders[0], [*first_layer, *others], rows)
        self.layered.append(LayeredIds(first, word.count, len(word.vectors)))

    def _register(self, word: WordVectors) -> list[str]:
        """The tokens of a new word: names that no prompt has."""
        self._added += 1
        tokens = [f"<word{self._added}.{number}>" for number in range(word.count)]
        self._tokens[word.word] = " ".join(tokens)
        logger.info("%s: '%s' stands for %d vectors", word.source, word.word, word.count)
        if word.trained_as not in ("", word.word):
            logger.info(
                "%s was trained as '%s'; in prompts its word is the name of the file, '%s': rename the file for another",
                word.source, word.trained_as, word.word,
            )
        return tokens

    @staticmethod
    def _extend(key: str, tokenizer: Any, encoder: nn.Module, tokens: Sequence[str], rows: torch.Tensor) -> int:
        table = encoder.get_input_embeddings()
        first = add_tokens(tokenizer, tokens, key)
        encoder.set_input_embeddings(EmbeddingRows(table, rows.to(table.weight.device), first))
        return first

    def text(self, prompt: str) -> str:
        """A prompt as it is tokenized."""
        if not self._tokens:
            return prompt
        longest_first = sorted(self._tokens, key=len, reverse=True)
        pattern = "|".join(whole_word(word).pattern for word in longest_first)
        return re.sub(pattern, lambda match: self._tokens[match.group(0)], prompt)


def read_words(
    files: Iterable[str], bundles: Iterable[tuple[str, str]], widths: Widths, option: str
) -> list[WordVectors]:
    """The words of embedding files, each under the name of its file, and those of adapter files (option, path), of
    which an embedding file replaces one of the same name. ConfigError with everything that is wrong."""
    problems, found, own = Problems(), {}, {}
    for name, path in bundles:
        for vectors in problems.attempt(lambda: bundled_words(path, widths, name)) or ():
            found[vectors.word] = vectors
    for path in files:
        word = Path(path).stem
        if word in own:
            problems.add(f"--{option}: two files give the word '{word}'; rename one")
        own[word] = problems.attempt(lambda: read_word(path, word, widths, option))
    problems.raise_if_any()
    return list({**found, **own}.values())


def missing_files(files: Iterable[str], option: str) -> list[str]:
    return [f"--{option}: {path}: there is no such file" for path in files if not Path(path).is_file()]


def read_layered_words(files: Iterable[str], layers: Sequence[str], width: int, option: str) -> list[WordVectors]:
    """The words of files with vectors of `width` values for each of `layers`. ConfigError with everything that is
    wrong."""
    problems, found = Problems(), {}
    for path in files:
        word = Path(path).stem
        if word in found:
            problems.add(f"--{option}: two files give the word '{word}'; rename one")
        found[word] = problems.attempt(lambda: read_layered(path, word, layers, option, width))
    problems.raise_if_any()
    return list(found.values())
