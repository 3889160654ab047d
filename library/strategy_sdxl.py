"""SDXL: captions to tokens of both encoders, tokens to conditioning [CLIP-L states, bigG states, pooled bigG], the
caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.components.clip_prompt_utils import num_tokens, token_ids, tokenize_prompt_rows, tokenize_rows
from library.components.text_encoder_utils import CLIP_G, pool_at_first_eos
from library.components.tokenizers import load_clip_tokenizer
from library.device_utils import to_device
from library.families.sdxl import FAMILY
from library.generation.prompt_weighting import PER_ROW, apply_weights, joined
from library.strategy_base import TextEncoderOutputsCachingStrategy, TextEncodingStrategy, TokenizeStrategy
from library.strategy_ldm import SdSdxlLatentsCachingStrategy

__all__ = [
    "SdSdxlLatentsCachingStrategy", "SdxlTextEncoderOutputsCachingStrategy", "SdxlTextEncodingStrategy",
    "SdxlTokenizeStrategy",
]  # fmt: skip

SECOND_PAD = CLIP_G.pad
"""id 0 of the common vocabulary, with which the second encoder was trained"""


class SdxlTokenizeStrategy(TokenizeStrategy):
    """Rows of 77 tokens for each encoder: one for 75 caption tokens, 2 or 3 for `max_length` 150 or 225.

    `is_weighted`: captions carry weights (--weighted_captions).
    """

    def __init__(
        self, max_length: int | None = None, tokenizer_cache_dir: str | None = None, *,
        tokenizers: tuple[Any, Any] | None = None, is_weighted: bool = False,
    ) -> None:  # fmt: skip
        self.num_rows = (max_length or PER_ROW) // PER_ROW
        self.is_weighted = is_weighted
        self.tokenizer1, self.tokenizer2 = tokenizers or (
            load_clip_tokenizer(None, tokenizer_cache_dir),
            load_clip_tokenizer(None, tokenizer_cache_dir, pad_token=SECOND_PAD),
        )

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer1, self.tokenizer2]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[ids of CLIP-L [B, N, 77], ids of bigG]; marks of weights are text."""
        texts = [text] if isinstance(text, str) else list(text)
        return [token_ids(tokenizer, texts, self.num_rows) for tokenizer in self.tokenizers]

    def tokenize_with_weights(self, text: str | list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """(ids of both, weights of both), all [B, N, 77]."""
        texts = [text] if isinstance(text, str) else list(text)
        both = [tokenize_rows(tokenizer, texts, self.num_rows, is_weighted=True) for tokenizer in self.tokenizers]
        return [ids for ids, _ in both], [weights for _, weights in both]

    def tokenize_prompt(self, text: str) -> tuple[list[Tensor], list[Tensor]]:
        """Ids and then weights of both encoders for a sample prompt: it may carry weights and take up to three rows,
        whatever captions do."""
        both = [
            tokenize_prompt_rows(tokenizer, text, self.num_rows) for tokenizer in (self.tokenizer1, self.tokenizer2)
        ]
        return [ids for ids, _ in both], [weights for _, weights in both]

    def overlong(self, text: str) -> bool:
        return num_tokens(self.tokenizer1, text, is_weighted=self.is_weighted) > self.num_rows * PER_ROW


class SdxlTextEncodingStrategy(TextEncodingStrategy):
    """The last but one layer of both encoders without the final norm; bigG pooled at the end token of the first row."""

    def encode_tokens(
        self, tokenize_strategy: SdxlTokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[states of CLIP-L [B, 75 N + 2, 768], of bigG [B, 75 N + 2, 1280], pooled [B, 1280]]; None where a model is
        absent."""
        first, _ = self._encoded(models[0], tokens[0], None)
        second, pooled = self._encoded(models[1], tokens[1], tokenize_strategy.tokenizer2.eos_token_id)
        return [first, second, pooled]

    def encode_tokens_with_weights(
        self, tokenize_strategy: SdxlTokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor],
        weights: list[Tensor],
    ) -> list[Tensor | None]:
        """The same, each state times the weight of its token; the pooled one is not weighted."""
        *states, pooled = self.encode_tokens(tokenize_strategy, models, tokens)
        weighted = [None if s is None else apply_weights(s, joined(w)) for s, w in zip(states, weights, strict=True)]
        return [*weighted, pooled]

    def _encoded(self, encoder: nn.Module, ids: Tensor, eos_id: int | None) -> tuple[Tensor | None, Tensor | None]:
        """(joined states, pooled state of the first row where `eos_id` asks for it)."""
        if encoder is None:
            return None, None
        rows = to_device(ids.flatten(0, 1), next(encoder.parameters()).device)  # [B N, 77]
        result = encoder.text_model(input_ids=rows, output_hidden_states=True)
        states = joined(result.hidden_states[-2].unflatten(0, ids.shape[:2]))  # [B, 75 N + 2, D]
        if eos_id is None:
            return states, None
        pooled = pool_at_first_eos(result.last_hidden_state, rows, eos_id)[:: ids.shape[1]]  # [B, D] of first rows
        # row by row: a matrix of one row takes another kernel, and a caption's result must not depend on those encoded
        # with it
        return states, torch.cat([encoder.text_projection(row) for row in pooled.split(1)])


class SdxlTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    architecture = FAMILY.architecture
