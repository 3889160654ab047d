"""Captions for CLIP text encoders as rows of 77 tokens with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.prompt_weighting import parse_weights, token_rows, weight_rows


def tokenize_rows(tokenizer: Any, texts: Sequence[str], num_rows: int, *, is_weighted: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, num_rows, 77] and their weights [B, num_rows, 77] (all 1 unless `is_weighted` reads them from the texts)."""
    special = {"begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    ids, weights = [], []
    for text in texts:
        row_ids: list[int] = []
        row_weights: list[float] = []
        for piece, weight in parse_weights(text) if is_weighted else [(text, 1.0)]:
            part = _ids(tokenizer, piece)
            row_ids += part
            row_weights += [weight] * len(part)
        ids.append(token_rows(row_ids, num_rows, **special))
        weights.append(weight_rows(row_weights, num_rows))
    return torch.tensor(ids), torch.tensor(weights)


def num_tokens(tokenizer: Any, text: str, *, is_weighted: bool) -> int:
    """Tokens of a text without begin and end; marks of weights are none when `is_weighted` reads them."""
    pieces = parse_weights(text) if is_weighted else [(text, 1.0)]
    return sum(len(_ids(tokenizer, piece)) for piece, _ in pieces)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without begin and end, all of them."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []
