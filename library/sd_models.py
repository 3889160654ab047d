"""The U-Net of Stable Diffusion 1 and 2. Its module tree carries diffusers names, from which adapter keys are made;
files are in the original layout (library/checkpoints/unet_convert.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.components.unet_encoder_models import (
    TimeEmbedding,
    UNetEncoder,
    level_of_blocks,
    levels_down,
    middle_of,
    skip_widths,
)
from library.components.unet_models import UNetParams, Upsample2D, contexts_of, with_skip

if TYPE_CHECKING:
    from library.components.control_models import Control


class UNet2DConditionModel(UNetEncoder):
    """Noisy latents, times and text states -> prediction (noise or v)."""

    def __init__(self, params: UNetParams) -> None:
        super().__init__(params)
        widths, skips = params.channels, skip_widths(params)
        self.conv_in = nn.Conv2d(params.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], params.time_embed_dim)
        self.down_blocks, self.up_blocks = levels_down(params), nn.ModuleList()
        self.mid_block = middle_of(params)
        hidden = widths[-1]
        for number in reversed(range(len(widths))):
            pairs = []
            for _ in range(params.num_res_blocks + 1):
                pairs.append((hidden + skips.pop(), widths[number]))
                hidden = widths[number]
            level = level_of_blocks(pairs, params.transformer_depth[number], params.heads[number], params)
            if number > 0:
                level.upsamplers = nn.ModuleList([Upsample2D(hidden)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(params.norm_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], params.out_channels, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: that of the norms, which 8-bit storage leaves alone."""
        return self.conv_norm_out.weight.dtype

    def forward(
        self, sample: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, control: Control | None = None
    ) -> Tensor:
        """sample [B, 4, H, W], timesteps [B] 0..999, encoder_hidden_states [B, L, D] -> [B, 4, H, W]. States may be
        [B, N, L, D], for each of the N `text_layers` its own."""
        contexts = contexts_of(encoder_hidden_states.to(self.dtype), self.params)
        embedding = self.time_embedding(self.time_vector(timesteps, sample).to(self.dtype))  # [B, time_embed_dim]
        x, skips = self.way_down(self.conv_in(sample.to(self.dtype)), embedding, contexts, timesteps)
        x = self.through_middle(x, embedding, contexts)
        x, skips = self.controlled(x, skips, control, sample, timesteps, encoder_hidden_states)
        for level in self.up_blocks:
            for number in range(len(level.resnets)):
                x = self.run_place(level, number, with_skip(x, skips.pop()), embedding, contexts)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
