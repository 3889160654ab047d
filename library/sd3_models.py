"""Stable Diffusion 3 and 3.5: the MMDiT denoiser; its autoencoder is the one of library/components/ldm_models.py.

Module paths are the key names of the original files; leaf layers are plain nn.Linear and nn.Conv2d, so that adapters
find them by name and class.
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
    FinalLayer,
    joined_along_tokens,
    modulate,
    of_text,
    of_tokens,
    plain_norm,
    rms_normed,
    split_query_key_value,
    timestep_embedding,
)
from library.components.block_calls import BlockCall
from library.components.ldm_models import AutoEncoder as SDVAE  # noqa: F401, a name that is imported from here
from library.components.mixed_models import entry_dtype
from library.components.packed_tokens import SampleVectors, Segments, Stream, segments, vectors
from library.core.courses import course
from library.core.errors import ConfigError
from library.core.lazy_names import homes, lazy_names
from library.custom_offloading_utils import BlockStackMixin

__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.sd3_names", "create_sd3_mmdit"))

POS_EMBED_BASE = 16
"""patches that the scaled position table counts along a side of a picture of the trained size"""
POS_EMBED_MAX_RATIO = 1.5
"""how much larger than such a picture the scaled table is, which random crops move in"""
SCALED_SIDE_STEP = 8
"""patches: sides that the scaled table knows are multiples of this, 128 pixels"""


@dataclass(frozen=True, kw_only=True)
class SD3Params:
    """Hyper-parameters of the denoiser; the defaults are SD3 medium. `x_block_self_attn_layers`: numbers of the blocks
    with a second attention over the picture alone; `pos_embed_max_size`: side of the stored position table in
    patches."""

    depth: int = 24
    hidden_size: int = 1536
    num_heads: int = 24
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    mlp_ratio: float = 4.0
    qk_norm: str | None = None
    x_block_self_attn_layers: tuple[int, ...] = ()
    pos_embed_max_size: int = 192
    adm_in_channels: int = 2048
    context_in: int = 4096
    time_embed_dim: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "x_block_self_attn_layers", tuple(self.x_block_self_attn_layers))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide hidden_size {self.hidden_size}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}; position tables need a multiple of 4")
        if self.qk_norm not in (None, "rms"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; known: rms, or none")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        # a ratio read from shapes may miss its integer by rounding
        return math.floor(self.hidden_size * self.mlp_ratio + 1e-6)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 until the product is rounded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (rms_normed(x, 1e-6) * self.weight.float()).to(x.dtype)


class PatchEmbed(nn.Module):
    """Latents [B, C, H, W] -> patches [B, h, w, hidden]. Odd sides are mirrored to full patches; a single row or column,
    which has nothing to mirror, is repeated."""

    def __init__(self, params: SD3Params) -> None:
        super().__init__()
        self.patch_size = params.patch_size
        self.proj = nn.Conv2d(params.in_channels, params.hidden_size, params.patch_size, params.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        lacking = (0, -width % self.patch_size, 0, -height % self.patch_size)
        for dim, padding in ((width, (*lacking[:2], 0, 0)), (height, (0, 0, *lacking[2:]))):
            x = F.pad(x, padding, mode="reflect" if max(padding) < dim else "replicate")
        return self.proj(x).permute(0, 2, 3, 1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = _vector_mlp(width, hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Times on the 0..1000 scale, [B] or [B, L] -> [..., hidden]."""
        return self.mlp(timestep_embedding(t, self.width, 1.0).to(self.mlp[0].bias.dtype))


class VectorEmbedder(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = _vector_mlp(width, hidden)

    def forward(self, y: Tensor) -> Tensor:
        return self.mlp(y.to(self.mlp[0].bias.dtype))


def _vector_mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))


class AttentionLinears(nn.Module):
    """Projections of one stream; `pre_only` has no output."""

    def __init__(self, params: SD3Params, pre_only: bool = False) -> None:
        super().__init__()
        self.num_heads = params.num_heads
        self.qkv = nn.Linear(params.hidden_size, 3 * params.hidden_size)
        if not pre_only:
            self.proj = nn.Linear(params.hidden_size, params.hidden_size)
        is_normed = params.qk_norm == "rms"
        self.ln_q = RMSNorm(params.head_dim) if is_normed else nn.Identity()
        self.ln_k = RMSNorm(params.head_dim) if is_normed else nn.Identity()

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, hidden] -> three of [B, heads, L, D], query and key normalised."""
        query, key, value = split_query_key_value(self.qkv(x), self.num_heads)
        return self.ln_q(query), self.ln_k(key), value


class MLP(nn.Module):
    def __init__(self, hidden: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, mlp_hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class SingleDiTBlock(AttentionModule):
    """One stream of a joint block: its modulation, projections and feed-forward.

    `pre_only`: nothing of the stream is needed after the attention (the text of the last block). `has_second`: a second
    attention over the tokens of this stream alone.
    """

    def __init__(self, params: SD3Params, pre_only: bool = False, has_second: bool = False) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.pre_only = pre_only
        self.num_chunks = 2 if pre_only else 9 if has_second else 6
        self.norm1 = plain_norm(hidden)
        self.attn = AttentionLinears(params, pre_only)
        if has_second:
            self.attn2 = AttentionLinears(params)
        if not pre_only:
            self.norm2 = plain_norm(hidden)
            self.mlp = MLP(hidden, params.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, self.num_chunks * hidden))

    def modulation(self, c: Tensor | SampleVectors) -> Sequence[Tensor]:
        """Shift and scale; gate of the attention, shift, scale and gate of the feed-forward; shift, scale and gate of
        the second attention: as many as the stream has, each [B, 1 or L, hidden]."""
        return of_tokens(self.adaLN_modulation, c).chunk(self.num_chunks, dim=-1)

    def after_attention(
        self, x: Tensor, attended: Tensor, chunks: Sequence[Tensor], alone: Segments | None = None
    ) -> Tensor:
        """The stream [B, L, hidden] after this block, from what the joint attention gave it. `alone`: which tokens of
        a row of several samples attend to which in the second attention."""
        gate_attn, shift_mlp, scale_mlp, gate_mlp = chunks[2:6]
        result = torch.addcmul(x, gate_attn, self.attn.proj(attended))
        if len(chunks) == 9:
            shift, scale, gate = chunks[6:]
            own = self.scaled_attention(*self.attn2.query_key_value(modulate(self.norm1(x), shift, scale)), alone)
            result = torch.addcmul(result, gate, self.attn2.proj(own))
        return torch.addcmul(result, gate_mlp, self.mlp(modulate(self.norm2(result), shift_mlp, scale_mlp)))


class MMDiTBlock(AttentionModule):
    """Text and picture with weights of their own and one attention over both."""

    def __init__(self, params: SD3Params, number: int) -> None:
        super().__init__()
        self.context_block = SingleDiTBlock(params, pre_only=number == params.depth - 1)
        self.x_block = SingleDiTBlock(params, has_second=number in params.x_block_self_attn_layers)

    def forward(
        self, context: Tensor, x: Tensor, c: Tensor | SampleVectors, joint: Segments | None = None,
        alone: Segments | None = None,
    ) -> tuple[Tensor, ...]:
        """context [B, T, hidden], x [B, L, hidden], c [B, hidden] or [B, L, hidden] -> (context, x); the last block
        gives (x,). `joint` and `alone`: which tokens of a row of several samples attend to which, of both streams and
        in the second attention of the picture."""
        text, picture = self.context_block, self.x_block
        text_chunks, chunks = text.modulation(of_text(c)), picture.modulation(c)
        text_qkv = text.attn.query_key_value(modulate(text.norm1(context), *text_chunks[:2]))
        qkv = picture.attn.query_key_value(modulate(picture.norm1(x), *chunks[:2]))
        attended = self.scaled_attention(*map(joined_along_tokens, text_qkv, qkv), joint)
        text_attended, attended = attended.split((context.shape[1], x.shape[1]), dim=1)
        x = picture.after_attention(x, attended, chunks, alone)
        return (x,) if text.pre_only else (text.after_attention(context, text_attended, text_chunks), x)

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        (text, picture), (vecs,) = streams, zip(*contexts)
        return vectors(vecs, picture, text), segments((text, picture)), segments((picture,))


class MMDiT(BlockStackMixin, nn.Module):
    """The rectified-flow transformer of SD3 and SD3.5."""

    def __init__(self, params: SD3Params) -> None:
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        self.x_embedder = PatchEmbed(params)
        self.t_embedder = TimestepEmbedder(params.time_embed_dim, hidden)
        self.y_embedder = VectorEmbedder(params.adm_in_channels, hidden)
        self.context_embedder = nn.Linear(params.context_in, hidden)
        self.register_buffer("pos_embed", torch.zeros(1, params.pos_embed_max_size**2, hidden))
        self.joint_blocks = nn.ModuleList(MMDiTBlock(params, number) for number in range(params.depth))
        self.final_layer = FinalLayer(hidden, params.patch_size**2 * params.out_channels)
        self.uses_scaled_pos_embed = False
        self.position_tables = DeviceTables()
        self.init_block_stack(num_rows=1)

    @property
    def device(self) -> torch.device:
        return self.context_embedder.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return entry_dtype(self, self.context_embedder.bias)

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.hidden_size

    @course
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        context: Tensor,
        crop_corners: Tensor | None = None,
        feature_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) [B, out, H, W] of noisy latents x [B, C, H, W].

        t [B] on the 0..1000 scale, or [B, h * w] for a time per patch; y [B, adm] = pooled states, context [B, T,
        context] = states of the text. `crop_corners` [B, 2] on the CPU: row and column in the position table where each
        sample's patches begin, the middle of the table without. With `feature_layer` also the picture tokens [B, h * w,
        hidden] after that block.
        """
        self.prepare_block_swap_before_forward()
        height, width = x.shape[-2:]
        patches = self.x_embedder(x.to(self.dtype))  # [B, h, w, hidden]
        grid = (patches.shape[1], patches.shape[2])
        tokens = patches.flatten(1, 2)  # [B, h * w, hidden]
        tokens = tokens + self._positions(grid, crop_corners, x.device).to(tokens.dtype)
        times, pooled = self.t_embedder(t), self.y_embedder(y)
        c = times + (pooled[:, None] if t.ndim == 2 else pooled)  # [B, hidden] or [B, h * w, hidden]
        text = self.context_embedder(context.to(self.dtype))  # [B, T, hidden]

        (offloader,) = self.offloaders
        features: list[Tensor] = []
        for index, block in enumerate(self.joint_blocks):
            *text_after, tokens = yield BlockCall(self, block, index, offloader, (text, tokens), (c,))
            text = text_after[0] if text_after else text
            features += [tokens] if index == feature_layer else []
        side = self.params.patch_size
        velocity = rearrange(
            self.final_layer(tokens, c), "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=side, q=side
        )[:, :, :height, :width]
        return velocity if feature_layer is None else (velocity, features[0])

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.joint_blocks)

    # -- positions -----------------------------------------------------------------------------------------------------

    def enable_scaled_pos_embed(self) -> None:
        """Take positions from a table that counts a picture of any size as the trained one, in the place of the stored
        table."""
        self.uses_scaled_pos_embed = True

    def crop_range(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Largest row and column where a crop of this size [h, w] may begin."""
        side = self._table_side(grid)
        return max(side - grid[0], 0), max(side - grid[1], 0)

    def middle_corner(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the table where the patches of a picture [h, w] in its middle begin."""
        side = self._table_side(grid)
        return (side - grid[0]) // 2, (side - grid[1]) // 2

    def _table_side(self, grid: tuple[int, int]) -> int:
        if self.uses_scaled_pos_embed:
            return int(sample_side(grid) * POS_EMBED_MAX_RATIO)
        return self.params.pos_embed_max_size

    def _positions(self, grid: tuple[int, int], corners: Tensor | None, device: torch.device) -> Tensor:
        """[1 or B, h * w, hidden] float32. ConfigError for a picture that the stored table cannot hold."""
        side = self._table_side(grid)
        places = [self.middle_corner(grid)] if corners is None else [tuple(corner) for corner in corners.tolist()]
        if not self.uses_scaled_pos_embed and max(grid) > side:
            raise ConfigError(
                f"the picture has {grid[0]} x {grid[1]} patches; the position table of the model holds {side} x {side}"
                f" ({16 * side} pixels a side), use smaller pictures or --enable_scaled_pos_embed"
            )
        return torch.cat([self._crop(grid, place, device) for place in places])

    def _crop(self, grid: tuple[int, int], corner: tuple[int, int], device: torch.device) -> Tensor:
        """[1, h * w, hidden]: the part of the table that begins at a corner."""
        if self.uses_scaled_pos_embed:
            make = lambda: (scaled_positions(self.params.hidden_size, grid, corner),)  # noqa: E731
            return self.position_tables.get((grid, corner), device, make)[0]
        side, (top, left) = self.params.pos_embed_max_size, corner
        table = self.pos_embed.reshape(1, side, side, -1)
        return table[:, top : top + grid[0], left : left + grid[1]].flatten(1, 2).float()

    # -- memory --------------------------------------------------------------------------------------------------------

    def swapped_rows(self) -> tuple[nn.ModuleList, ...]:
        return (self.joint_blocks,)


def sample_side(grid: tuple[int, int]) -> int:
    """Side in patches of the trained picture whose table a picture of this size [h, w] takes: that of a square of its
    area, rounded to 128 pixels, so that all buckets of one resolution have the same."""
    steps = round(math.sqrt(grid[0] * grid[1]) / SCALED_SIDE_STEP)
    return max(steps, 1) * SCALED_SIDE_STEP


def scaled_positions(width: int, grid: tuple[int, int], corner: tuple[int, int], side: int | None = None) -> Tensor:
    """[1, h * w, width]: position 16 / S * (i - (G - S) / 2) at the row or column i of a table of G = 1.5 S patches a
    side, whose middle S counts as the trained picture. `side`: S, that of the grid when not given."""
    side = side or sample_side(grid)
    start = (int(side * POS_EMBED_MAX_RATIO) - side) / 2
    axes = [
        (torch.arange(size, dtype=torch.float64) + first - start) * POS_EMBED_BASE / side
        for size, first in zip(grid, corner)
    ]
    return sine_positions(width, *axes)[None]


def sine_positions(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """[h * w, width] float32: half the channels for the column, half for the row, each sine then cosine; computed in
    float64."""
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    parts = []
    for positions in (columns[None, :].expand(len(rows), -1), rows[:, None].expand(-1, len(columns))):
        angles = positions.double()[..., None] * frequencies
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1).flatten(0, 1).float()


def get_2d_sincos_pos_embed(width: int, grid_size: int) -> Tensor:
    """The table [grid_size^2, width] of an untrained model: positions 0, 1, ... of rows and columns."""
    places = torch.arange(grid_size, dtype=torch.float64)
    return sine_positions(width, places, places)
