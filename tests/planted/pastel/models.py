"""The modules: torch only."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS, STRIDE, WIDTH, WORDS, LENGTH = 4, 8, 16, 61, 12


class PastelStroke(nn.Module):
    """One residual block [B, N, D] that reads the caption [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.caption, self.out = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x, caption):
        return x + self.out(torch.nn.functional.silu(self.mix(x) + self.caption(caption)[:, None]))


class PastelDenoiser(nn.Module):
    """Latents [B, C, h, w], times [B] in 0..1, words [B, L, D], their mask [B, L] -> velocity [B, C, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.time, self.outside = (
            nn.Linear(CHANNELS, WIDTH),
            nn.Linear(1, WIDTH),
            nn.Linear(WIDTH, CHANNELS),
        )
        self.strokes = nn.ModuleList(PastelStroke() for _ in range(2))

    @property
    def device(self):
        return self.inside.weight.device

    @property
    def dtype(self):
        return self.inside.weight.dtype

    def enable_gradient_checkpointing(self, cpu_offload: bool = False) -> None:
        """Two blocks are little enough to keep."""

    def repeated_blocks(self):
        return list(self.strokes)

    def forward(self, x, times, words, mask):
        b, c, h, w = x.shape
        weights = mask[..., None].to(words.dtype)
        caption = (words * weights).sum(1) / weights.sum(1).clamp(min=1) + self.time(times[:, None].to(words.dtype))
        tokens = self.inside(x.permute(0, 2, 3, 1).reshape(b, h * w, c))
        for stroke in self.strokes:
            tokens = stroke(tokens, caption)
        return self.outside(tokens).reshape(b, h, w, c).permute(0, 3, 1, 2)


class PastelVae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paper = nn.Conv2d(3, CHANNELS, STRIDE, STRIDE)
        self.ink = nn.ConvTranspose2d(CHANNELS, 3, STRIDE, STRIDE)

    @property
    def device(self):
        return self.paper.weight.device

    def encode(self, images):
        return self.paper(images)

    def decode(self, latents):
        return self.ink(latents.to(self.ink.weight.dtype))


class PastelReader(nn.Module):
    """A layer on top of the table, which adapters train."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.read(x)


class PastelWords(nn.Module):
    """Ids [B, L] -> states [B, L, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = nn.Embedding(WORDS, WIDTH)
        self.reader = PastelReader()

    def get_input_embeddings(self):
        return self.vocabulary

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """One layer is little enough to keep."""

    def forward(self, ids):
        return self.reader(self.vocabulary(ids))
