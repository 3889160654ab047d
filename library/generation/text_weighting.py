"""Weights of words in prompts for text encoders that read a text as a whole (T5).

`(words:1.4)` and `[words]` mean what they mean for CLIP (`prompt_weighting.parse_weights`). The text without its marks is
tokenized and encoded once, so that commas and neighbours are as they are without weights; then the states of the marked
tokens go away from those of an empty prompt, e = e0 + w (e - e0). A weight of 1 leaves every bit, 0 leaves nothing of
the word, a negative one leads away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.device_utils import to_like
from library.generation.prompt_weighting import parse_weights


def plain_text(text: str) -> str:
    """A prompt without its marks."""
    return "".join(piece for piece, _ in parse_weights(text))


def token_weights(tokenizer: Any, text: str, ids: Sequence[int]) -> list[float]:
    """The weight of each of `ids`, the tokens of the plain text as the family has them: those of its characters, on
    average where a token has some of two pieces; special tokens and padding have 1. ConfigError when the family's
    tokens are not those of the text."""
    plain, of_characters = "", []
    for piece, weight in parse_weights(text):
        plain += piece
        of_characters += [weight] * len(piece)
    found = tokenizer(plain, return_offsets_mapping=True, verbose=False)
    weights = [1.0] * len(ids)
    for place, (token, (start, end)) in enumerate(zip(found["input_ids"], found["offset_mapping"])):
        if place >= len(ids):
            break  # cut off
        parts = [of_characters[k] for k in range(start, end) if not plain[k].isspace()]
        if int(ids[place]) != token and parts and place < len(ids) - 1:
            raise ConfigError(
                f"--prompt_weighting: the prompt '{plain[:60]}' is not tokenized as it is written (odd blanks or signs?);"
                " write it plainly"
            )
        weights[place] = sum(parts) / len(parts) if parts else 1.0
    return weights


def on_states(states: Tensor | Sequence[Tensor], empty: Tensor | Sequence[Tensor], weights: Sequence[float]) -> Any:
    """`weighted_states` of a conditioning entry: [1, L, D], or a list of one [L, D] where lengths differ."""
    if isinstance(states, Tensor):
        return weighted_states(states, empty, weights)
    return [weighted_states(states[0][None], empty[0][None], weights)[0]]


def weighted_states(states: Tensor, empty: Tensor, weights: Sequence[float]) -> Tensor:
    """States [1, L, D] with the weights [L or fewer] of their tokens, counted from those of the empty prompt
    [1, L', D], of which the last one stands for what it lacks."""
    chosen = [k for k, weight in enumerate(weights[: states.shape[1]]) if weight != 1]
    if not chosen:
        return states
    rows = torch.tensor(chosen, device=states.device)
    bases = torch.tensor([min(k, empty.shape[1] - 1) for k in chosen], device=states.device)
    base = to_like(empty, states)[:, bases].float()
    factor = torch.tensor([weights[k] for k in chosen], device=states.device).view(1, -1, 1)
    changed = base + factor * (states[:, rows].float() - base)
    result = states.clone()
    result[:, rows] = changed.to(states.dtype)
    return result
