"""Captions for CLIP text encoders: weights in the text, rows of 77 tokens, and their states joined into one sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROW = 77
"""tokens of a row: begin, 75 of the caption, end"""
PER_ROW = ROW - 2
_ROUND, _SQUARE = 1.1, 1 / 1.1
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def parse_weights(text: str) -> list[tuple[str, float]]:
    """(text, weight) pieces of a caption: (x) is 1.1, [x] 1/1.1, (x:1.3) 1.3; brackets nest and multiply.

    A backslash makes the next character of ()[]\\ literal and disappears otherwise. An unclosed bracket counts to the end; an
    unmatched closing one, and :number outside round brackets, is text. Neighbours of equal weight are one piece; no text at
    all is [("", 1.0)].
    """
    pieces: list[list[Any]] = []
    open_brackets: list[tuple[str, int]] = []
    position, plain = 0, ""

    def flush() -> None:
        nonlocal plain
        if plain:
            pieces.append([plain, 1.0])
            plain = ""

    def multiply(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    while position < len(text):
        character = text[position]
        if character == "\\":
            plain += text[position + 1 : position + 2]
            position += 2
            continue
        if character in "([":
            flush()
            open_brackets.append((character, len(pieces)))
        elif character == ")" and open_brackets and open_brackets[-1][0] == "(":
            given, plain = _trailing_number(plain, text, position)
            flush()
            multiply(open_brackets.pop()[1], _ROUND if given is None else given)
        elif character == "]" and open_brackets and open_brackets[-1][0] == "[":
            flush()
            multiply(open_brackets.pop()[1], _SQUARE)
        else:
            plain += character
        position += 1
    flush()
    for bracket, start in open_brackets:
        multiply(start, _ROUND if bracket == "(" else _SQUARE)
    return _merged(pieces)


def _trailing_number(plain: str, text: str, position: int) -> tuple[float | None, str]:
    """The number of `...:number)` and the text before it; None without one."""
    before, colon, number = plain.rpartition(":")
    written = text[:position].rpartition(":")[2]  # as written: an escaped digit is text
    if colon and _NUMBER.fullmatch(number) and written == number:
        return float(number), before
    return None, plain


def _merged(pieces: Sequence[Sequence[Any]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def token_rows(ids: Sequence[int], num_rows: int, *, begin: int, end: int, pad: int) -> list[list[int]]:
    """`num_rows` rows of 77 ids from a caption's ids without begin and end; what does not fit is cut off."""
    rows = []
    for number in range(num_rows):
        part = list(ids[number * PER_ROW : (number + 1) * PER_ROW])
        rows.append([begin, *part, end, *[pad] * (PER_ROW - len(part))])
    return rows


def weight_rows(weights: Sequence[float], num_rows: int) -> list[list[float]]:
    """Weights in the places of `token_rows`; begin, end and padding have 1."""
    rows = []
    for number in range(num_rows):
        part = list(weights[number * PER_ROW : (number + 1) * PER_ROW])
        rows.append([1.0, *part, *[1.0] * (ROW - 1 - len(part))])
    return rows


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


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without begin and end, all of them."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def joined(rows: Tensor) -> Tensor:
    """Row states [B, N, 77, ...] as one sequence [B, 75 N + 2, ...]: the first begin, the middle of every row, the last end."""
    count = rows.shape[1]
    parts = [
        rows[:, number, 0 if number == 0 else 1 : ROW if number == count - 1 else ROW - 1] for number in range(count)
    ]
    return torch.cat(parts, dim=1)
