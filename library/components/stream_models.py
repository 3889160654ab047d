"""What denoisers with double and single stream blocks share: modulation by a vector for all tokens or one per token,
norms and feed-forwards without weights of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def per_token(vec: Tensor) -> Tensor:
    """[B, D] as [B, 1, D], for all tokens alike; [B, L, D] as it is."""
    return vec[:, None] if vec.ndim == 2 else vec


def of_text(vec: Tensor) -> Tensor:
    """The vector [B, hidden] of text tokens, which have no time of their own: the mean of those of the image tokens."""
    return vec if vec.ndim == 2 else vec.mean(dim=1)


def of_joined_tokens(vec: Tensor, num_text: int, *, text_first: bool = True) -> Tensor:
    """The vectors of text and image tokens together [B, T + L, hidden]; one for all [B, hidden] stays."""
    if vec.ndim == 2:
        return vec
    text = of_text(vec)[:, None].expand(-1, num_text, -1)
    return torch.cat((text, vec) if text_first else (vec, text), dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * x + shift


def plain_norm(hidden: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
