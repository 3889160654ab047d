"""The U-Net of SDXL. Its module tree carries the original names, from which adapter keys are made; they are those of
files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.components.unet_models import (
    Transformer2DModel,
    UNetBase,
    UNetParams,
    Upsample2D,
    fitted,
    residual_block,
    with_skip,
)

if TYPE_CHECKING:
    from library.components.control_models import Control


class ResnetBlock2D(nn.Module):
    def __init__(self, in_width: int, out_width: int, params: UNetParams) -> None:
        super().__init__()
        groups = params.norm_groups
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_width, eps=1e-5), nn.SiLU(), nn.Conv2d(in_width, out_width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(params.time_embed_dim, out_width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_width, eps=1e-5), nn.SiLU(), nn.Identity(),
            nn.Conv2d(out_width, out_width, 3, padding=1)
        )
        self.skip_connection = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        entry, leave = (self.in_layers[0], self.in_layers[2]), (self.out_layers[0], self.out_layers[3])
        return residual_block(x, embedding, entry, self.emb_layers[1], leave, self.skip_connection)


class Downsample2D(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _embedder(in_width: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, width), nn.SiLU(), nn.Linear(width, width))


class SdxlUNet2DConditionModel(UNetBase):
    """Noisy latents, times, text states and the vector of pooled text and sizes -> prediction (noise or v)."""

    def __init__(self, params: UNetParams) -> None:
        super().__init__(params)
        widths, count, depths = params.channels, params.num_res_blocks, params.transformer_depth
        self.time_embed = _embedder(widths[0], params.time_embed_dim)
        self.label_emb = nn.Sequential(_embedder(params.adm_in_channels, params.time_embed_dim))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(params.in_channels, widths[0], 3, padding=1)])])
        self.output_blocks = nn.ModuleList()
        hidden, skips = widths[0], [widths[0]]
        for number, width in enumerate(widths):
            for _ in range(count):
                self.input_blocks.append(self._block(hidden, width, depths[number], params.heads[number]))
                hidden = width
                skips.append(width)
            if number < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample2D(width)]))
                skips.append(width)
        self.middle_block = nn.ModuleList(
            [*self._block(hidden, hidden, params.middle_depth, params.heads[-1]), ResnetBlock2D(hidden, hidden, params)]
        )
        for number in reversed(range(len(widths))):
            for place in range(count + 1):
                block = self._block(hidden + skips.pop(), widths[number], depths[number], params.heads[number])
                hidden = widths[number]
                if number > 0 and place == count:
                    block.append(Upsample2D(hidden))
                self.output_blocks.append(block)
        self.out = nn.Sequential(
            nn.GroupNorm(params.norm_groups, widths[0], eps=1e-5), nn.SiLU(),
            nn.Conv2d(widths[0], params.out_channels, 3, padding=1)
        )

    def _block(self, in_width: int, out_width: int, depth: int, heads: int) -> nn.ModuleList:
        block = nn.ModuleList([ResnetBlock2D(in_width, out_width, self.params)])
        if depth:
            block.append(Transformer2DModel(out_width, depth, heads, self.params))
        return block

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: that of the norms, which 8-bit storage leaves alone."""
        return self.out[0].weight.dtype

    def forward(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor, control: Control | None = None
    ) -> Tensor:
        """x [B, 4, H, W], timesteps [B] 0..999, context [B, L, D], y [B, V] (pooled text and sizes) -> [B, 4, H, W]."""
        given = (x, timesteps, context, y)
        context = context.to(self.dtype)
        embedding = self.time_embed(self.time_vector(timesteps, x).to(self.dtype))  # [B, time_embed_dim]
        embedding = embedding + self.label_emb(y.to(self.dtype))
        x, skips, size = x.to(self.dtype), [], x.shape[2:]
        for depth, block in enumerate(self.input_blocks):
            x = self.shrunk(depth, x, timesteps)
            x = self._run(block, x, embedding, context)
            skips.append(x)
        x = self._run(self.middle_block, x, embedding, context)
        x, skips = self.controlled(x, skips, control, *given)
        for block in self.output_blocks:
            x = with_skip(x, skips.pop())
            x = self._run(block, x, embedding, context, skips[-1].shape[2:] if skips else None)
        return self.out[2](F.silu(self.out[0](fitted(x, size))))

    def _run(
        self, block: nn.ModuleList, x: Tensor, embedding: Tensor, context: Tensor, skip_size: torch.Size | None = None
    ) -> Tensor:
        for layer in block:
            if isinstance(layer, ResnetBlock2D):
                x = self.run_block(layer, x, embedding)
            elif isinstance(layer, Transformer2DModel):
                x = self.run_block(layer, x, context)
            elif isinstance(layer, Upsample2D):
                x = layer(x, skip_size)
            else:
                x = layer(x)
        return x
