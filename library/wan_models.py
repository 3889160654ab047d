"""Wan 2.1 and 2.2: the denoiser, for text, first frames, first and last frames, and control videos.

Module paths are the key names of the original files; leaf layers are plain nn.Linear, so that adapters find them by
name and class. What makes a variant is in its shapes: `img_emb` and `k_img` are those of Wan 2.1 with pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.attention import (
    AttentionModule,
    DeviceTables,
    in_heads,
    riflex_frequencies,
    rms_normed,
    rope_cos_sin,
    rotate_pairs,
)
from library.components.block_calls import BlockCall
from library.components.mixed_models import entry_dtype
from library.components.packed_tokens import Segments, Stream, ropes, segments
from library.core.courses import course
from library.custom_offloading_utils import BlockStackMixin

Rope = tuple[Tensor, Tensor]
ROPE_THETA = 10000.0
IMAGE_NORM_EPS = 1e-5
VISION_TOKENS = 257
"""of a picture, from the released vision encoder"""
SMALLEST_LENGTH = 1e-8
NUM_MODULATIONS = 6
"""shift, scale and gate of self-attention and of the feed-forward layers"""


@dataclass(frozen=True, kw_only=True)
class WanParams:
    """Hyper-parameters; the defaults are the text to video model of 14B.

    `in_dim` counts the channels of the latents and of what stands beside them: 16 alone, 36 with the mask and latents
    of pictures, 48 with latents of a control video and of a picture. `img_dim`: width of the states of a vision
    encoder, None where the model takes none; `img_positions`: how many of them it has positions for, 0 where it has
    none.
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    img_dim: int | None = None
    img_positions: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size is {self.patch_size}; needed: three sides (frames, rows, columns)")
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide dim {self.dim}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(f"the head size is {self.head_dim}; the rotary axes need an even one of 6 or more")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch_size)

    @property
    def axes_dim(self) -> tuple[int, int, int]:
        """Widths of the rotary axes (frames, rows, columns): 44, 42, 42 of 128."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    @property
    def vision_tokens(self) -> int:
        """Of one picture; models without positions take any number, and encoders give this one."""
        return self.img_positions // 2 or VISION_TOKENS

    @property
    def has_vision(self) -> bool:
        """Whether it looks at the states of a vision encoder."""
        return self.img_dim is not None


def sinusoids(times: Tensor, width: int) -> Tensor:
    """[cos(t w) | sin(t w)], w_k = 10000^(-k / (width / 2)), of times on the 0..1000 scale: [...] -> [..., width]
    float32, computed in float64."""
    place = torch.device("cpu") if times.device.type in ("mps", "xpu") else times.device  # they lack float64
    frequencies = torch.pow(
        10000.0, -torch.arange(width // 2, dtype=torch.float64, device=place) / (width // 2)
    )  # [width / 2]
    angles = times.to(place, torch.float64)[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(times.device, torch.float32)


def grid_positions(frames: Tensor, rows: int, columns: int) -> Tensor:
    """Places of the tokens on the axes (frame, row, column), [B, F * rows * columns, 3], of `frames` [B, F]: the place
    in time of each frame."""
    batch, count = frames.shape
    shape = (batch, count, rows, columns)
    row, column = torch.arange(rows), torch.arange(columns)
    axes = (frames[:, :, None, None], row[None, None, :, None], column[None, None, None, :])
    return torch.stack([axis.expand(shape) for axis in axes], dim=-1).flatten(1, 3)


class WanRMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the type of x, times weight; over the full width, before heads are split."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normed(x, self.eps).to(x.dtype) * self.weight.to(x.dtype)


class WanLayerNorm(nn.LayerNorm):
    """A layer norm that is computed in float32 and returns that: a modulation follows, or rounding."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if one is None else one.float() for one in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


@dataclass(frozen=True)
class Modulation:
    """What the time makes of a layer: float32 vectors of every distinct time [U, n, D], and which of them each token
    has, [B, L], or the tokens of a row of several samples; without `places` there is one for each sample (U = B)."""

    vectors: Tensor
    places: Tensor | Stream | None = None

    def plus(self, own: Tensor) -> Modulation:
        """With the learned vectors [1, n, D] of one layer added."""
        return Modulation(self.vectors + own.float(), self.places)

    def part(self, number: int) -> Tensor:
        """One of the n vectors of each token, [B, 1, D] or [B, L, D]."""
        chosen = self.vectors[:, number]
        if isinstance(self.places, Stream):
            return self.places.spread(chosen)
        return chosen[:, None] if self.places is None else chosen[self.places]


class WanSelfAttention(AttentionModule):
    """Attention among the tokens of the video, turned by their places in time, rows and columns."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        dim = params.dim
        self.num_heads = params.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, params.eps), WanRMSNorm(dim, params.eps)

    def heads(self, states: Tensor) -> Tensor:
        """[B, L, D] -> [B, heads, L, D / heads]."""
        return in_heads(states, self.num_heads)

    def forward(self, x: Tensor, rope: Rope, segments: Segments | None = None) -> Tensor:
        """x [B, L, D], rope [B or 1, L, D / heads / 2] each -> [B, L, D]. `segments`: which tokens of a row of several
        samples attend to which."""
        query, key = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x)))
        query, key = rotate_pairs(query, rope), rotate_pairs(key, rope)
        return self.o(self.scaled_attention(query, key, self.heads(self.v(x)), segments))


@dataclass(frozen=True)
class AttentionGuidance:
    """Normalised attention guidance (arXiv 2505.21179): attention to the prompt goes `scale` times as far from that to
    another text; the result is at most `tau` times as long, token by token, and `alpha` of it is taken.

    `text`: states [1 or B, T, text_dim] of that text, or its tokens [1 or B, T, D] inside the blocks.
    """

    text: Tensor
    scale: float
    tau: float = 3.5
    alpha: float = 0.5

    def of(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Attention [B, L, D] to the prompt and to the other text -> the guided one."""
        guided = self.scale * positive - (self.scale - 1) * negative
        usual = positive.abs().sum(dim=-1, keepdim=True)
        ratio = guided.abs().sum(dim=-1, keepdim=True) / usual.clamp_min(SMALLEST_LENGTH)
        guided = guided * (ratio.clamp(max=self.tau) / ratio.clamp_min(SMALLEST_LENGTH))
        return (self.alpha * guided + (1 - self.alpha) * positive).to(positive.dtype)


class WanCrossAttention(WanSelfAttention):
    """Attention to the text, whose padding is attended to as well: the model was trained so."""

    guidance: AttentionGuidance | None = None
    """inside a forward that is guided"""

    def forward(
        self, x: Tensor, text: Tensor, image: Tensor | None = None, segments: tuple[Segments | None, ...] = (None, None)
    ) -> Tensor:
        """x [B, L, D], text [B, T, D] -> [B, L, D]. `segments`: which tokens of a row of several samples attend to
        which tokens of the text and of pictures."""
        return self.o(self.of_text(self.heads(self.norm_q(self.q(x))), text, segments[0]))

    def of_text(self, query: Tensor, text: Tensor, segments: Segments | None) -> Tensor:
        attended = self.to_tokens(query, text, segments)
        if self.guidance is None:
            return attended
        other = self.guidance.text.expand(len(query), -1, -1)
        return self.guidance.of(attended, self.to_tokens(query, other))

    def to_tokens(self, query: Tensor, text: Tensor, segments: Segments | None = None) -> Tensor:
        return self.scaled_attention(query, self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)), segments)


class WanImageCrossAttention(WanCrossAttention):
    """Attention to the text and, with keys and values of its own, to the tokens of pictures."""

    def __init__(self, params: WanParams) -> None:
        super().__init__(params)
        self.k_img, self.v_img = (nn.Linear(params.dim, params.dim) for _ in range(2))
        self.norm_k_img = WanRMSNorm(params.dim, params.eps)

    def forward(
        self, x: Tensor, text: Tensor, image: Tensor | None = None, segments: tuple[Segments | None, ...] = (None, None)
    ) -> Tensor:
        """x [B, L, D], text [B, T, D], image [B, N, D] or None -> [B, L, D]."""
        query = self.heads(self.norm_q(self.q(x)))
        attended = self.of_text(query, text, segments[0])
        if image is not None:
            key = self.heads(self.norm_k_img(self.k_img(image)))
            attended = attended + self.scaled_attention(query, key, self.heads(self.v_img(image)), segments[1])
        return self.o(attended)


class WanAttentionBlock(nn.Module):
    """Self-attention and feed-forward layers, modulated by the time, and cross-attention between them, which is not."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        dim, eps = params.dim, params.eps
        self.norm1 = WanLayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = WanSelfAttention(params)
        self.norm3 = WanLayerNorm(dim, eps)
        self.cross_attn = (WanImageCrossAttention if params.has_vision else WanCrossAttention)(params)
        self.norm2 = WanLayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, params.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(params.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, NUM_MODULATIONS, dim) / dim**0.5)

    def forward(
        self, x: Tensor, vectors: Tensor, places: Tensor | Stream | None, text: Tensor, image: Tensor | None,
        rope: Rope, segments: tuple[Segments | None, ...] = (None, None, None),
    ) -> Tensor:
        """x [B, L, D]; vectors [U, 6, D] and places as in `Modulation`; text [B, T, D], image [B, N, D]. `segments`:
        which tokens of a row of several samples attend to each other, to which of the text and to which of pictures.
        """
        kind, e = x.dtype, Modulation(vectors, places).plus(self.modulation)
        attended = self.self_attn((self.norm1(x) * (1 + e.part(1)) + e.part(0)).to(kind), rope, segments[0])
        x = (x + attended.float() * e.part(2)).to(kind)
        x = x + self.cross_attn(self.norm3(x).to(kind), text, image, segments[1:])
        moved = self.ffn((self.norm2(x) * (1 + e.part(4)) + e.part(3)).to(kind))
        return (x + moved.float() * e.part(5)).to(kind)

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        (stream,), (vectors, places, texts, images, tables) = streams, zip(*contexts)
        text, has_images = Stream.of(texts), images[0] is not None
        image = Stream.of(images) if has_images else None
        return (
            torch.cat(vectors), _joined_places(places, vectors, stream), text.join(texts),
            image.join(images) if has_images else None, ropes(tables, streams),
            (segments(streams), segments(streams, (text,)), segments(streams, (image,)) if has_images else None),
        )  # fmt: skip


def _joined_places(
    places: Sequence[Tensor | None], vectors: Sequence[Tensor], stream: Stream
) -> Tensor | Stream:
    """Which of the vectors of all parts each token of their row has."""
    if places[0] is None:
        return stream
    starts = itertools.accumulate((len(part) for part in vectors[:-1]), initial=0)
    return stream.join([part + start for part, start in zip(places, starts)])


class Head(nn.Module):
    """Tokens to the values of their patches."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.norm = WanLayerNorm(params.dim, params.eps, elementwise_affine=False)
        self.head = nn.Linear(params.dim, params.patch_volume * params.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, params.dim) / params.dim**0.5)

    def forward(self, x: Tensor, time: Modulation) -> Tensor:
        """x [B, L, D], time: one vector [U, 1, D] of each -> [B, L, patch volume * out_dim]."""
        e = time.plus(self.modulation)
        return self.head((self.norm(x) * (1 + e.part(1)) + e.part(0)).to(x.dtype))


class MLPProj(nn.Module):
    """States of the vision encoder to tokens. A model of first and last frames adds a position to each of both."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        width = params.img_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(width, eps=IMAGE_NORM_EPS), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, params.dim), nn.LayerNorm(params.dim, eps=IMAGE_NORM_EPS),
        )  # fmt: skip
        if params.img_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, params.img_positions, width))

    def forward(self, states: Tensor) -> Tensor:
        """[B, N, img_dim] -> [B, N, D]. ValueError when there are more than positions."""
        positions = getattr(self, "emb_pos", None)
        if positions is not None:
            if states.shape[1] > positions.shape[1]:
                raise ValueError(f"there are {states.shape[1]} image tokens; the model has {positions.shape[1]} places")
            states = states + positions[:, : states.shape[1]].to(states.dtype)
        return self.proj(states)


class Experts(Protocol):
    """Two sets of weights of one tree of modules."""

    def use(self, *, high_noise: bool) -> None:
        """Let the modules hold the weights for much noise, or those for little."""


class WanModel(BlockStackMixin, nn.Module):
    """The rectified-flow transformer of Wan 2.1, or one of the two experts of Wan 2.2."""

    blocks_that_stay = 1  # as many as the known trainer of it swaps
    riflex_index = 0
    """see `riflex_frequencies`"""
    float32_parts = ("time_embedding.", "time_projection.")
    """what the time goes through: times would be rounded to what bfloat16 holds"""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.params = params
        dim = params.dim
        self.patch_embedding = nn.Conv3d(params.in_dim, dim, params.patch_size, params.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(params.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(params.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, NUM_MODULATIONS * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(params) for _ in range(params.num_layers))
        self.head = Head(params)
        if params.has_vision:
            self.img_emb = MLPProj(params)
        self.rope_tables = DeviceTables()
        self.experts: Experts | None = None
        """the weights of the two experts of Wan 2.2, of which the modules hold one at a time; None of one model"""
        self.init_block_stack(num_rows=1)

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return entry_dtype(self, self.patch_embedding.bias)

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.dim

    @course
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        *,
        y: Tensor | None = None,
        clip_fea: Tensor | None = None,
        f_indices: Tensor | None = None,
        skip_block_indices: Collection[int] = (),
        feature_layer: int | None = None,
        attention_guidance: AttentionGuidance | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) [B, C, F, H, W] float32 of latents x [B, C, F, H, W].

        t [B] on the 0..1000 scale, [B, F'] or [B, L] for a time per frame or token; context [B, T, text_dim]: the
        text's states, at most `text_len`, 0 behind the end of each; y [B, in_dim - C, F, H, W]: what stands beside the
        latents; clip_fea [B, N, img_dim]: states of pictures; f_indices [B, F] or [F]: places of the frames in time,
        0, 1, 2 ... when not given; skip_block_indices: blocks that are passed by; attention_guidance: away from which
        text attention goes. With `feature_layer` also the tokens [B, L, D] after that block. ValueError when sizes or
        inputs do not go together.
        """
        self.prepare_block_swap_before_forward()
        self._check(x, y, context, f_indices)
        given = x if y is None else torch.cat((x, y.to(x)), dim=1)
        embedded = self.patch_embedding(given.to(self.dtype))  # [B, D, F', H', W']
        grid = tuple(embedded.shape[2:])
        tokens = embedded.flatten(2).transpose(1, 2)  # [B, L, D]
        head_time, times = self._times(t, grid)
        text = self.text_embedding(self._padded(context))  # [B, text_len, D]
        if attention_guidance is not None:
            other = self.text_embedding(self._padded(attention_guidance.text))  # [1 or B, text_len, D]
            attention_guidance = dataclasses.replace(attention_guidance, text=other)
        self._guide_attention(attention_guidance)  # also where it is None: a forward that failed has left its own
        image = None
        if clip_fea is not None and self.params.has_vision:
            image = self.img_emb(clip_fea.to(self.dtype))  # [B, N, D]
        rope = self._rope(grid, f_indices, x.device)

        (offloader,) = self.offloaders
        features: list[Tensor] = []
        shared = (times.vectors, times.places, text, image, rope)
        for index, block in enumerate(self.blocks):
            if index not in skip_block_indices:
                (tokens,) = yield BlockCall(self, block, index, offloader, (tokens,), shared)
            elif offloader is not None:
                offloader.after_block(index, ())  # its place is given away all the same
            features += [tokens] if index == feature_layer else []
        if attention_guidance is not None:
            self._guide_attention(None)
        patches = self.head(tokens, head_time)
        frames, rows, columns = grid
        pf, ph, pw = self.params.patch_size
        velocity = rearrange(
            patches, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", f=frames, h=rows, w=columns, pf=pf, ph=ph,
            pw=pw,
        ).float()  # fmt: skip
        return velocity if feature_layer is None else (velocity, features[0])

    def _guide_attention(self, guidance: AttentionGuidance | None) -> None:
        for block in self.blocks:
            block.cross_attn.guidance = guidance

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def swapped_rows(self) -> tuple[nn.ModuleList, ...]:
        return (self.blocks,)

    def _times(self, t: Tensor, grid: tuple[int, ...]) -> tuple[Modulation, Modulation]:
        """(of the head, one vector; of the blocks, six). One of each distinct time is computed and held: with a time
        per token, most are equal."""
        frames, rows, columns = grid
        places = None
        if t.ndim == 2:
            if t.shape[1] == frames:  # one per frame: that of all its tokens
                t = t.repeat_interleave(rows * columns, dim=1)
            t, places = torch.unique(t, return_inverse=True)
        with torch.autocast(t.device.type, enabled=False):  # in the type of the weights, which are kept in float32
            waves = sinusoids(t, self.params.freq_dim).to(self.time_embedding[0].bias.dtype)
            e = self.time_embedding(waves)  # [U, D]
            six = self.time_projection(e).float().unflatten(1, (NUM_MODULATIONS, -1))  # [U, 6, D]
        return Modulation(e.float()[:, None], places), Modulation(six, places)

    def _padded(self, context: Tensor) -> Tensor:
        return F.pad(context, (0, 0, 0, self.params.text_len - context.shape[1])).to(self.dtype)

    def _rope(self, grid: tuple[int, ...], f_indices: Tensor | None, device: torch.device) -> Rope:
        frames, rows, columns = grid
        if f_indices is None:
            places = (tuple(range(frames)),)
        else:
            rows_of = f_indices[None] if f_indices.ndim == 1 else f_indices
            places = tuple(tuple(row) for row in rows_of.tolist())

        def make() -> Rope:
            positions = grid_positions(torch.tensor(places), rows, columns)
            axes = self.params.axes_dim
            slowed = riflex_frequencies(axes[0], ROPE_THETA, self.riflex_index, frames)
            return rope_cos_sin(positions, axes, ROPE_THETA, slowed)

        return self.rope_tables.get((places, rows, columns, self.riflex_index), device, make)

    def _check(self, x: Tensor, y: Tensor | None, context: Tensor, f_indices: Tensor | None) -> None:
        p = self.params
        channels = x.shape[1] + (0 if y is None else y.shape[1])
        if channels != p.in_dim:
            beside = "nothing beside them" if y is None else f"{y.shape[1]} beside them"
            raise ValueError(f"latents have {x.shape[1]} channels, {beside}; the model takes {p.in_dim}")
        if any(side % patch for side, patch in zip(x.shape[2:], p.patch_size)):
            raise ValueError(f"latents are {list(x.shape[2:])}; needed: multiples of the patch {list(p.patch_size)}")
        if context.shape[1] > p.text_len:
            raise ValueError(f"the text has {context.shape[1]} tokens; the model takes {p.text_len}")
        if f_indices is not None and f_indices.shape[-1] != x.shape[2]:
            raise ValueError(f"f_indices has {f_indices.shape[-1]} places; the latents have {x.shape[2]} frames")
