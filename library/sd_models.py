"""The U-Net of Stable Diffusion 1 and 2. Its module tree carries diffusers names, from which adapter keys are made;
files are in the original layout (library/checkpoints/unet_convert.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.components.unet_models import (
    Transformer2DModel,
    UNetBase,
    UNetParams,
    Upsample2D,
    contexts_of,
    residual_block,
    with_skip,
)


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


def _level(pairs: list[tuple[int, int]], depth: int, heads: int, params: UNetParams) -> nn.Module:
    """Residual blocks of the given (in, out) widths, each followed by a transformer where `depth` is not 0."""
    level = nn.Module()
    if depth:
        level.attentions = nn.ModuleList(Transformer2DModel(out_width, depth, heads, params) for _, out_width in pairs)
    level.resnets = nn.ModuleList(ResnetBlock2D(in_width, out_width, params) for in_width, out_width in pairs)
    return level


class UNet2DConditionModel(UNetBase):
    """Noisy latents, times and text states -> prediction (noise or v)."""

    def __init__(self, params: UNetParams) -> None:
        super().__init__(params)
        widths, count = params.channels, params.num_res_blocks
        self.conv_in = nn.Conv2d(params.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], params.time_embed_dim)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for number, width in enumerate(widths):
            pairs = [(skips[-1] if block == 0 else width, width) for block in range(count)]
            level = _level(pairs, params.transformer_depth[number], params.heads[number], params)
            skips += [width] * count
            if number < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample2D(width)])
                skips.append(width)
            self.down_blocks.append(level)
        middle = [(widths[-1], widths[-1])] * 2
        self.mid_block = nn.Module()
        self.mid_block.attentions = nn.ModuleList(
            [Transformer2DModel(widths[-1], params.middle_depth, params.heads[-1], params)]
        )
        self.mid_block.resnets = nn.ModuleList(ResnetBlock2D(*pair, params) for pair in middle)
        hidden = widths[-1]
        for number in reversed(range(len(widths))):
            pairs = []
            for _ in range(count + 1):
                pairs.append((hidden + skips.pop(), widths[number]))
                hidden = widths[number]
            level = _level(pairs, params.transformer_depth[number], params.heads[number], params)
            if number > 0:
                level.upsamplers = nn.ModuleList([Upsample2D(hidden)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(params.norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], params.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: that of the norms, which 8-bit storage leaves alone."""
        return self.conv_norm_out.weight.dtype

    def forward(self, sample: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """sample [B, 4, H, W], timesteps [B] 0..999, encoder_hidden_states [B, L, D] -> [B, 4, H, W]. States may be
        [B, N, L, D], for each of the N places of `text_layers` its own."""
        contexts = contexts_of(encoder_hidden_states.to(self.dtype), self.params)
        embedding = self.time_embedding(self.time_vector(timesteps, sample).to(self.dtype))  # [B, time_embed_dim]
        x = self.conv_in(sample.to(self.dtype))
        skips = [x]
        for depth, level in enumerate(self.down_blocks):
            x = self.shrunk(depth, x, timesteps)
            for number in range(len(level.resnets)):
                x = self._step(level, number, x, embedding, contexts)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        x = self.run_block(self.mid_block.resnets[0], x, embedding)
        x = self.run_block(self.mid_block.attentions[0], x, next(contexts))
        x = self.run_block(self.mid_block.resnets[1], x, embedding)
        for level in self.up_blocks:
            for number in range(len(level.resnets)):
                x = self._step(level, number, with_skip(x, skips.pop()), embedding, contexts)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _step(self, level: nn.Module, number: int, x: Tensor, embedding: Tensor, contexts: Iterator[Tensor]) -> Tensor:
        x = self.run_block(level.resnets[number], x, embedding)
        return self.run_block(level.attentions[number], x, next(contexts)) if hasattr(level, "attentions") else x
