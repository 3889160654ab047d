"""Lumina-Image 2.0: captions behind a system prompt to tokens, tokens to conditioning [Gemma states, ids, mask], and
the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from library.components.gemma_tokenizer import load_gemma2_tokenizer
from library.components.text_encoder_utils import attended
from library.components.tokenizers import check_ids
from library.dataset.latent_cache import LatentEncoder
from library.device_utils import to_device
from library.families.lumina import FAMILY
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

MAX_LENGTH = 256
MARKER = "<Prompt Start>"


class LuminaTokenizeStrategy(TokenizeStrategy):
    """Gemma 2, padded to `max_length`. A system prompt stands before every caption, with a marker between them; without
    one there is no marker either. Negative prompts have none, unless `system_prompt_for_negative`.

    The tokenizer comes ready, or from the folder `gemma2_tokenizer`, `tokenizer_cache_dir`, the text encoder
    `gemma2_path`, or the hub. ConfigError when it cannot be found.
    """

    def __init__(
        self,
        system_prompt: str | None = None,
        max_length: int | None = MAX_LENGTH,
        tokenizer_cache_dir: str | None = None,
        gemma2_tokenizer: Any | None = None,
        gemma2_path: str | None = None,
        system_prompt_for_negative: bool = False,
    ) -> None:
        self.system_prompt = f"{system_prompt} {MARKER} " if system_prompt else ""
        self.negative_differs = bool(system_prompt) and not system_prompt_for_negative
        self.max_length = max_length or MAX_LENGTH
        self.tokenizer = (
            gemma2_tokenizer
            if callable(gemma2_tokenizer)
            else load_gemma2_tokenizer(gemma2_tokenizer, tokenizer_cache_dir, gemma2_path)
        )

    def tokenize(self, text: str | list[str], is_negative: bool = False) -> list[Tensor]:
        """[ids [B, L], mask [B, L] with 1 = token]."""
        texts = [text] if isinstance(text, str) else list(text)
        if not (is_negative and self.negative_differs):
            texts = [self.system_prompt + text for text in texts]
        encoded = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return [encoded["input_ids"].long(), encoded["attention_mask"].long()]

    def tokenize_negative(self, text: str) -> list[Tensor]:
        return self.tokenize(text, is_negative=True)

    def overlong(self, text: str) -> bool:
        """Whether this text is cut off behind its system prompt."""
        return len(self.tokenizer(self.system_prompt + text, verbose=False).input_ids) > self.max_length


class LuminaTextEncodingStrategy(TextEncodingStrategy):
    """The states that enter the last layer of Gemma 2, which does not attend to padding."""

    def encode_tokens(
        self, tokenize_strategy: LuminaTokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[states [B, L, D], ids [B, L], mask [B, L]]; states None without the model. ConfigError when an id has no
        embedding."""
        ids, mask = tokens
        gemma2 = models[0] if models else None
        if gemma2 is None:
            return [None, ids, mask]
        check_ids(ids, gemma2, tokenize_strategy.tokenizer, "Gemma 2")
        device = next(gemma2.parameters()).device
        ids, mask = to_device(ids, device), to_device(mask, device)
        seen = attended(gemma2, ids, mask, causal=True)
        outputs = gemma2(input_ids=ids, attention_mask=seen, output_hidden_states=True)
        return [outputs.hidden_states[-2], ids, mask]


class LuminaLatentEncoder(LatentEncoder):
    """Latents of the FLUX.1 autoencoder, shifted and scaled, one posterior draw per image and size."""

    def encode(self, vae: Any, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(images, seeds)


class LuminaLatentsCachingStrategy(LuminaLatentEncoder, LatentsCachingStrategy):
    architecture = FAMILY.architecture


class LuminaTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """Gemma states, ids and mask. A partial cache leaves the states to the Gemma that trains."""

    architecture = FAMILY.architecture
