"""Captions for CLIP text encoders as rows of 77 tokens with their weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from library.generation.prompt_weighting import PER_ROW, parse_weights, rows_needed, token_rows, weight_rows

logger = logging.getLogger(__name__)

KNOWN_TEXTS = 4096
MAX_PROMPT_ROWS = 3
"""rows of 75 tokens that a sample prompt may take"""


def tokenize_rows(tokenizer: Any, texts: Sequence[str], num_rows: int, *, is_weighted: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, num_rows, 77] and their weights [B, num_rows, 77] (all 1 unless `is_weighted` reads them from the
    texts)."""
    if not is_weighted:
        rows = token_ids(tokenizer, texts, num_rows)
        return rows, torch.ones(rows.shape)
    ids, weights = [], []
    for text in texts:
        row_ids: list[int] = []
        row_weights: list[float] = []
        for piece, weight in parse_weights(text):
            part = _ids(tokenizer, piece)
            row_ids += part
            row_weights += [weight] * len(part)
        ids.append(_rows(tokenizer, row_ids, num_rows))
        weights.append(weight_rows(row_weights, num_rows))
    return torch.tensor(ids), torch.tensor(weights)


def token_ids(tokenizer: Any, texts: Sequence[str], num_rows: int) -> Tensor:
    """Ids [B, num_rows, 77] of texts whose marks of weights are text."""
    vocabulary = len(tokenizer)
    rows = [_known_rows(tokenizer, vocabulary, text, num_rows) for text in texts]
    return torch.stack(rows) if rows else torch.empty((0, num_rows, PER_ROW + 2), dtype=torch.int64)


def _rows(tokenizer: Any, ids: Sequence[int], num_rows: int) -> list[list[int]]:
    return token_rows(
        list(ids), num_rows, begin=tokenizer.bos_token_id, end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id
    )


def num_tokens(tokenizer: Any, text: str, *, is_weighted: bool) -> int:
    """Tokens of a text without begin and end; marks of weights are none when `is_weighted` reads them."""
    pieces = parse_weights(text) if is_weighted else [(text, 1.0)]
    return sum(len(_ids(tokenizer, piece)) for piece, _ in pieces)


def tokenize_prompt_rows(tokenizer: Any, prompt: str, num_rows: int) -> tuple[Tensor, Tensor]:
    """Ids [1, N, 77] and weights of a prompt for samples, with as many rows as it needs: `num_rows` or more, at most
    MAX_PROMPT_ROWS."""
    count = num_tokens(tokenizer, prompt, is_weighted=True)
    rows = max(num_rows, rows_needed(count, MAX_PROMPT_ROWS))
    if count > rows * PER_ROW:
        logger.warning(
            "the sample prompt '%.40s...' has %d tokens; the first %d are read", prompt, count, rows * PER_ROW
        )
    return tokenize_rows(tokenizer, [prompt], rows, is_weighted=True)


def _ids(tokenizer: Any, text: str) -> Sequence[int]:
    """Ids of a text without begin and end, all of them."""
    return _known_ids(tokenizer, len(tokenizer), text) if text else ()


@lru_cache(maxsize=KNOWN_TEXTS)
def _known_ids(tokenizer: Any, vocabulary: int, text: str) -> tuple[int, ...]:
    """Captions come again in every epoch; a tokenizer whose `vocabulary` has grown reads them anew."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@lru_cache(maxsize=KNOWN_TEXTS)
def _known_rows(tokenizer: Any, vocabulary: int, text: str, num_rows: int) -> Tensor:
    """Ids [num_rows, 77] of a text, which nobody writes to."""
    return torch.tensor(_rows(tokenizer, _ids(tokenizer, text), num_rows))
