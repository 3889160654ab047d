"""A family in miniature for tests of caches and batches: a one-layer VAE, a one-table text encoder and their
strategies, for any DataArchitecture. They are real modules; only their size is unusual."""

from __future__ import annotations

import torch
from torch import nn

from library.dataset.architectures import ARCHITECTURES, DataArchitecture
from library.strategy_base import (
    LatentsCachingStrategy,
    StrategySet,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

MAX_LENGTH = 12
VOCABULARY = 97


class SmallVae(nn.Module):
    """One strided convolution per latent channel; a posterior of fixed width."""

    def __init__(self, architecture: DataArchitecture) -> None:
        super().__init__()
        stride = architecture.latents.spatial_stride
        self.conv = nn.Conv2d(3, architecture.latents.channels, stride, stride)
        nn.init.normal_(self.conv.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.conv.bias)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.conv(images)


class SmallLatentsCaching(LatentsCachingStrategy):
    def __init__(
        self, architecture: DataArchitecture, cache_to_disk: bool, batch_size: int = 2, skip: bool = False
    ) -> None:
        super().__init__(cache_to_disk, batch_size, skip)
        self.architecture = architecture

    def encode(self, vae, images, seeds):
        mean = vae(images)  # [B, C, h, w]
        noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return mean + 0.1 * torch.stack(noise).to(mean.dtype)


class SmallTokenize(TokenizeStrategy):
    """One id per word, 0 as padding."""

    def tokenize(self, text):
        texts = [text] if isinstance(text, str) else text
        ids = torch.zeros((len(texts), MAX_LENGTH), dtype=torch.int64)
        for row, words in zip(ids, (t.split() for t in texts)):
            values = [1 + sum(word.encode()) % (VOCABULARY - 1) for word in words][:MAX_LENGTH]
            row[: len(values)] = torch.tensor(values, dtype=torch.int64)
        return [ids, (ids > 0).long()]

    def overlong(self, text):
        return len(text.split()) > MAX_LENGTH


class SmallTextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(1))
        self.encoded: list[int] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.encoded.append(len(ids))
        return self.embedding(ids)


class SmallTextEncoding(TextEncodingStrategy):
    """FLUX's list: pooled, hidden, ids of the text, mask."""

    def encode_tokens(self, tokenize_strategy, models, tokens):
        ids, mask = tokens
        pooler, encoder = models
        pooled = None if pooler is None else pooler(ids).mean(dim=1)  # [B, D]
        return [pooled, encoder(ids), torch.zeros(*ids.shape, 3), mask]


class SmallTextCaching(TextEncoderOutputsCachingStrategy):
    architecture = ARCHITECTURES["flux"]

    def __init__(
        self,
        cache_to_disk: bool,
        batch_size: int | None = 2,
        skip: bool = False,
        is_partial: bool = False,
        mask: bool = False,
    ) -> None:
        super().__init__(cache_to_disk, batch_size, skip, is_partial)
        self.mask = mask
        self.max_token_length = MAX_LENGTH

    @property
    def flags(self):
        return {"apply_t5_attn_mask": self.mask}


def small_strategies(
    latents: LatentsCachingStrategy | None = None, text: TextEncoderOutputsCachingStrategy | None = None
) -> StrategySet:
    return StrategySet(SmallTokenize(), SmallTextEncoding(), latents, text)
