"""What the U-Nets of Stable Diffusion 1, 2 and SDXL share: sizes, transformer blocks, the parts of a residual block.

Class names are a contract: adapter programs choose layers by the names of the blocks they stand in (Transformer2DModel,
ResnetBlock2D, Downsample2D, Upsample2D, CrossAttention). Leaf layers are plain nn.Linear, nn.Conv2d and norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.attention import AttentionModule, in_heads, timestep_embedding
from library.core.attention_modes import ATTENTION_MODES
from library.custom_offloading_utils import CheckpointedBlocks
from library.device_utils import to_device

if TYPE_CHECKING:
    from library.components.control_models import Control


@dataclass(frozen=True, kw_only=True)
class UNetParams:
    """Sizes of a U-Net; the defaults are Stable Diffusion 1.5.

    One entry per level in `channels`, `attention_levels`, `heads` (a single number stands for all) and
    `transformer_depth` (0 where a level has no attention). The middle has heads and depth of the last level, or depth 1
    where that has none. `adm_in_channels`: width of the vector conditioning, None without it.
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_dim: int = 768
    use_linear_projection: bool = False
    upcast_attention: bool = False
    adm_in_channels: int | None = None
    time_embed_dim: int = 1280
    norm_groups: int = 32

    def __post_init__(self) -> None:
        levels = len(self.channels)
        for name in ("channels", "attention_levels", "transformer_depth", "heads"):
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, Sequence) else (value,) * levels
            if len(value) != levels:
                raise ValueError(f"{name} is {value}; it needs one entry for each of the {levels} levels")
            object.__setattr__(self, name, value)
        depths = tuple(depth if has else 0 for depth, has in zip(self.transformer_depth, self.attention_levels))
        object.__setattr__(self, "transformer_depth", depths)
        for width, heads in zip(self.channels, self.heads):
            if width % heads:
                raise ValueError(f"heads is {self.heads}; each must divide the width of its level, {self.channels}")
            if width % self.norm_groups:
                raise ValueError(f"norm_groups is {self.norm_groups}; it must divide every width, among them {width}")


def text_layers(params: UNetParams) -> list[str]:
    """The places with cross-attention in the order in which they run, by their numbers in files of the original layout:
    IN01 is input_blocks.1, MID middle_block, OUT03 output_blocks.3."""
    levels, names, place = len(params.channels), [], 0  # input_blocks.0 is a convolution
    for level, depth in enumerate(params.transformer_depth):
        for _ in range(params.num_res_blocks):
            place += 1
            names += [f"IN{place:02}"] if depth else []
        place += level < levels - 1  # a convolution that halves the sides
    names.append("MID")
    for level, depth in enumerate(reversed(params.transformer_depth)):
        start = level * (params.num_res_blocks + 1)
        names += [f"OUT{start + number:02}" for number in range(params.num_res_blocks + 1)] if depth else []
    return names


def contexts_of(states: Tensor, params: UNetParams) -> Iterator[Tensor]:
    """What each of the `text_layers` in turn attends to, [B, L, D]: the same states, or those of its own of
    [B, layers, L, D]."""
    if states.dim() == 3:
        return repeat(states)
    layers = len(text_layers(params))
    if states.shape[1] != layers:
        raise ValueError(f"there are text states for {states.shape[1]} layers; the U-Net has {layers}")
    return iter(states.unbind(1))


class GEGLU(nn.Module):
    """x -> value * gelu(gate), both from one projection: value half first."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        # the empty middle is where a dropout stood when the files were made; it keeps the name net.2
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Identity(), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class CrossAttention(AttentionModule):
    """Attention over `context`, or over x itself without one. `upcast`: half precision computes products in float32,
    which Stable Diffusion 2 needs (its products leave the range of float16). Kernels for 16 bits alone sum them in
    float32 in any case."""

    def __init__(self, dim: int, context_dim: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Identity()])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        projected = (self.to_q(x), self.to_k(source), self.to_v(source))
        query, key, value = (in_heads(states, self.heads) for states in projected)
        if self.upcast and value.dtype == torch.float16 and not ATTENTION_MODES[self.attention_choice.mode].halves_only:
            with torch.autocast(value.device.type, enabled=False):
                attended = self.scaled_attention(query.float(), key.float(), value.float()).to(value.dtype)
        else:
            attended = self.scaled_attention(query, key, value)  # [B, L, C]
        return self.to_out[0](attended)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each on a normalised input and added to it."""

    def __init__(self, dim: int, context_dim: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads, upcast)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, upcast)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


def as_tokens(picture: Tensor) -> Tensor:
    """[B, C, H, W] as [B, HW, C], a view."""
    return picture.flatten(2).transpose(1, 2)


def as_picture(tokens: Tensor, height: int) -> Tensor:
    """[B, HW, C] as [B, C, H, W], a view; the inverse of `as_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map; `proj_in` and `proj_out` are 1x1 convolutions or
    linear."""

    def __init__(self, dim: int, depth: int, heads: int, params: UNetParams) -> None:
        super().__init__()
        self.is_linear = params.use_linear_projection
        self.norm = nn.GroupNorm(params.norm_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim) if self.is_linear else nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(dim, params.context_dim, heads, params.upcast_attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, dim) if self.is_linear else nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height = x.shape[2]
        hidden = self.norm(x)
        if self.is_linear:
            hidden = self.proj_in(as_tokens(hidden))
        else:
            hidden = as_tokens(self.proj_in(hidden))
        for block in self.transformer_blocks:
            hidden = block(hidden, context)  # [B, HW, C]
        if self.is_linear:
            return x + as_picture(self.proj_out(hidden), height)
        return x + self.proj_out(as_picture(hidden, height))


class Upsample2D(nn.Module):
    """Nearest doubling and a convolution. `size` (height, width) is that of the skip connection that comes next, which
    is one less than the double where a side was odd."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if (2 * x.shape[2], 2 * x.shape[3]) == tuple(size):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


def residual_block(
    x: Tensor, embedding: Tensor, entry: Sequence[nn.Module], projection: nn.Module, leave: Sequence[nn.Module],
    skip: nn.Module | None
) -> Tensor:
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + projection(silu(embedding))))).

    x [B, C, H, W], embedding [B, E]; `entry` and `leave` are (norm, convolution) pairs. `skip` None = x itself.
    """
    hidden = entry[1](F.silu(entry[0](x)))
    hidden = hidden + projection(F.silu(embedding))[:, :, None, None]
    hidden = leave[1](F.silu(leave[0](hidden)))
    return (x if skip is None else skip(x)) + hidden


@dataclass(frozen=True)
class DeepShrink:
    """Features made smaller by `ratio` before a block of the way down, while the timestep is high: `depths` are (block,
    highest timestep, lowest timestep). Large pictures then get one composition. Source: Kohya's Deep Shrink."""

    depths: tuple[tuple[int, float, float], ...]
    ratio: float

    def apply(self, depth: int, x: Tensor, timesteps: Tensor) -> Tensor:
        """x [B, C, H, W] as it goes into block number `depth`; all timesteps of a batch are one."""
        time = float(timesteps.reshape(-1)[0])
        if any(depth == block and low <= time < high for block, high, low in self.depths):
            size = [max(1, int(side * self.ratio)) for side in x.shape[2:]]
            return fitted(x, size)
        return x


def fitted(x: Tensor, size: Sequence[int]) -> Tensor:
    """x [B, C, H, W] with sides `size`, bicubic; the same where they are right already."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), size=tuple(size), mode="bicubic", align_corners=False).to(x.dtype)


def with_skip(x: Tensor, skip: Tensor) -> Tensor:
    """[B, C1 + C2, H, W]: x, brought to the size of the skip connection where Deep Shrink made it smaller, and
    `skip`."""
    return torch.cat((fitted(x, skip.shape[2:]), skip), dim=1)


class UNetBase(CheckpointedBlocks, nn.Module):
    """Switches and small things of both module trees. Subclasses build the layers and the forward pass."""

    params: UNetParams

    def __init__(self, params: UNetParams) -> None:
        super().__init__()
        self.params = params
        self.init_checkpointing()
        self.deep_shrink: DeepShrink | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def time_vector(self, timesteps: Tensor, sample: Tensor) -> Tensor:
        """Sinusoid [B, channels[0]] of timesteps 0..999 ([B] or one number) for a sample [B, C, H, W]."""
        times = to_device(timesteps, sample.device).reshape(-1).expand(sample.shape[0])
        return timestep_embedding(times, self.params.channels[0], time_factor=1.0)

    def shrunk(self, depth: int, x: Tensor, timesteps: Tensor) -> Tensor:
        """x as it goes into block number `depth` of the way down."""
        return x if self.deep_shrink is None else self.deep_shrink.apply(depth, x, timesteps)

    @staticmethod
    def controlled(
        x: Tensor, skips: list[Tensor], control: Control | None, *inputs: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The features of the middle and the skip connections with what `control` adds to them: one residual for each
        skip connection in their order, then that of the middle. `inputs`: what the U-Net was called with."""
        if control is None:
            return x, skips
        places = [*skips, x]
        added = [
            place + fitted(residual, place.shape[2:]).to(place.dtype)
            for place, residual in zip(places, control.residuals(len(places), *inputs), strict=True)
        ]
        return added[-1], added[:-1]

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks of both kinds that `run_block` gets; the transformers of a place one by one, as there may be
        ten."""
        residual = [module for module in self.modules() if type(module).__name__ == "ResnetBlock2D"]
        return [*residual, *(module for module in self.modules() if isinstance(module, BasicTransformerBlock))]

    def run_block(self, block: nn.Module, x: Tensor, *context: Tensor) -> Tensor:
        """One residual or transformer block, checkpointed where that is switched on."""
        return self.checkpointed(lambda state: block(state, *context), (x,))
