"""The image encoder of SigLIP: a picture of one size to a state for each patch of it.

Module paths are the key names of the released files, less `vision_model.`; the head that makes one vector of a picture
has no place here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.attention import scaled_attention

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SiglipParams:
    """Hyper-parameters; the defaults are so400m with patches of 14. `positions`: patches of a picture, which is a
    square of `image_size` pixels a side; what whole patches do not cover of it is not seen."""

    hidden_size: int = 1152
    num_attention_heads: int = 16
    num_hidden_layers: int = 27
    intermediate_size: int = 4304
    patch_size: int = 14
    image_size: int = 384
    positions: int = 729

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; it must divide hidden_size {self.hidden_size}"
            )
        if (self.image_size // self.patch_size) ** 2 != self.positions:
            raise ValueError(
                f"image_size is {self.image_size}, which has {(self.image_size // self.patch_size) ** 2} patches of"
                f" {self.patch_size} pixels; the file has positions for {self.positions}"
            )


class Embeddings(nn.Module):
    """Pictures [B, 3, S, S] to patches [B, L, hidden] with their positions."""

    def __init__(self, params: SiglipParams) -> None:
        super().__init__()
        patch = params.patch_size
        self.patch_embedding = nn.Conv2d(3, params.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(params.positions, params.hidden_size)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.patch_embedding(pictures).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SelfAttention(nn.Module):
    def __init__(self, params: SiglipParams) -> None:
        super().__init__()
        self.num_heads, hidden = params.num_attention_heads, params.hidden_size
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            rearrange(layer(x), "b l (h d) -> b h l d", h=self.num_heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(scaled_attention(query, key, value))


class FeedForward(nn.Module):
    def __init__(self, params: SiglipParams) -> None:
        super().__init__()
        self.fc1 = nn.Linear(params.hidden_size, params.intermediate_size)
        self.fc2 = nn.Linear(params.intermediate_size, params.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, params: SiglipParams) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(params.hidden_size, eps=NORM_EPS)
        self.self_attn = SelfAttention(params)
        self.layer_norm2 = nn.LayerNorm(params.hidden_size, eps=NORM_EPS)
        self.mlp = FeedForward(params)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, params: SiglipParams) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(params) for _ in range(params.num_hidden_layers))


class SiglipImageEncoder(nn.Module):
    """Pictures [B, 3, S, S] in -1..1 to their last states [B, L, hidden]."""

    def __init__(self, params: SiglipParams) -> None:
        super().__init__()
        self.params = params
        self.embeddings = Embeddings(params)
        self.encoder = Encoder(params)
        self.post_layernorm = nn.LayerNorm(params.hidden_size, eps=NORM_EPS)

    @property
    def device(self) -> torch.device:
        return self.post_layernorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.post_layernorm.weight.dtype

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.embeddings(pictures.to(self.dtype))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)
