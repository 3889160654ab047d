"""Rows of new tokens beside the embedding table of a text encoder, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional


class EmbeddingRows(nn.Module):
    """Stands in the place of a text encoder's `table`: ids from `first` on are `rows` [n, D], which alone learn.

    The rows belong to whoever trains them: they are no part of the encoder's parameters, whose type and place stay
    those of the model.
    """

    def __init__(self, table: nn.Embedding, rows: nn.Parameter, first: int) -> None:
        super().__init__()
        self.table = table
        self.first = first
        self.num_embeddings = max(table.num_embeddings, first + len(rows))
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


def start_rows(table: nn.Embedding, ids: list[int] | None, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` rows [n, D], float32 on the CPU: those of `ids` in turn, or random ones, spread like those of the
    table."""
    known = table.weight.detach().float().cpu()
    if ids:
        return known[torch.tensor([ids[number % len(ids)] for number in range(count)])]
    return known.mean(0) + known.std(0) * torch.randn(count, known.shape[1], generator=generator)
