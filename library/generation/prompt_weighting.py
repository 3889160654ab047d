"""Weights in prompts, and prompts longer than one row of a CLIP text encoder: pure functions on texts, ids and
states."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch

from library.core.errors import ConfigError, did_you_mean
from library.device_utils import to_device, to_like

logger = logging.getLogger(__name__)

ROW_LENGTH = 77
"""tokens of a row: begin, 75 of the prompt, end"""
PER_ROW = ROW_LENGTH - 2
ROUND_FACTOR, SQUARE_FACTOR = 1.1, 1 / 1.1
NORMALIZE_MODES = ("original", "abs", "none")

_PARTS = re.compile(
    r"\\(?P<literal>[\s\S]?)|(?P<open>[(\[])|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\)|(?P<close>[)\]])|(?P<text>[^\\()\[\]:]+|:)"
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Pieces (text, weight) of a prompt: `(x)` 1.1, `[x]` 1/1.1, `(x:1.3)` 1.3; nested ones multiply.

    A backslash makes one of ()[]\\ literal and disappears before anything else. An unclosed bracket reaches to the end.
    A closing bracket that closes nothing is text, and so is a number outside round brackets or one that is malformed.
    Neighbours of equal weight are joined; a prompt without text is [("", 1.0)].
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # kind -> index of the first piece inside, outermost first

    def close(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PARTS.finditer(prompt):
        kind, text = match.lastgroup, match.group(0)
        if kind == "open":
            opened[text].append(len(pieces))
        elif kind == "weight" and opened["("]:
            close("(", float(match["weight"]))
        elif text == ")" and opened["("]:
            close("(", ROUND_FACTOR)
        elif text == "]" and opened["["]:
            close("[", SQUARE_FACTOR)
        else:
            pieces.append((match["literal"] if kind == "literal" else text, 1.0))
    for kind, factor in (("(", ROUND_FACTOR), ("[", SQUARE_FACTOR)):
        while opened[kind]:
            close(kind, factor)
    return _joined_neighbours(pieces)


def _joined_neighbours(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    joined_pieces: list[tuple[str, float]] = []
    for text, weight in pieces:
        if not text:
            continue
        if joined_pieces and joined_pieces[-1][1] == weight:
            joined_pieces[-1] = (joined_pieces[-1][0] + text, weight)
        else:
            joined_pieces.append((text, weight))
    return joined_pieces or [("", 1.0)]


def rows_needed(num_tokens: int, max_rows: int) -> int:
    """Rows that hold a prompt's tokens without begin and end: at least 1, at most `max_rows`."""
    return max(1, min(-(-num_tokens // PER_ROW), max_rows))


def token_rows(ids: Sequence[int], num_rows: int, *, begin: int, end: int, pad: int) -> list[list[int]]:
    """`num_rows` rows of 77 ids from a prompt's ids without begin and end. What does not fit is cut off."""
    rows = []
    for start in range(0, num_rows * PER_ROW, PER_ROW):
        part = list(ids[start : start + PER_ROW])
        rows.append([begin, *part, end, *[pad] * (PER_ROW - len(part))])
    return rows


def weight_rows(weights: Sequence[float], num_rows: int) -> list[list[float]]:
    """The weights of `token_rows`' places; begin, end and padding have 1."""
    return [
        [1.0, *weights[start : start + PER_ROW], *[1.0] * (ROW_LENGTH - 1 - len(weights[start : start + PER_ROW]))]
        for start in range(0, num_rows * PER_ROW, PER_ROW)
    ]


def joined_positions(num_rows: int) -> list[int]:
    """Positions in the flattened rows [num_rows * 77] that make one sequence [75 * num_rows + 2]: the first begin, the
    75 places of every row, the last end."""
    middle = [row * ROW_LENGTH + 1 + place for row in range(num_rows) for place in range(PER_ROW)]
    return [0, *middle, num_rows * ROW_LENGTH - 1]


def joined(rows: torch.Tensor) -> torch.Tensor:
    """States or weights of rows [B, N, 77, ...] as one sequence [B, 75 N + 2, ...]."""
    flat = rows.flatten(1, 2)  # [B, N * 77, ...]
    return flat[:, to_device(torch.tensor(joined_positions(rows.shape[1])), flat.device)]


def apply_weights(hidden_states: torch.Tensor, weights: torch.Tensor, mode: str = "none") -> torch.Tensor:
    """Hidden states [B, L, D] times weights [B, L], then brought back to their size by `mode`.

    original: each sample's mean over tokens and width as before; abs: its mean absolute value; none: as it is. A sample
    whose weighted mean is exactly 0 is not rescaled. Raises ConfigError for an unknown mode.
    """
    check_normalize_mode(mode)
    weighted = hidden_states * to_like(weights, hidden_states)[..., None]
    if mode == "none":
        return weighted
    size = _mean_absolute if mode == "abs" else _mean
    before, after = size(hidden_states), size(weighted)  # [B, 1, 1] float32
    factor = torch.where(after == 0, torch.ones_like(after), before / after)
    return (weighted.float() * factor).to(hidden_states.dtype)


def _mean(states: torch.Tensor) -> torch.Tensor:
    return states.float().mean(dim=(-2, -1), keepdim=True)


def _mean_absolute(states: torch.Tensor) -> torch.Tensor:
    return states.float().abs().mean(dim=(-2, -1), keepdim=True)


def check_normalize_mode(mode: str) -> None:
    """ConfigError for a mode of --emb_normalize_mode that there is not."""
    if mode not in NORMALIZE_MODES:
        raise ConfigError(
            f"--emb_normalize_mode is '{mode}'{did_you_mean(mode, NORMALIZE_MODES) or '.'} Known: {', '.join(NORMALIZE_MODES)}"
        )


def warn_of_signed_mean(mode: str) -> None:
    """One log line at start: "original" divides by a mean that can be near 0."""
    if mode == "original":
        logger.warning(
            "--emb_normalize_mode original divides by a signed mean, which can be near 0 and then distorts pictures "
            "with weighted"
            " prompts; --emb_normalize_mode abs does not"
        )


def sub_prompts(prompt: str) -> list[str]:
    """The parts of a prompt between ` AND `, one per region of a mask."""
    return [part.strip() for part in prompt.split(" AND ")]
