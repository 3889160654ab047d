"""Words that text encoders did not know: their tokens, and their vectors beside the embedding table, which stays as it
is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from library.core.errors import ConfigError


class EmbeddingRows(nn.Module):
    """Stands in the place of a text encoder's `table`, or of other such rows: ids from `first` on are `rows` [n, D].

    The rows belong to whoever made them: they are no part of the encoder's parameters, whose type and place stay those
    of the model. In training they alone learn.
    """

    def __init__(self, table: nn.Embedding | EmbeddingRows, rows: torch.Tensor, first: int) -> None:
        super().__init__()
        self.table = table
        self.first = first
        self.num_embeddings = max(table.num_embeddings, first + len(rows))
        self.embedding_dim: int = table.embedding_dim
        self._rows = (rows,)
        self._start = rows.detach().clone()
        self._uses_start = False

    @property
    def weight(self) -> torch.Tensor:
        """Of the table, for code that asks for type or place."""
        return self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Vectors [..., D] of ids [...]."""
        is_new = ids >= self.first
        known = self.table(ids.masked_fill(is_new, 0))
        rows = (self._start if self._uses_start else self._rows[0]).to(known)
        new = functional.embedding((ids - self.first).clamp(min=0), rows)
        return torch.where(is_new[..., None], new, known)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Inside, the rows are those of the start."""
        self._uses_start = True
        try:
            yield
        finally:
            self._uses_start = False


def start_rows(
    table: nn.Embedding | EmbeddingRows, ids: Sequence[int] | None, count: int, generator: torch.Generator
) -> torch.Tensor:
    """`count` rows [n, D], float32 on the CPU: those of `ids` in turn, or random ones, spread like those of the
    table."""
    known = table.weight.detach().float().cpu()
    if ids:
        return known[torch.tensor([ids[number % len(ids)] for number in range(count)])]
    return known.mean(0) + known.std(0) * torch.randn(count, known.shape[1], generator=generator)


def add_tokens(tokenizer: Any, words: Sequence[str], label: str) -> int:
    """Let a tokenizer know `words`, each as one token where it stands alone; the id of the first, behind which the
    others follow. ConfigError when its numbers have gaps; `label` names it."""
    from tokenizers import AddedToken

    first = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    if tokenizer.convert_tokens_to_ids(list(words)) != list(range(first, first + len(words))):
        raise ConfigError(f"the tokenizer of {label} cannot be extended: its numbers have gaps")
    return first
