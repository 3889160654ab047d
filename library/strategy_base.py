"""The four strategies of a model family: tokens, text encoding, and the caches of latents and text-encoder outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StrategySet:
    """The strategies of one run, made by the family and handed to dataset and step. None = that cache is off."""

    tokenize: Any
    text_encoding: Any
    latents_caching: Any | None = None
    text_encoder_outputs_caching: Any | None = None
