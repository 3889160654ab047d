"""FLUX.1: the denoiser with its double and single stream blocks; its autoencoder is the one of
library/components/ldm_models.py.

Module paths are the key names of the original files; leaf layers are plain nn.Linear and nn.Conv2d, so that adapters
find them by name and class. Variants of the family build on the same blocks and on `StreamTransformer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.attention import (
    AttentionModule,
    DeviceTables,
    in_heads,
    joined_along_tokens,
    modulate,
    of_joined_tokens,
    of_text,
    of_tokens,
    per_token,
    plain_norm,
    rms_normed,
    rope_cos_sin,
    rotate_pairs,
    split_query_key_value,
    timestep_embedding,
)
from library.components.block_calls import BlockCall
from library.components.ldm_models import AutoEncoder, AutoEncoderParams  # noqa: F401, names that are imported from here
from library.components.mixed_models import entry_dtype
from library.components.packed_tokens import SampleVectors, Segments, Stream, ropes, segments, vectors
from library.core.courses import Course, course
from library.custom_offloading_utils import StreamStackMixin, split_blocks_to_swap  # noqa: F401, imported from here too
from library.custom_offloading_utils import stream_swap_problem as block_swap_problem  # noqa: F401

if TYPE_CHECKING:
    from library.components.control_models import Control

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class StreamParams:
    """Hyper-parameters of the blocks; the defaults are those of the released files. `in_channels` is the width of a
    packed token (4C)."""

    in_channels: int = 64
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000
    qkv_bias: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide hidden_size {self.hidden_size}")
        if sum(self.axes_dim) != self.head_dim or any(width % 2 for width in self.axes_dim):
            raise ValueError(
                f"axes_dim is {self.axes_dim}; it needs even numbers that sum to the head size {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return math.floor(
            self.hidden_size * self.mlp_ratio + 1e-6
        )  # a ratio read from shapes may miss its integer by rounding


@dataclass(frozen=True, kw_only=True)
class FluxParams(StreamParams):
    """Hyper-parameters of the denoiser; the defaults are FLUX.1 dev."""

    vec_in_dim: int = 768
    guidance_embed: bool = True
    time_embed_dim: int = 256


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, in float32 until the product is rounded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (rms_normed(x, 1e-6) * self.scale.float()).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(query), self.key_norm(key)


class SelfAttention(nn.Module):
    """Projections of one stream; the attention itself runs over both streams in the block."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] -> three of [B, heads, L, D], query and key normalised."""
        query, key, value = split_query_key_value(self.qkv(x), self.num_heads)
        query, key = self.norm(query, key)
        return query, key, value


class Modulation(nn.Module):
    """Shift, scale and gate (twice for a double block) from the conditioning vector."""

    def __init__(self, dim: int, double: bool) -> None:
        super().__init__()
        self.multiplier = 6 if double else 3
        self.lin = nn.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor | SampleVectors) -> Sequence[Tensor]:
        """vec [B, hidden], or [B, L, hidden] for a vector per token -> each [B, 1 or L, hidden]."""
        return of_tokens(lambda values: self.lin(F.silu(values)), vec).chunk(self.multiplier, dim=-1)

    packed = staticmethod(vectors)
    """the vectors of several batches as those of the row of their tokens"""


class GivenModulation(nn.Module):
    """In the place of `Modulation` where shifts, scales and gates are made elsewhere."""

    def forward(self, given: Tensor | SampleVectors) -> Sequence[Tensor]:
        """[B, n, hidden] -> n of [B, 1, hidden], or of packed tokens [1, all, hidden]."""
        if isinstance(given, SampleVectors):
            return given.stream.spread(given.values).unbind(2)
        return given.split(1, dim=1)

    @staticmethod
    def packed(parts: Sequence[Tensor], stream: Stream) -> SampleVectors:
        return SampleVectors(torch.cat(list(parts)), stream)


def _mlp(hidden: int, mlp_hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden))


class DoubleStreamBlock(AttentionModule):
    """Text and image with weights of their own and one attention over both. `modulates`: shifts, scales and gates are
    made here of a vector; else they are given."""

    def __init__(self, params: StreamParams, modulates: bool = True) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.img_mod = Modulation(hidden, double=True) if modulates else GivenModulation()
        self.img_norm1 = plain_norm(hidden)
        self.img_attn = SelfAttention(hidden, params.num_heads, params.qkv_bias)
        self.img_norm2 = plain_norm(hidden)
        self.img_mlp = _mlp(hidden, params.mlp_hidden)
        self.txt_mod = Modulation(hidden, double=True) if modulates else GivenModulation()
        self.txt_norm1 = plain_norm(hidden)
        self.txt_attn = SelfAttention(hidden, params.num_heads, params.qkv_bias)
        self.txt_norm2 = plain_norm(hidden)
        self.txt_mlp = _mlp(hidden, params.mlp_hidden)

    def forward(
        self, img: Tensor, txt: Tensor, img_vec: Tensor, txt_vec: Tensor, rope: Rope,
        key_mask: Tensor | Segments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """img [B, L, hidden], txt [B, T, hidden]; rope and key_mask over the T + L joined tokens. The vectors are [B,
        hidden], that of the image also [B, L, hidden]; without modulation of its own the block gets shift, scale, gate,
        shift, scale, gate [B, 6, hidden]."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(img_vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(txt_vec)
        img_qkv = self.img_attn.query_key_value(modulate(self.img_norm1(img), img_shift1, img_scale1))
        txt_qkv = self.txt_attn.query_key_value(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1))
        query, key, value = map(joined_along_tokens, txt_qkv, img_qkv)  # text first
        attended = self.scaled_attention(rotate_pairs(query, rope), rotate_pairs(key, rope), value, key_mask)
        txt_attended, img_attended = attended.split((txt.shape[1], img.shape[1]), dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn.proj(img_attended))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn.proj(txt_attended))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2)))
        return img, txt

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        (img, txt), (img_vecs, txt_vecs, tables, masks) = streams, zip(*contexts)
        joined = (txt, img)
        return (
            self.img_mod.packed(img_vecs, img), self.txt_mod.packed(txt_vecs, txt), ropes(tables, joined),
            segments(joined, masks=masks),
        )  # fmt: skip


class SingleStreamBlock(AttentionModule):
    """Attention and MLP in parallel on the joined tokens, with fused input and output projections."""

    def __init__(self, params: StreamParams, modulates: bool = True) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.num_heads = params.num_heads
        self.split_sizes = (hidden, hidden, hidden, params.mlp_hidden)
        self.linear1 = nn.Linear(hidden, 3 * hidden + params.mlp_hidden)
        self.linear2 = nn.Linear(hidden + params.mlp_hidden, hidden)
        self.norm = QKNorm(params.head_dim)
        self.pre_norm = plain_norm(hidden)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(hidden, double=False) if modulates else GivenModulation()

    def forward(self, x: Tensor, vec: Tensor, rope: Rope, key_mask: Tensor | Segments | None = None) -> Tensor:
        """x [B, T + L, hidden], text tokens first; vec [B, hidden] or [B, T + L, hidden], or shift, scale, gate [B, 3,
        hidden]."""
        shift, scale, gate = self.modulation(vec)
        *qkv, mlp = self.linear1(modulate(self.pre_norm(x), shift, scale)).split(self.split_sizes, dim=-1)
        query, key, value = (in_heads(part, self.num_heads) for part in qkv)
        query, key = self.norm(query, key)
        attended = self.scaled_attention(rotate_pairs(query, rope), rotate_pairs(key, rope), value, key_mask)
        return torch.addcmul(x, gate, self.linear2(torch.cat((attended, self.mlp_act(mlp)), dim=-1)))

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        vecs, tables, masks = zip(*contexts)
        return self.modulation.packed(vecs, streams[0]), ropes(tables, streams), segments(streams, masks=masks)


class LastLayer(nn.Module):
    def __init__(self, hidden: int, out_channels: int, modulates: bool = True) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden)
        self.linear = nn.Linear(hidden, out_channels)
        if modulates:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.modulates = modulates

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """vec [B, hidden] or [B, L, hidden], or shift, scale [B, 2, hidden]."""
        shift, scale = per_token(self.adaLN_modulation(vec)).chunk(2, dim=-1) if self.modulates else vec.split(1, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class BlockVectors(NamedTuple):
    """What modulates the blocks of one forward: (image, text) of each double block, that of each single block, that of
    the last layer."""

    double: Sequence[tuple[Tensor, Tensor]]
    single: Sequence[Tensor]
    last: Tensor


class StreamTransformer(StreamStackMixin, nn.Module):
    """Double stream blocks, then single stream blocks on the joined tokens. A subclass makes the modules `img_in`,
    `txt_in`, `double_blocks`, `single_blocks` and `final_layer`, and the vectors that modulate them."""

    params: StreamParams
    img_in: nn.Linear
    txt_in: nn.Linear
    final_layer: LastLayer

    def __init__(self, params: StreamParams) -> None:
        super().__init__()
        self.params = params
        self.rope_tables = DeviceTables()
        self.init_block_stack(num_rows=2)

    @property
    def device(self) -> torch.device:
        return self.img_in.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return entry_dtype(self, self.img_in.bias)

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.hidden_size

    def run_streams(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, vectors: BlockVectors,
        txt_mask: Tensor | None, feature_layer: int | None = None, residuals: Sequence[Tensor] | None = None,
    ) -> Course:
        """From packed latents [B, L, 4C] and text [B, T, context] to the velocity [B, L, 4C]; with `feature_layer` also
        the image tokens [B, L, hidden] after that block, counted from 0 over the double, then the single blocks.
        `txt_mask` [B, T]: 1 = attend; `residuals`: what is added to the image tokens after each double block."""
        rope = self.rope_of(txt_ids, img_ids, img.device)  # [B or 1, T + L, D/2] each
        img = self.img_in(img.to(self.dtype))  # [B, L, hidden]
        txt = self.txt_in(txt.to(self.dtype))  # [B, T, hidden]
        key_mask = joined_key_mask(txt_mask, img.shape[1])
        features: list[Tensor] = []

        double, single = self.offloaders
        for index, (block, pair) in enumerate(zip(self.double_blocks, vectors.double)):
            img, txt = yield BlockCall(self, block, index, double, (img, txt), (*pair, rope, key_mask))
            img = img if residuals is None else img + residuals[index].to(img.dtype)
            features += [img] if index == feature_layer else []
        joined = torch.cat((txt, img), dim=1)  # [B, T + L, hidden]
        for index, (block, vec) in enumerate(zip(self.single_blocks, vectors.single)):
            (joined,) = yield BlockCall(self, block, index, single, (joined,), (vec, rope, key_mask))
            features += [joined[:, txt.shape[1] :]] if self.params.depth + index == feature_layer else []
        velocity = self.final_layer(joined[:, txt.shape[1] :], vectors.last)
        return velocity if feature_layer is None else (velocity, features[0])

    def rope_of(self, txt_ids: Tensor, img_ids: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Cosines and sines for positions [B, T, 3] and [B, L, 3], computed once for each bucket."""
        positions = torch.cat((txt_ids.cpu(), img_ids.cpu()), dim=1)  # [B or 1, T + L, 3]
        key = (tuple(positions.shape), positions.numpy().tobytes())
        return self.rope_tables.get(
            key, device, lambda: rope_cos_sin(positions, self.params.axes_dim, self.params.theta)
        )


class FluxInputs(StreamTransformer):
    """What comes before the blocks, and the double blocks: of the denoiser and of its ControlNets."""

    params: FluxParams

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        hidden = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.time_in = MLPEmbedder(params.time_embed_dim, hidden)
        self.vector_in = MLPEmbedder(params.vec_in_dim, hidden)
        self.guidance_in = MLPEmbedder(params.time_embed_dim, hidden) if params.guidance_embed else nn.Identity()
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params) for _ in range(params.depth))

    def conditioning_vector(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """Times, pooled text and guidance as one vector [B, hidden], or [B, L, hidden] for a time per token."""
        width = self.params.time_embed_dim
        vec = self.time_in(timestep_embedding(timesteps, width).to(self.dtype))
        alike = (
            (lambda other: other[:, None]) if timesteps.ndim == 2 else (lambda other: other)
        )  # what all tokens share
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("guidance is None; a guidance-distilled model (FLUX.1 dev) needs one scale per sample")
            vec = vec + alike(self.guidance_in(timestep_embedding(guidance, width).to(self.dtype)))
        return vec + alike(self.vector_in(y.to(self.dtype)))


class Flux(FluxInputs):
    """The rectified-flow transformer of FLUX.1 dev (with `guidance_in`) and schnell."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        hidden = params.hidden_size
        self.single_blocks = nn.ModuleList(SingleStreamBlock(params) for _ in range(params.depth_single_blocks))
        self.final_layer = LastLayer(hidden, params.in_channels)

    @course
    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        txt_attention_mask: Tensor | None = None,
        feature_layer: int | None = None,
        control: Control | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) of packed latents.

        img [B, L, 4C], img_ids [B or 1, L, 3] = (0, row, column), txt [B, T, context], txt_ids [B or 1, T, 3] = 0, both
        best on the CPU, where they are read; timesteps [B] in 0..1, or [B, L] for a time per image token, y [B, vector]
        = pooled CLIP state, guidance [B] = scale as is, txt_attention_mask [B, T] with 1 = attend. Returns [B, L, 4C];
        with `feature_layer` also the image tokens [B, L, hidden] after that block, counted from 0 over the double, then
        the single blocks. ValueError when a guidance-distilled model gets no guidance.
        """
        self.prepare_block_swap_before_forward()
        vec = self.conditioning_vector(timesteps, y, guidance)  # [B, hidden] or [B, L, hidden]
        joined = of_joined_tokens(vec, txt.shape[1])
        modulating = BlockVectors(
            [(vec, of_text(vec))] * self.params.depth, [joined] * self.params.depth_single_blocks, vec
        )
        residuals = None
        if control is not None:
            given = (img, img_ids, txt, txt_ids, timesteps, y, guidance, txt_attention_mask)
            residuals = control.residuals(self.params.depth, *given)
        return (
            yield from self.run_streams(
                img, img_ids, txt, txt_ids, modulating, txt_attention_mask, feature_layer, residuals
            )
        )


def joined_key_mask(txt_attention_mask: Tensor | None, num_img_tokens: int) -> Tensor | None:
    """Text mask followed by ones for the image tokens, [B, T + L]; None stays None."""
    if txt_attention_mask is None:
        return None
    return F.pad(txt_attention_mask.bool(), (0, num_img_tokens), value=True)
