"""Anima: the denoiser (a Cosmos-Predict2 type DiT) and the adapter that turns language-model states into its context.

Module paths are the key names of the original files without their `net.`; leaf layers are plain nn.Linear, so that
adapters find them by name and class.
"""

from __future__ import annotations

import math
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
    modulate,
    never_empty,
    of_tokens,
    per_token,
    rms_normed,
    rotate_halves,
    timestep_embedding,
)
from library.components.block_calls import BlockCall
from library.components.mixed_models import entry_dtype
from library.components.packed_tokens import SampleVectors, Segments, Stream, ropes, segments, vectors
from library.core.courses import course
from library.custom_offloading_utils import BlockStackMixin

Rope = tuple[Tensor, Tensor]
NORM_EPS = 1e-6
ROPE_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class AdapterParams:
    """Hyper-parameters of the LLM adapter; the defaults are those of the released files."""

    source_dim: int = 1024
    target_dim: int = 1024
    model_dim: int = 1024
    num_layers: int = 6
    num_heads: int = 16
    vocab: int = 32128
    mlp_hidden: int = 4096

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.model_dim % (2 * self.num_heads):
            raise ValueError(
                f"num_heads of the adapter is {self.num_heads}; model_dim {self.model_dim} must be an even multiple of "
                "it"
            )


@dataclass(frozen=True, kw_only=True)
class AnimaParams:
    """Hyper-parameters of the denoiser; the defaults are the released model. `adapter` is None where the file has none.

    `max_img_h`, `max_img_w` and `max_frames` bound the size in latent units; they are checks, nothing is learned for
    them.
    """

    in_channels: int = 16
    out_channels: int = 16
    model_channels: int = 2048
    num_blocks: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    context_dim: int = 1024
    adaln_lora_dim: int = 256
    patch_spatial: int = 2
    patch_temporal: int = 1
    rope_extrapolation_thw: tuple[float, float, float] = (1.0, 4.0, 4.0)
    max_img_h: int = 1024
    max_img_w: int = 1024
    max_frames: int = 128
    adapter: AdapterParams | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_extrapolation_thw", tuple(self.rope_extrapolation_thw))
        if isinstance(self.adapter, dict):
            object.__setattr__(self, "adapter", AdapterParams(**self.adapter))
        if self.num_heads < 1 or self.model_channels % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide model_channels {self.model_channels}")
        if self.head_dim % 2 or self.head_dim < 12:
            raise ValueError(f"the head size is {self.head_dim}; the rotary axes need an even one of 12 or more")
        if len(self.rope_extrapolation_thw) != 3:
            raise ValueError(f"rope_extrapolation_thw is {self.rope_extrapolation_thw}; needed: three ratios (t, h, w)")

    @property
    def head_dim(self) -> int:
        return self.model_channels // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return math.floor(
            self.model_channels * self.mlp_ratio + 1e-6
        )  # a ratio read from shapes may miss its integer by rounding

    @property
    def patch_volume(self) -> int:
        return self.patch_temporal * self.patch_spatial**2

    @property
    def most_patches(self) -> int:
        """Along a side of a picture."""
        return min(self.max_img_h, self.max_img_w) // self.patch_spatial

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Widths of the rotary axes (t, h, w): 44, 42, 42 of 128."""
        spatial = self.head_dim // 6 * 2
        return self.head_dim - 2 * spatial, spatial, spatial


def image_angles(frames: int, rows: int, columns: int, params: AnimaParams) -> Tensor:
    """Rotary angles [frames * rows * columns, head_dim] float32: the axes (t, h, w) side by side, and all of it twice.

    An axis of width d turns by position * theta^(-2i/d) with theta = 10000 * ratio^(d / (d - 2)) (NTK scaling).
    """
    axes = []
    for length, width, ratio in zip((frames, rows, columns), params.axes_dim, params.rope_extrapolation_thw):
        theta = ROPE_THETA * ratio ** (width / (width - 2))
        exponents = torch.arange(0, width, 2, dtype=torch.float32)[: width // 2] / width
        axes.append(torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / theta**exponents))
    time, row, column = axes
    shape = (frames, rows, columns, -1)
    half = torch.cat(
        (time[:, None, None].expand(shape), row[None, :, None].expand(shape), column[None, None].expand(shape)), dim=-1
    )
    return torch.cat((half, half), dim=-1).flatten(0, 2)


def text_angles(length: int, head_dim: int) -> Tensor:
    """Rotary angles [length, head_dim] float32 of plain positions 0.., the halves repeated."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    half = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / ROPE_THETA**exponents)
    return torch.cat((half, half), dim=-1)


def cos_sin(angles: Tensor) -> Rope:
    return angles.cos(), angles.sin()


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the type of x, times weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normed(x, NORM_EPS).to(x.dtype) * self.weight.to(x.dtype)


class Attention(AttentionModule):
    """Self-attention, or cross-attention to `context_dim`; RMS norm per head on query and key."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_proj = nn.Linear(context_dim or dim, dim, bias=False)
        self.k_norm = RMSNorm(head_dim)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=False)

    def attend(
        self, x: Tensor, context: Tensor, query_rope: Rope | None, key_rope: Rope | None,
        key_mask: Tensor | Segments | None = None,
    ) -> Tensor:
        """x [B, L, D], context [B, T, C] -> [B, L, D] before the output projection."""
        query, key, value = (
            in_heads(states, self.num_heads)
            for states in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        query, key = self.q_norm(query), self.k_norm(key)
        if query_rope is not None and key_rope is not None:
            query, key = rotate_halves(query, query_rope), rotate_halves(key, key_rope)
        return self.scaled_attention(query, key, value, key_mask)


class ImageAttention(Attention):
    """Attention of the denoiser: rotated when it looks at the image itself, plain and unmasked when at the context."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__(dim, num_heads, context_dim)
        self.output_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, context: Tensor | None = None, rope: Rope | None = None, segments: Segments | None = None
    ) -> Tensor:
        """`segments`: which tokens of a row of several samples attend to which."""
        return self.output_proj(self.attend(x, x if context is None else context, rope, rope, segments))


class TextAttention(Attention):
    """Attention of the adapter: always rotated, by the positions of either side, and masked."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__(dim, num_heads, context_dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor, query_rope: Rope, key_rope: Rope, key_mask: Tensor | None) -> Tensor:
        return self.o_proj(self.attend(x, context, query_rope, key_rope, key_mask))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(dim, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.gelu(self.layer1(x)))


class PatchEmbed(nn.Module):
    """Patches of the latents to tokens; inside a patch the order is (channel, t, h, w)."""

    def __init__(self, params: AnimaParams) -> None:
        super().__init__()
        self.patch_spatial, self.patch_temporal = params.patch_spatial, params.patch_temporal
        width = (params.in_channels + 1) * params.patch_volume  # one channel more: the padding mask
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(width, params.model_channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T' H' W', D]."""
        p, t = self.patch_spatial, self.patch_temporal
        return self.proj(rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=t, ph=p, pw=p))


class TimestepEmbedding(nn.Module):
    """The part of all modulations that is shared: linear_1, SiLU, linear_2 of the sinusoid, 3 x D wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim, bias=False)
        self.linear_2 = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


def _modulation(dim: int, rank: int, num_parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, rank, bias=False), nn.Linear(rank, num_parts * dim, bias=False))


def _plain_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each between a modulated norm and a gate."""

    def __init__(self, params: AnimaParams) -> None:
        super().__init__()
        dim, rank = params.model_channels, params.adaln_lora_dim
        self.layer_norm_self_attn = _plain_norm(dim)
        self.self_attn = ImageAttention(dim, params.num_heads)
        self.layer_norm_cross_attn = _plain_norm(dim)
        self.cross_attn = ImageAttention(dim, params.num_heads, params.context_dim)
        self.layer_norm_mlp = _plain_norm(dim)
        self.mlp = MLP(dim, params.mlp_hidden)
        self.adaln_modulation_self_attn = _modulation(dim, rank, 3)
        self.adaln_modulation_cross_attn = _modulation(dim, rank, 3)
        self.adaln_modulation_mlp = _modulation(dim, rank, 3)

    def forward(
        self, x: Tensor, emb: Tensor | SampleVectors, adaln_lora: Tensor | SampleVectors, context: Tensor, rope: Rope,
        own: Segments | None = None, to_context: Segments | None = None,
    ) -> Tensor:
        """x [B, L, D], emb [B, D], adaln_lora [B, 3D] (or both [B, L, ...], for each token its own), context [B, T,
        C]. `own` and `to_context`: which tokens of a row of several samples attend to which."""
        shift, scale, gate = self._parts(self.adaln_modulation_self_attn, emb, adaln_lora)
        normed = modulate(self.layer_norm_self_attn(x), shift, scale)
        x = torch.addcmul(x, gate, self.self_attn(normed, rope=rope, segments=own))
        shift, scale, gate = self._parts(self.adaln_modulation_cross_attn, emb, adaln_lora)
        normed = modulate(self.layer_norm_cross_attn(x), shift, scale)
        x = torch.addcmul(x, gate, self.cross_attn(normed, context, segments=to_context))
        shift, scale, gate = self._parts(self.adaln_modulation_mlp, emb, adaln_lora)
        return torch.addcmul(x, gate, self.mlp(modulate(self.layer_norm_mlp(x), shift, scale)))

    @staticmethod
    def _parts(
        modulation: nn.Module, emb: Tensor | SampleVectors, adaln_lora: Tensor | SampleVectors
    ) -> tuple[Tensor, ...]:
        shared = adaln_lora.values if isinstance(adaln_lora, SampleVectors) else adaln_lora
        return of_tokens(lambda vec: modulation(vec) + shared, emb).chunk(3, dim=-1)  # each [B, 1 or L, D]

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        (image,), (embs, loras, texts, tables) = streams, zip(*contexts)
        text = Stream.of(texts)
        turned = ropes([tuple(table[None] for table in tables_of_part) for tables_of_part in tables], streams)
        return (
            vectors(embs, image), vectors(loras, image), text.join(texts), tuple(table[0] for table in turned),
            segments((image,)), segments((image,), (text,)),
        )  # fmt: skip


class FinalLayer(nn.Module):
    def __init__(self, params: AnimaParams) -> None:
        super().__init__()
        dim = params.model_channels
        self.layer_norm = _plain_norm(dim)
        self.linear = nn.Linear(dim, params.patch_volume * params.out_channels, bias=False)
        self.adaln_modulation = _modulation(dim, params.adaln_lora_dim, 2)

    def forward(self, x: Tensor, emb: Tensor, adaln_lora: Tensor) -> Tensor:
        parts = self.adaln_modulation(emb) + adaln_lora[..., : 2 * x.shape[-1]]
        shift, scale = per_token(parts).chunk(2, dim=-1)
        return self.linear(self.layer_norm(x) * (1 + scale) + shift)


class LLMAdapterTransformerBlock(nn.Module):
    def __init__(self, params: AdapterParams) -> None:
        super().__init__()
        dim = params.model_dim
        self.norm_self_attn = RMSNorm(dim)
        self.self_attn = TextAttention(dim, params.num_heads)
        self.norm_cross_attn = RMSNorm(dim)
        self.cross_attn = TextAttention(dim, params.num_heads, params.source_dim)
        self.norm_mlp = RMSNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, params.mlp_hidden), nn.GELU(), nn.Linear(params.mlp_hidden, dim))

    def forward(
        self, x: Tensor, source: Tensor, ropes: tuple[Rope, Rope], target_mask: Tensor | None,
        source_mask: Tensor | None
    ) -> Tensor:
        target_rope, source_rope = ropes
        normed = self.norm_self_attn(x)
        x = x + self.self_attn(normed, normed, target_rope, target_rope, target_mask)
        x = x + self.cross_attn(self.norm_cross_attn(x), source, target_rope, source_rope, source_mask)
        return x + self.mlp(self.norm_mlp(x))


class LLMAdapter(nn.Module):
    """The denoiser's context from T5 token ids that look at the states of a language model."""

    def __init__(self, params: AdapterParams) -> None:
        super().__init__()
        self.params = params
        self.embed = nn.Embedding(params.vocab, params.target_dim)
        same = params.model_dim == params.target_dim
        self.in_proj = nn.Identity() if same else nn.Linear(params.target_dim, params.model_dim)
        self.blocks = nn.ModuleList(LLMAdapterTransformerBlock(params) for _ in range(params.num_layers))
        self.out_proj = nn.Linear(params.model_dim, params.target_dim)
        self.norm = RMSNorm(params.target_dim)
        self.rope_tables = DeviceTables()

    def forward(
        self, source: Tensor, target_ids: Tensor, target_mask: Tensor | None = None, source_mask: Tensor | None = None
    ) -> Tensor:
        """source [B, S, source_dim], target_ids [B, M], masks 1 = token. Returns [B, M, target_dim], 0 where
        target_mask is 0."""
        x = self.in_proj(self.embed(target_ids).to(source.dtype))
        head_dim = self.params.model_dim // self.params.num_heads
        ropes = tuple(
            self.rope_tables.get(length, x.device, lambda length=length: cos_sin(text_angles(length, head_dim)))
            for length in (x.shape[1], source.shape[1])
        )
        target_mask, attended = (None if mask is None else never_empty(mask) for mask in (target_mask, source_mask))
        for block in self.blocks:
            x = block(x, source, ropes, target_mask, attended)
        x = self.norm(self.out_proj(x))
        return x if target_mask is None else x * target_mask[..., None].to(x.dtype)


class Anima(BlockStackMixin, nn.Module):
    """The rectified-flow transformer of Anima."""

    def __init__(self, params: AnimaParams) -> None:
        super().__init__()
        self.params = params
        dim = params.model_channels
        self.x_embedder = PatchEmbed(params)
        self.t_embedder = nn.Sequential(nn.Identity(), TimestepEmbedding(dim))
        self.t_embedding_norm = RMSNorm(dim)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.num_blocks))
        self.final_layer = FinalLayer(params)
        if params.adapter is not None:
            self.llm_adapter = LLMAdapter(params.adapter)
        self.rope_tables = DeviceTables()
        self.init_block_stack(num_rows=1)

    @property
    def device(self) -> torch.device:
        return self.t_embedding_norm.weight.device

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.model_channels

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Norms tell it: weights of linear layers may be stored in 8 bits."""
        return entry_dtype(self, self.t_embedding_norm.weight)

    @property
    def has_adapter(self) -> bool:
        return self.params.adapter is not None

    @course
    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        padding_mask: Tensor | None = None,
        *,
        target_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        feature_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) of latents.

        x [B, C, T, H, W], timesteps [B] in 0..1 (or [B, T'] and [B, T'H'W'], one per frame or token), context [B, L,
        D]: the adapter's output, or the states of the language model when `target_ids` [B, M] are given, which go
        through the adapter here. padding_mask [B, 1, h, w]: 1 = padding, none when not given. Returns the shape of x;
        with `feature_layer` also the tokens [B, T'H'W', D] after that block, from 0. ValueError when the size is beyond
        the model's or not whole patches.
        """
        self.prepare_block_swap_before_forward()
        self._check_size(x)
        if target_ids is not None and self.has_adapter:
            context = self.llm_adapter(context.to(self.dtype), target_ids, target_mask, source_mask)
        context = context.to(self.dtype)  # [B, L, C]
        tokens = self.x_embedder(_with_mask(x, padding_mask).to(self.dtype))  # [B, T'H'W', D]
        frames, rows, columns = self._grid(x)
        if timesteps.ndim == 2 and timesteps.shape[1] == frames:  # one per frame: that of all its tokens
            timesteps = timesteps.repeat_interleave(rows * columns, dim=1)
        sinusoids = timestep_embedding(timesteps, self.params.model_channels, 1.0)  # float32: the time is not rounded
        adaln_lora = self.t_embedder[1](sinusoids.to(self.dtype))  # [B, 3D] or [B, L, 3D]
        emb = self.t_embedding_norm(sinusoids).to(self.dtype)  # [B, D] or [B, L, D]

        grid = (frames, rows, columns)
        rope = self.rope_tables.get(grid, x.device, lambda: cos_sin(image_angles(*grid, self.params)))
        (offloader,) = self.offloaders
        features: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            (tokens,) = yield BlockCall(self, block, index, offloader, (tokens,), (emb, adaln_lora, context, rope))
            features += [tokens] if index == feature_layer else []
        patches = self.final_layer(tokens, emb, adaln_lora)
        p, t = self.params.patch_spatial, self.params.patch_temporal
        velocity = rearrange(  # channel last, unlike on the way in
            patches, "b (t h w) (ph pw pt c) -> b c (t pt) (h ph) (w pw)", t=frames, h=rows, w=columns, ph=p, pw=p, pt=t
        )
        return velocity if feature_layer is None else (velocity, features[0])

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        p = self.params
        return x.shape[2] // p.patch_temporal, x.shape[3] // p.patch_spatial, x.shape[4] // p.patch_spatial

    def _check_size(self, x: Tensor) -> None:
        p = self.params
        _, _, frames, height, width = x.shape
        if frames % p.patch_temporal or height % p.patch_spatial or width % p.patch_spatial:
            raise ValueError(
                f"latents are {frames} x {height} x {width}; multiples of the patch size {p.patch_spatial} are needed"
            )
        if frames > p.max_frames or height > p.max_img_h or width > p.max_img_w:
            raise ValueError(
                f"latents are {frames} x {height} x {width}; the model takes up to {p.max_frames} x {p.max_img_h} x "
                f"{p.max_img_w}"
            )

    def swapped_rows(self) -> tuple[nn.ModuleList, ...]:
        return (self.blocks,)


def _with_mask(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Latents with the padding mask as their last channel, [B, C + 1, T, H, W]."""
    batch, _, frames, height, width = x.shape
    if padding_mask is None:
        mask = x.new_zeros(batch, 1, frames, height, width)
    else:
        resized = F.interpolate(padding_mask.to(x.dtype), size=(height, width), mode="nearest")
        mask = resized[:, :, None].expand(-1, -1, frames, -1, -1)
    return torch.cat((x, mask), dim=1)
