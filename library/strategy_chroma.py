"""Chroma: captions to T5 tokens, tokens to conditioning [T5 states, text ids, T5 mask], and the text cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from library.components.tokenizers import load_t5_tokenizer
from library.families.chroma import FAMILY
from library.strategy_base import TextEncoderOutputsCachingStrategy, TextEncodingStrategy, TokenizeStrategy
from library.strategy_flux import (
    FluxLatentEncoder,
    FluxLatentsCachingStrategy,
    is_overlong,
    padded_tokens,
    t5_outputs,
)

__all__ = [
    "ChromaLatentsCachingStrategy", "ChromaTextEncoderOutputsCachingStrategy", "ChromaTextEncodingStrategy",
    "ChromaTokenizeStrategy", "FluxLatentEncoder",
]  # fmt: skip


class ChromaTokenizeStrategy(TokenizeStrategy):
    """T5 alone. The tokenizer comes from a folder or is a ready object (`t5xxl_tokenizer`), from `tokenizer_cache_dir`,
    the T5 file `t5xxl_path`, or the hub, in this order. ConfigError when it cannot be found."""

    def __init__(
        self,
        t5xxl_max_length: int = 512,
        tokenizer_cache_dir: str | None = None,
        t5xxl_tokenizer: Any | None = None,
        t5xxl_path: str | None = None,
    ) -> None:
        self.t5xxl_max_length = t5xxl_max_length
        ready = callable(t5xxl_tokenizer)
        self.t5xxl = t5xxl_tokenizer if ready else load_t5_tokenizer(t5xxl_tokenizer, tokenizer_cache_dir, t5xxl_path)
        self.t5xxl.model_max_length = t5xxl_max_length

    @property
    def reading_tokenizers(self) -> list[Any]:
        return [self.t5xxl]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[T5 ids [B, L], T5 mask [B, L] with 1 = token]."""
        tokens = padded_tokens(self.t5xxl, [text] if isinstance(text, str) else list(text), self.t5xxl_max_length)
        return [tokens["input_ids"], tokens["attention_mask"]]

    def overlong(self, text: str) -> bool:
        """Whether T5 does not see all of the text."""
        return is_overlong(self.t5xxl, text, self.t5xxl_max_length)


class ChromaTextEncodingStrategy(TextEncodingStrategy):
    """T5 never attends to padding."""

    def encode_tokens(
        self, tokenize_strategy: ChromaTokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[T5 states [B, L, D], text ids [B, L, 3] of zeros, T5 mask [B, L]]; None where `models` = [T5] has none.
        ConfigError when an id has no embedding row."""
        if models[0] is None:
            return [None, None, None]
        return t5_outputs(models[0], tokenize_strategy.t5xxl, *tokens, masked=True)


class ChromaLatentsCachingStrategy(FluxLatentsCachingStrategy):
    architecture = FAMILY.architecture


class ChromaTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """T5 states, their ids and mask."""

    architecture = FAMILY.architecture

    @property
    def flags(self) -> dict[str, bool]:
        return {"apply_t5_attn_mask": True}
