"""The ControlNet of a U-Net: a copy of its way down and middle that also sees a picture, and gives what is added to the
skip connections and to the middle. Its module tree carries diffusers names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.components.control_models import HintConvolutions
from library.components.unet_encoder_models import TimeEmbedding, UNetEncoder, levels_down, middle_of, skip_widths
from library.components.unet_models import UNetParams, contexts_of

HINT_CHANNELS = (16, 32, 96, 256)
"""widths of the convolutions that a new net reads its picture with"""


class UNetControlNet(UNetEncoder):
    """`params` are those of the U-Net that it guides; `hint_channels`: widths of the convolutions over the picture."""

    def __init__(self, params: UNetParams, hint_channels: Sequence[int] = HINT_CHANNELS) -> None:
        super().__init__(params)
        widths = skip_widths(params)
        self.hint_channels = tuple(hint_channels)
        self.conv_in = nn.Conv2d(params.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(params.channels[0], params.time_embed_dim)
        vector = params.adm_in_channels
        self.add_embedding = None if vector is None else TimeEmbedding(vector, params.time_embed_dim)
        self.controlnet_cond_embedding = HintConvolutions(self.hint_channels, widths[0])
        self.down_blocks = levels_down(params)
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        self.mid_block = middle_of(params)
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def forward(
        self, picture: Tensor, sample: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None
    ) -> list[Tensor]:
        """picture [B, 3, 8H, 8W] in 0..1 beside the inputs of the U-Net: sample [B, 4, H, W], timesteps [B], context
        [B, L, D], y [B, V] where it has a vector. One residual for each skip connection, then that of the middle."""
        contexts = contexts_of(context.to(self.dtype), self.params)
        embedding = self.time_embedding(self.time_vector(timesteps, sample).to(self.dtype))  # [B, time_embed_dim]
        if self.add_embedding is not None:
            embedding = embedding + self.add_embedding(y.to(self.dtype))
        x = self.conv_in(sample.to(self.dtype)) + self.controlnet_cond_embedding(picture.to(self.dtype))
        x, skips = self.way_down(x, embedding, contexts, timesteps)
        x = self.through_middle(x, embedding, contexts)
        return [*(zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips)), self.controlnet_mid_block(x)]
