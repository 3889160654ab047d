"""Stable Diffusion 1 and 2: captions to tokens and tokens to conditioning [states of the text encoder]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from library.components.clip_prompt_utils import num_tokens, token_ids, tokenize_prompt_rows, tokenize_rows
from library.components.text_encoder_utils import CLIP_H
from library.components.tokenizers import load_clip_tokenizer
from library.device_utils import to_device
from library.generation.prompt_weighting import PER_ROW, apply_weights, joined
from library.strategy_base import TextEncodingStrategy, TokenizeStrategy
from library.strategy_ldm import SdSdxlLatentsCachingStrategy

__all__ = ["SdSdxlLatentsCachingStrategy", "SdTextEncodingStrategy", "SdTokenizeStrategy"]

V2_PAD = CLIP_H.pad


class SdTokenizeStrategy(TokenizeStrategy):
    """Rows of 77 tokens: one for 75 caption tokens, 2 or 3 for `max_length` 150 or 225.

    `is_weighted`: captions carry weights (--weighted_captions).
    """

    def __init__(
        self, v2: bool = False, max_length: int | None = None, tokenizer_cache_dir: str | None = None, *,
        tokenizer: Any | None = None, is_weighted: bool = False,
    ) -> None:  # fmt: skip
        self.num_rows = (max_length or PER_ROW) // PER_ROW
        self.is_weighted = is_weighted
        pad = V2_PAD if v2 else None
        self.tokenizer = (
            tokenizer if callable(tokenizer) else load_clip_tokenizer(tokenizer, tokenizer_cache_dir, pad_token=pad)
        )

    @property
    def tokenizers(self) -> list[Any]:
        return [self.tokenizer]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[ids [B, N, 77]]; marks of weights are text."""
        texts = [text] if isinstance(text, str) else list(text)
        return [token_ids(self.tokenizer, texts, self.num_rows)]

    def tokenize_with_weights(self, text: str | list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """([ids [B, N, 77]], [weights [B, N, 77]])."""
        texts = [text] if isinstance(text, str) else list(text)
        ids, weights = tokenize_rows(self.tokenizer, texts, self.num_rows, is_weighted=True)
        return [ids], [weights]

    def tokenize_prompt(self, text: str) -> tuple[list[Tensor], list[Tensor]]:
        """Ids [1, N, 77] and weights of a sample prompt: it may carry weights and take up to three rows, whatever
        captions do."""
        ids, weights = tokenize_prompt_rows(self.tokenizer, text, self.num_rows)
        return [ids], [weights]

    def overlong(self, text: str) -> bool:
        return num_tokens(self.tokenizer, text, is_weighted=self.is_weighted) > self.num_rows * PER_ROW


class SdTextEncodingStrategy(TextEncodingStrategy):
    """`clip_skip` n takes the output of the n-th layer from the end, through the final norm; None the last one."""

    def __init__(self, clip_skip: int | None = None) -> None:
        self.clip_skip = clip_skip

    def encode_tokens(
        self, tokenize_strategy: SdTokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[states [B, 75 N + 2, D]]; None when the model is absent."""
        encoder = models[0]
        if encoder is None:
            return [None]
        ids = tokens[0]
        states = self._states(encoder, to_device(ids.flatten(0, 1), next(encoder.parameters()).device))
        return [joined(states.unflatten(0, ids.shape[:2]))]

    def encode_tokens_with_weights(
        self, tokenize_strategy: SdTokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor],
        weights: list[Tensor],
    ) -> list[Tensor | None]:
        """The same, each state times the weight of its token."""
        (states,) = self.encode_tokens(tokenize_strategy, models, tokens)
        return [None if states is None else apply_weights(states, joined(weights[0]))]

    def _states(self, encoder: nn.Module, ids: Tensor) -> Tensor:
        """[R, 77, D] of rows [R, 77]."""
        if self.clip_skip is None:
            return encoder.text_model(input_ids=ids).last_hidden_state
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-self.clip_skip]
        return encoder.text_model.final_layer_norm(hidden)
