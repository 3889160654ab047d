"""Anima: captions to tokens, tokens to conditioning [Qwen3 states, their mask, T5 ids, their mask], and the caches.

The LLM adapter, which joins the two, belongs to the denoiser and runs in its forward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from library.components.text_encoder_utils import attended
from library.components.tokenizers import check_ids, load_qwen3_tokenizer, load_t5_tokenizer
from library.dataset.latent_cache import LatentEncoder
from library.device_utils import to_device
from library.families.anima import FAMILY
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

logger = logging.getLogger(__name__)

MAX_LENGTH = 512


class AnimaTokenizeStrategy(TokenizeStrategy):
    """Qwen3 and T5, padded to `qwen3_max_length` and `t5_max_length`. The padding is part of what the model was trained
    with: the denoiser attends to the zeros that follow a caption.

    Tokenizers come ready, or from the folders `qwen3_tokenizer` and `t5_tokenizer`, `tokenizer_cache_dir`, the folder
    of the text encoder `qwen3_path`, or the hub. ConfigError when one cannot be found.
    """

    def __init__(
        self,
        qwen3_max_length: int = MAX_LENGTH,
        t5_max_length: int = MAX_LENGTH,
        tokenizer_cache_dir: str | None = None,
        qwen3_tokenizer: Any | None = None,
        t5_tokenizer: Any | None = None,
        qwen3_path: str | None = None,
    ) -> None:
        self.qwen3_max_length, self.t5_max_length = qwen3_max_length, t5_max_length
        self.qwen3 = (
            qwen3_tokenizer
            if callable(qwen3_tokenizer)
            else load_qwen3_tokenizer(qwen3_tokenizer, tokenizer_cache_dir, qwen3_path)
        )
        self.t5 = t5_tokenizer if callable(t5_tokenizer) else load_t5_tokenizer(t5_tokenizer, tokenizer_cache_dir)

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[Qwen3 ids [B, L], Qwen3 mask [B, L], T5 ids [B, M], T5 mask [B, M]]; masks have 1 for tokens."""
        texts = [text] if isinstance(text, str) else list(text)
        qwen3 = _encode(self.qwen3, texts, self.qwen3_max_length)
        t5 = _encode(self.t5, texts, self.t5_max_length)
        return [
            qwen3["input_ids"].long(),
            qwen3["attention_mask"].long(),
            t5["input_ids"].long(),
            t5["attention_mask"].long(),
        ]

    def overlong(self, text: str) -> bool:
        """Whether either tokenizer cuts this text."""
        pairs = ((self.qwen3, self.qwen3_max_length), (self.t5, self.t5_max_length))
        return any(len(tokenizer(text, verbose=False).input_ids) > length for tokenizer, length in pairs)


def _encode(tokenizer: Any, texts: list[str], length: int) -> Any:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


class AnimaTextEncodingStrategy(TextEncodingStrategy):
    """Qwen3's last hidden state, after its final norm, with 0 where there is no token."""

    def encode_tokens(
        self, tokenize_strategy: AnimaTokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[states [B, L, D], their mask [B, L], T5 ids [B, M], T5 mask [B, M]]; states None without the model.

        ConfigError when an id has no embedding row.
        """
        ids, mask, t5_ids, t5_mask = tokens
        qwen3 = models[0] if models else None
        if qwen3 is None:
            return [None, mask, t5_ids, t5_mask]
        device = next(qwen3.parameters()).device
        check_ids(ids, qwen3, tokenize_strategy.qwen3, "Qwen3", "the text encoder")
        ids, mask = to_device(ids, device), to_device(mask, device)
        seen = mask.clone()
        seen[:, 0] = 1  # an empty caption attends to one position, whose state is set to 0 below
        states = qwen3(input_ids=ids, attention_mask=attended(qwen3, ids, seen, causal=True)).last_hidden_state
        states = states * mask[..., None].to(states.dtype)
        return [states, mask, to_device(t5_ids, device), to_device(t5_mask, device)]


class AnimaLatentEncoder(LatentEncoder):
    """Normalised latents of the Qwen-Image autoencoder; the mode of the posterior, so nothing is drawn."""

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(images)


class AnimaLatentsCachingStrategy(AnimaLatentEncoder, LatentsCachingStrategy):
    architecture = FAMILY.architecture


class AnimaTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """Qwen3 states and mask, T5 ids and mask, and a dropout rate that the files of known trainers carry.

    The rate is written as 0 and not read: caption dropout is drawn in the run by the rate of the dataset, and takes the
    cached empty caption.
    """

    architecture = FAMILY.architecture
