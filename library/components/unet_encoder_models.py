"""The way down and the middle of a U-Net under diffusers names: half of the U-Net of Stable Diffusion 1 and 2, and what
every ControlNet of a U-Net copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from library.components.unet_models import Transformer2DModel, UNetBase, UNetParams, residual_block


class ResnetBlock2D(nn.Module):
    def __init__(self, in_width: int, out_width: int, params: UNetParams) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(params.norm_groups, in_width, eps=1e-5)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time_emb_proj = nn.Linear(params.time_embed_dim, out_width)
        self.norm2 = nn.GroupNorm(params.norm_groups, out_width, eps=1e-5)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return residual_block(
            x, embedding, (self.norm1, self.conv1), self.time_emb_proj, (self.norm2, self.conv2), self.conv_shortcut
        )


class Downsample2D(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class TimeEmbedding(nn.Module):
    """Named unlike Anima's: LyCORIS takes layers of a TimestepEmbedding, and those of time_embedding by name, and stops
    where both find the same one."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def level_of_blocks(pairs: list[tuple[int, int]], depth: int, heads: int, params: UNetParams) -> nn.Module:
    """Residual blocks of the given (in, out) widths, each followed by a transformer where `depth` is not 0."""
    level = nn.Module()
    if depth:
        level.attentions = nn.ModuleList(Transformer2DModel(out_width, depth, heads, params) for _, out_width in pairs)
    level.resnets = nn.ModuleList(ResnetBlock2D(in_width, out_width, params) for in_width, out_width in pairs)
    return level


def skip_widths(params: UNetParams) -> list[int]:
    """Widths of the skip connections, from the first convolution down."""
    widths = [params.channels[0]]
    for number, width in enumerate(params.channels):
        widths += [width] * params.num_res_blocks
        widths += [width] if number < len(params.channels) - 1 else []
    return widths


def levels_down(params: UNetParams) -> nn.ModuleList:
    levels, hidden = nn.ModuleList(), params.channels[0]
    for number, width in enumerate(params.channels):
        pairs = [(hidden if block == 0 else width, width) for block in range(params.num_res_blocks)]
        level = level_of_blocks(pairs, params.transformer_depth[number], params.heads[number], params)
        if number < len(params.channels) - 1:
            level.downsamplers = nn.ModuleList([Downsample2D(width)])
        levels.append(level)
        hidden = width
    return levels


def middle_of(params: UNetParams) -> nn.Module:
    width, middle = params.channels[-1], nn.Module()
    middle.attentions = nn.ModuleList([Transformer2DModel(width, params.middle_depth, params.heads[-1], params)])
    middle.resnets = nn.ModuleList(ResnetBlock2D(width, width, params) for _ in range(2))
    return middle


class UNetEncoder(UNetBase):
    """Runs the way down and the middle. A subclass makes `conv_in`, `time_embedding`, `down_blocks` and `mid_block`."""

    down_blocks: nn.ModuleList
    mid_block: nn.Module

    def way_down(
        self, x: Tensor, embedding: Tensor, contexts: Iterator[Tensor], timesteps: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """(features at the bottom, skip connections) of what the first convolution made, x [B, C, H, W]; `contexts`:
        see `contexts_of`."""
        skips = [x]
        for depth, level in enumerate(self.down_blocks):
            x = self.shrunk(depth, x, timesteps)
            for number in range(len(level.resnets)):
                x = self.run_place(level, number, x, embedding, contexts)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        return x, skips

    def through_middle(self, x: Tensor, embedding: Tensor, contexts: Iterator[Tensor]) -> Tensor:
        x = self.run_block(self.mid_block.resnets[0], x, embedding)
        x = self.run_block(self.mid_block.attentions[0], x, next(contexts))
        return self.run_block(self.mid_block.resnets[1], x, embedding)

    def run_place(
        self, level: nn.Module, number: int, x: Tensor, embedding: Tensor, contexts: Iterator[Tensor]
    ) -> Tensor:
        """One residual block of a level, and the transformer behind it where there is one."""
        x = self.run_block(level.resnets[number], x, embedding)
        return self.run_block(level.attentions[number], x, next(contexts)) if hasattr(level, "attentions") else x
