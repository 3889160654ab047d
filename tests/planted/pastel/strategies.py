"""Captions to tokens, tokens to conditioning, and the caches."""

from __future__ import annotations

import torch
from pastel.models import LENGTH, WORDS
from pastel.record import FAMILY

from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)


class PastelTokenize(TokenizeStrategy):
    def tokenize(self, text):
        texts = [text] if isinstance(text, str) else text
        ids = torch.zeros((len(texts), LENGTH), dtype=torch.int64)
        for row, words in zip(ids, (caption.split()[:LENGTH] for caption in texts)):
            row[: len(words)] = torch.tensor(
                [1 + sum(word.encode()) % (WORDS - 1) for word in words], dtype=torch.int64
            )
        return [ids, (ids > 0).long()]


class PastelEncoding(TextEncodingStrategy):
    def encode_tokens(self, tokenize_strategy, models, tokens):
        ids, mask = tokens
        if not models or models[0] is None:
            return [None, mask]
        device = next(models[0].parameters()).device
        return [models[0](ids.to(device)), mask.to(device)]


class PastelLatents(LatentsCachingStrategy):
    architecture = FAMILY.architecture

    def encode(self, vae, images, seeds):
        return vae.encode(images)


class PastelText(TextEncoderOutputsCachingStrategy):
    architecture = FAMILY.architecture
