"""Lumina-Image 2.0: the denoiser, a single-stream transformer (NextDiT) with refiners for text and image before it.

Module paths are the key names of the original files; leaf layers are plain nn.Linear, so that adapters find them by
name and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.attention import (
    AttentionModule,
    DeviceTables,
    in_heads,
    never_empty,
    of_joined_tokens,
    of_tokens,
    per_token,
    rope_cos_sin,
    rotate_pairs,
    timestep_embedding,
)
from library.components.block_calls import BlockCall
from library.components.mixed_models import entry_dtype
from library.components.packed_tokens import SampleVectors, Segments, Stream, ropes, segments, vectors
from library.core.courses import course
from library.custom_offloading_utils import BlockStackMixin

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LuminaParams:
    """Hyper-parameters of the denoiser; the defaults are the released model.

    `axes_lens` bounds positions (text tokens, rows and columns of patches) to those that the model was trained with.
    """

    patch_size: int = 2
    in_channels: int = 16
    dim: int = 2304
    n_layers: int = 26
    n_refiner_layers: int = 2
    n_heads: int = 24
    n_kv_heads: int = 8
    ffn_hidden: int = 9216
    axes_dims: tuple[int, ...] = (32, 32, 32)
    axes_lens: tuple[int, ...] = (300, 512, 512)
    theta: float = 10000
    norm_eps: float = 1e-5
    qk_norm_eps: float = 1e-6
    cap_feat_dim: int = 2304
    time_dim: int = 1024
    time_embed_dim: int = 256

    def __post_init__(self) -> None:
        for name in ("axes_dims", "axes_lens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.n_heads < 1 or self.dim % self.n_heads:
            raise ValueError(f"n_heads is {self.n_heads}; it must divide dim {self.dim}")
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads {self.n_heads}")
        axes = self.axes_dims
        if len(axes) != 3 or sum(axes) != self.head_dim or any(width % 2 for width in axes):
            needed = f"three even numbers that sum to the head size {self.head_dim}"
            raise ValueError(f"axes_dims is {axes}; it needs {needed}")
        if len(self.axes_lens) != 3:
            raise ValueError(f"axes_lens is {self.axes_lens}; needed: three numbers of positions (text, rows, columns)")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def most_patches(self) -> int:
        """Along a side of a picture."""
        return min(self.axes_lens[1:])

    @property
    def max_text_tokens(self) -> int:
        """Image tokens stand at the position behind the last text token, which is one of the text axis too."""
        return self.axes_lens[0] - 1


class RMSNorm(nn.RMSNorm):
    """In the type of its input, whatever the weight is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class JointAttention(AttentionModule):
    """Self-attention with fewer heads for keys and values than for queries; RMS norm per head on query and key."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.head_dim = params.head_dim
        self.group_size = params.n_heads // params.n_kv_heads
        self.rows = [params.dim, *[params.n_kv_heads * params.head_dim] * 2]
        self.qkv = nn.Linear(params.dim, sum(self.rows), bias=False)
        self.out = nn.Linear(params.dim, params.dim, bias=False)
        self.q_norm = RMSNorm(params.head_dim, eps=params.qk_norm_eps)
        self.k_norm = RMSNorm(params.head_dim, eps=params.qk_norm_eps)

    def forward(self, x: Tensor, rope: Rope, key_mask: Tensor | Segments | None) -> Tensor:
        parts = self.qkv(x).split(self.rows, dim=-1)
        query, key, value = (in_heads(part, part.shape[-1] // self.head_dim) for part in parts)
        query, key = rotate_pairs(self.q_norm(query), rope), rotate_pairs(self.k_norm(key), rope)
        key, value = (states.repeat_interleave(self.group_size, dim=1) for states in (key, value))  # [B, heads, L, D]
        return self.out(self.scaled_attention(query, key, value, key_mask))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward, each between two norms; scaled and gated by the time unless `modulation` is off."""

    def __init__(self, params: LuminaParams, modulation: bool = True) -> None:
        super().__init__()
        self.attention = JointAttention(params)
        self.feed_forward = FeedForward(params.dim, params.ffn_hidden)
        self.attention_norm1 = RMSNorm(params.dim, eps=params.norm_eps)
        self.ffn_norm1 = RMSNorm(params.dim, eps=params.norm_eps)
        self.attention_norm2 = RMSNorm(params.dim, eps=params.norm_eps)
        self.ffn_norm2 = RMSNorm(params.dim, eps=params.norm_eps)
        if modulation:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(params.time_dim, 4 * params.dim))
        self.modulation = modulation

    def forward(
        self, x: Tensor, emb: Tensor | SampleVectors | None, rope: Rope, key_mask: Tensor | Segments | None = None
    ) -> Tensor:
        """x [B, L, dim]; emb [B, time_dim], or [B, L, time_dim] for a time per token; key_mask [B, L], 1 = attend."""
        if not self.modulation:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, key_mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_msa, gate_msa, scale_mlp, gate_mlp = of_tokens(self.adaLN_modulation, emb).chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x) * (1 + scale_msa), rope, key_mask)
        x = x + gate_msa.tanh() * self.attention_norm2(attended)
        return x + gate_mlp.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp)))

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        vecs, tables, masks = zip(*contexts)
        modulating = vectors(vecs, streams[0]) if self.modulation else None
        return modulating, ropes(tables, streams), segments(streams, masks=masks)


class TimestepEmbedder(nn.Module):
    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(params.time_embed_dim, params.time_dim), nn.SiLU(), nn.Linear(params.time_dim, params.time_dim)
        )

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.mlp(sinusoids)


class FinalLayer(nn.Module):
    """Scaled by the time, without a shift."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(params.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(params.dim, params.patch_size**2 * params.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(params.time_dim, params.dim))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.linear(self.norm_final(x) * (1 + per_token(self.adaLN_modulation(emb))))


class NextDiT(BlockStackMixin, nn.Module):
    """The rectified-flow transformer of Lumina-Image 2.0. Its time runs from 0 (noise) to 1 (data), and it predicts
    data - noise."""

    def __init__(self, params: LuminaParams) -> None:
        super().__init__()
        self.params = params
        refiners = range(params.n_refiner_layers)
        self.x_embedder = nn.Linear(params.patch_size**2 * params.in_channels, params.dim)
        self.noise_refiner = nn.ModuleList(JointTransformerBlock(params) for _ in refiners)
        self.context_refiner = nn.ModuleList(JointTransformerBlock(params, modulation=False) for _ in refiners)
        self.t_embedder = TimestepEmbedder(params)
        self.cap_embedder = nn.Sequential(
            RMSNorm(params.cap_feat_dim, eps=params.norm_eps), nn.Linear(params.cap_feat_dim, params.dim)
        )
        self.layers = nn.ModuleList(JointTransformerBlock(params) for _ in range(params.n_layers))
        self.norm_final = RMSNorm(params.dim, eps=params.norm_eps)  # files have it, and nothing uses it
        self.final_layer = FinalLayer(params)
        self.rope_tables = DeviceTables()
        self.init_block_stack(num_rows=1)

    @property
    def device(self) -> torch.device:
        return self.x_embedder.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return entry_dtype(self, self.x_embedder.bias)

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.dim

    @course
    def forward(
        self, x: Tensor, t: Tensor, cap_feats: Tensor, cap_mask: Tensor | None = None, feature_layer: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (data - noise) of latents.

        x [B, C, H, W] of any size: what is no whole patch is filled up from the other side, and cut off again. t [B]
        with 0 = noise and 1 = data, or [B, L] for a time per patch; cap_feats [B, T, cap_feat_dim]; cap_mask [B, T], 1
        = token, tokens first, None = all. Returns the shape of x; with `feature_layer` also the image tokens [B, L,
        dim] after that main layer, from 0. ValueError for more text or patches than the model has positions for.
        """
        self.prepare_block_swap_before_forward()
        height, width = x.shape[-2:]
        patches, grid = self._patches(x)
        self._check_size(grid, cap_feats.shape[1])
        mask = None if cap_mask is None else cap_mask.bool()
        text_rope, image_rope = self._ropes(cap_feats.shape[:2], mask, grid, x.device)
        sinusoids = timestep_embedding(t, self.params.time_embed_dim, 1.0)  # float32: the time is not rounded
        emb = self.t_embedder(sinusoids.to(self.dtype))  # [B, time_dim] or [B, L, time_dim]

        text = self.cap_embedder(cap_feats.to(self.dtype))  # [B, T, dim]
        attended = None if mask is None else never_empty(mask)
        for index, block in enumerate(self.context_refiner):
            (text,) = yield BlockCall(self, block, index, None, (text,), (None, text_rope, attended))
        image = self.x_embedder(patches.to(self.dtype))  # [B, L, dim]
        for index, block in enumerate(self.noise_refiner):
            (image,) = yield BlockCall(self, block, index, None, (image,), (emb, image_rope, None))

        num_text = text.shape[1]
        joint = torch.cat((text, image), dim=1)  # [B, T + L, dim]
        rope = tuple(torch.cat((a.expand(len(b), -1, -1), b), dim=1) for a, b in zip(text_rope, image_rope))
        key_mask = None if mask is None else F.pad(mask, (0, image.shape[1]), value=True)
        (offloader,), features = self.offloaders, []
        joint_emb = of_joined_tokens(emb, num_text)
        for index, block in enumerate(self.layers):
            (joint,) = yield BlockCall(self, block, index, offloader, (joint,), (joint_emb, rope, key_mask))
            features += [joint[:, num_text:]] if index == feature_layer else []
        velocity = self._unpatched(self.final_layer(joint[:, num_text:], emb), grid)[..., :height, :width]
        return velocity if feature_layer is None else (velocity, features[0])

    def repeated_blocks(self) -> list[nn.Module]:
        return [*self.context_refiner, *self.noise_refiner, *self.layers]

    def swapped_rows(self) -> tuple[nn.ModuleList, ...]:
        """The refiners stay."""
        return (self.layers,)

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens [B, L, p p C] and their (rows, columns); inside a patch the channel is last."""
        p = self.params.patch_size
        filling = [-side % p for side in x.shape[-2:]]
        if any(filling):
            x = F.pad(x, (0, filling[1], 0, filling[0]), mode="circular")
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        return rearrange(x, "b c (h ph) (w pw) -> b (h w) (ph pw c)", ph=p, pw=p), grid

    def _unpatched(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        p = self.params.patch_size
        return rearrange(patches, "b (h w) (ph pw c) -> b c (h ph) (w pw)", h=grid[0], w=grid[1], ph=p, pw=p)

    def _check_size(self, grid: tuple[int, int], num_text: int) -> None:
        p = self.params
        if num_text > p.max_text_tokens:
            raise ValueError(f"the text has {num_text} tokens; the model has positions for {p.max_text_tokens}")
        if grid[0] > p.axes_lens[1] or grid[1] > p.axes_lens[2]:
            most = f"{p.axes_lens[1]} x {p.axes_lens[2]}"
            raise ValueError(f"the image has {grid[0]} x {grid[1]} patches; the model has positions for {most}")

    def _ropes(
        self, text_shape: tuple[int, int], mask: Tensor | None, grid: tuple[int, int], device: torch.device
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(cosines, sines) of text [1, T, D/2] and of image [B, L, D/2].

        Text token i stands at (i, 0, 0), an image token at (number of the sample's text tokens, row, column).
        """
        batch, num_text = text_shape
        first = self.params.axes_dims[0] // 2  # angles of the text axis
        text = self.rope_tables.get(("text", num_text), device, lambda: self._angles(text_positions(num_text + 1)))
        image = self.rope_tables.get(grid, device, lambda: self._angles(image_positions(*grid)))
        lengths = torch.full((batch,), num_text, device=device) if mask is None else mask.sum(dim=1)
        behind_text = [table[0, lengths, :first].unsqueeze(1).expand(-1, grid[0] * grid[1], -1) for table in text]
        in_image = [table[..., first:].expand(batch, -1, -1) for table in image]
        of_image = tuple(torch.cat(pair, dim=-1) for pair in zip(behind_text, in_image))
        return tuple(table[:, :num_text] for table in text), of_image

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_cos_sin(positions, self.params.axes_dims, self.params.theta)


def text_positions(length: int) -> Tensor:
    """Positions (i, 0, 0) of text tokens, [1, length, 3]."""
    return F.pad(torch.arange(length)[None, :, None], (0, 2))


def image_positions(rows: int, columns: int) -> Tensor:
    """Positions (0, row, column) of patches, [1, rows * columns, 3]."""
    grid = torch.meshgrid(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, 2)[None]
