"""HunyuanImage 2.1: the autoencoder, 64 latent channels at a 32nd of the size.

Its residual blocks and its middle are those of the autoencoders of latent diffusion; what differs is how a level halves
or doubles the size: pixels move into channels and back, beside a shortcut without weights. Module paths are the key
names of the original files.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.components.ldm_models import (
    AutoEncoder,
    AutoEncoderParams,
    block_level,
    group_norm,
    middle_blocks,
    run_middle,
)
from library.components.tiling import Tiles
from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.hunyuan_image_names", "load_vae"))

VAE_SCALE_FACTOR = 32
LATENT_SCALING_FACTOR = 0.75289
SAMPLE_SIZE = 384
"""pixels of a side that the autoencoder computes at once when it does so in tiles"""
TILES = Tiles(SAMPLE_SIZE // VAE_SCALE_FACTOR, SAMPLE_SIZE // VAE_SCALE_FACTOR // 4)
PARAMS = AutoEncoderParams(
    ch=128,
    ch_mult=(1, 2, 4, 4, 8, 8),
    num_res_blocks=2,
    z_channels=64,
    scaling_factor=LATENT_SCALING_FACTOR,
    shift_factor=0.0,
)
"""of the released autoencoder"""


def pixels_to_channels(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4C, H/2, W/2]; the place in the square changes slowest."""
    return rearrange(x, "b c (h r1) (w r2) -> b (r1 r2 c) h w", r1=2, r2=2)


def channels_to_pixels(x: Tensor) -> Tensor:
    """[B, 4C, H, W] -> [B, C, 2H, 2W]; the inverse of `pixels_to_channels`."""
    return rearrange(x, "b (r1 r2 c) h w -> b c (h r1) (w r2)", r1=2, r2=2)


def mean_of_groups(x: Tensor, channels: int) -> Tensor:
    """[B, n * channels, H, W] -> [B, channels, H, W], each the mean of n neighbours."""
    return rearrange(x, "b (c n) h w -> b c n h w", c=channels).mean(dim=2)


def repeated(x: Tensor, channels: int) -> Tensor:
    """[B, C, H, W] -> [B, channels, H, W], every channel several times in a row."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class Downsample(nn.Module):
    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.out_width = out_width
        self.conv = nn.Conv2d(in_width, out_width // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return pixels_to_channels(self.conv(x)) + mean_of_groups(pixels_to_channels(x), self.out_width)


class Upsample(nn.Module):
    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.wide = 4 * out_width
        self.conv = nn.Conv2d(in_width, self.wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return channels_to_pixels(self.conv(x)) + channels_to_pixels(repeated(x, self.wide))


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, 2 * z_channels, H / stride, W / stride] (mean and log variance)."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for number, width in enumerate(widths):
            level = block_level(width if number else params.ch, width, params.num_res_blocks, params)
            if number < len(widths) - 1:
                level.downsample = Downsample(width, widths[number + 1])
            self.down.append(level)
        self.mid = middle_blocks(widths[-1], params)
        self.norm_out = group_norm(widths[-1], params)
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        x = run_middle(self.mid, x)
        return self.conv_out(F.silu(self.norm_out(x))) + mean_of_groups(x, self.conv_out.out_channels)


class Decoder(nn.Module):
    """Raw latents [B, z_channels, h, w] -> images [B, out_ch, h * stride, w * stride]. `up` is indexed in the order in
    which it runs."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        widths = params.widths[::-1]
        self.conv_in = nn.Conv2d(params.z_channels, widths[0], 3, padding=1)
        self.mid = middle_blocks(widths[0], params)
        self.up = nn.ModuleList()
        for number, width in enumerate(widths):
            level = block_level(width, width, params.num_res_blocks + 1, params)
            if number < len(widths) - 1:
                level.upsample = Upsample(width, widths[number + 1])
            self.up.append(level)
        self.norm_out = group_norm(widths[-1], params)
        self.conv_out = nn.Conv2d(widths[-1], params.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = run_middle(self.mid, self.conv_in(z) + repeated(z, self.conv_in.out_channels))
        for level in self.up:
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class HunyuanVAE2D(AutoEncoder):
    """The autoencoder; latents that the denoiser sees are those of the posterior times `scaling_factor`."""

    encoder_class = Encoder
    decoder_class = Decoder
    tiles: Tiles | None = None
    """in which it computes larger pictures; None = in one piece"""

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.tiles is None:
            return super().encode_moments(images)
        whole = super().encode_moments
        steps = (self.params.spatial_stride, 1)
        mean, logvar = self.tiles.run(lambda tile: torch.cat(whole(tile), dim=1), images, steps).chunk(2, dim=1)
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        if self.tiles is None:
            return super().decode(latents)
        return self.tiles.run(super().decode, latents, (1, self.params.spatial_stride))

    def set_chunk_rows(self, rows: int | None) -> None:
        """Let the convolutions compute that many rows at a time: less memory, equal results. None = all at once."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.__dict__.pop("forward", None)
                if rows:
                    module.chunk_rows = rows
                    module.forward = types.MethodType(_forward_in_rows, module)


def _forward_in_rows(self: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution (3x3, padding 1) of bands of rows, each with the rows beside it."""
    height = x.shape[-2]
    if height <= self.chunk_rows:
        return self._conv_forward(x, self.weight, self.bias)
    padded = F.pad(x, (1, 1, 1, 1))
    bands = [
        F.conv2d(padded[:, :, top : min(top + self.chunk_rows, height) + 2], self.weight, self.bias)
        for top in range(0, height, self.chunk_rows)
    ]
    return torch.cat(bands, dim=2)
