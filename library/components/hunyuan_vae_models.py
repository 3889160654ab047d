"""The causal video autoencoder that models of clips by Hunyuan have: 16 latent channels, an eighth of the size, a
quarter of the frames. A picture is a clip of one frame.

Module paths are the key names of the original files, which are those of diffusers. Convolutions look back in time and
never ahead; before the first frame lies that frame again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.components.ldm_models import AutoEncoder
from library.components.tiling import Tiles

LATENT_SCALING_FACTOR = 0.476986
LATENT_CHANNELS = 16
SPATIAL_STRIDE, TEMPORAL_STRIDE = 8, 4


@dataclass(frozen=True, kw_only=True)
class VideoAutoEncoderParams:
    """Hyper-parameters; the defaults are the released model. Latents that a denoiser sees are those of the posterior
    times `scaling_factor`."""

    in_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = LATENT_CHANNELS
    norm_num_groups: int = 32
    time_compression_ratio: int = TEMPORAL_STRIDE
    spatial_compression_ratio: int = SPATIAL_STRIDE
    mid_block_add_attention: bool = True
    scaling_factor: float = LATENT_SCALING_FACTOR

    quant_conv = True
    shift_factor = 0.0
    norm_eps = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups is {self.norm_num_groups}; it must divide every width, among them {width}"
                )
        for name in ("time_compression_ratio", "spatial_compression_ratio"):
            ratio = getattr(self, name)
            if ratio != 2 ** round(math.log2(ratio)) or ratio > 2 ** (len(self.block_out_channels) - 1):
                raise ValueError(
                    f"{name} is {ratio}; {len(self.block_out_channels)} levels need a power of two up to"
                    f" {2 ** (len(self.block_out_channels) - 1)}"
                )

    @property
    def z_channels(self) -> int:
        return self.latent_channels

    @property
    def spatial_stride(self) -> int:
        return self.spatial_compression_ratio

    def stride(self, level: int) -> tuple[int, int, int]:
        """How many times fewer frames, rows and columns the encoder has after a level, the decoder more: the first
        levels change the size, the last ones but one the frames."""
        last = len(self.block_out_channels) - 1
        space = 2 if level < math.log2(self.spatial_compression_ratio) else 1
        time = 2 if last - math.log2(self.time_compression_ratio) <= level < last else 1
        return time, space, space


class CausalConv3d(nn.Module):
    """A convolution that looks back in time: the first frame and the borders of each frame are repeated outwards."""

    chunk_frames: int | None = None
    """frames of the result that are computed at once; None = all"""

    def __init__(
        self, in_width: int, out_width: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_width, out_width, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, C', F / stride (rounded up), H', W']."""
        kernel, side = self.conv.kernel_size[0], self.conv.kernel_size[1] // 2
        step, before = self.conv.stride[0], kernel - 1
        frames = -(-x.shape[2] // step)
        size = self.chunk_frames or frames
        chunks = []
        for start in range(0, frames, size):
            # frames of the input from the first to the last that these frames of the result see
            first, last = start * step - before, (min(start + size, frames) - 1) * step
            seen = x[:, :, max(first, 0) : last + 1]
            padding = (side, side, side, side, max(-first, 0), 0)
            chunks.append(self.conv(F.pad(seen, padding, mode="replicate") if any(padding) else seen))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def _group_norm(width: int, params: VideoAutoEncoderParams) -> nn.GroupNorm:
    return nn.GroupNorm(params.norm_num_groups, width, eps=params.norm_eps)


class ResnetBlock(nn.Module):
    def __init__(self, in_width: int, out_width: int, params: VideoAutoEncoderParams) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_width, params)
        self.conv1 = CausalConv3d(in_width, out_width)
        self.norm2 = _group_norm(out_width, params)
        self.conv2 = CausalConv3d(out_width, out_width)
        if in_width != out_width:
            self.conv_shortcut = CausalConv3d(in_width, out_width, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class CausalAttention(nn.Module):
    """Attention with one head; a frame sees itself and those before it."""

    def __init__(self, width: int, params: VideoAutoEncoderParams) -> None:
        super().__init__()
        self.group_norm = _group_norm(width, params)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> the same."""
        places = x.shape[3] * x.shape[4]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, F * H * W, C]
        query, key, value = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        frames = [  # frame by frame there is no mask of all pairs, whose size is the square of the clip's
            F.scaled_dot_product_attention(query[:, :, end - places : end], key[:, :, :end], value[:, :, :end])
            for end in range(places, places * x.shape[2] + 1, places)
        ]
        attended = self.to_out[0](torch.cat(frames, dim=2)[:, 0])  # [B, F * H * W, C]
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])


class MiddleBlock(nn.Module):
    def __init__(self, width: int, params: VideoAutoEncoderParams) -> None:
        super().__init__()
        attentions = [CausalAttention(width, params)] if params.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(ResnetBlock(width, width, params) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Residual blocks, and what changes the size after them: `downsamplers` or `upsamplers`."""

    def __init__(self, in_width: int, out_width: int, blocks: int, params: VideoAutoEncoderParams) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(in_width if number == 0 else out_width, out_width, params) for number in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for change in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = change(x)
        return x


class Downsample(nn.Module):
    def __init__(self, width: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """The nearest value, repeated. The first frame stays one, as it was alone before."""

    def __init__(self, width: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time, rows, columns = self.factor
        if time > 1:
            x = torch.cat((x[:, :, :1], x[:, :, 1:].repeat_interleave(time, dim=2)), dim=2)
        return self.conv(x.repeat_interleave(rows, dim=3).repeat_interleave(columns, dim=4))


class Encoder(nn.Module):
    """Clips [B, 3, F, H, W] -> [B, 2 * latent_channels, F', h, w] (mean and log variance)."""

    def __init__(self, params: VideoAutoEncoderParams) -> None:
        super().__init__()
        widths = params.block_out_channels
        self.conv_in = CausalConv3d(params.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for number, (before, width) in enumerate(zip((widths[0], *widths), widths)):
            level = Level(before, width, params.layers_per_block, params)
            if max(params.stride(number)) > 1:
                level.downsamplers = nn.ModuleList([Downsample(width, params.stride(number))])
            self.down_blocks.append(level)
        self.mid_block = MiddleBlock(widths[-1], params)
        self.conv_norm_out = _group_norm(widths[-1], params)
        self.conv_out = CausalConv3d(widths[-1], 2 * params.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Raw latents [B, latent_channels, F', h, w] -> clips [B, 3, F, H, W]. `up_blocks` run in their order."""

    def __init__(self, params: VideoAutoEncoderParams) -> None:
        super().__init__()
        widths = params.block_out_channels[::-1]
        self.conv_in = CausalConv3d(params.latent_channels, widths[0])
        self.up_blocks = nn.ModuleList()
        for number, (before, width) in enumerate(zip((widths[0], *widths), widths)):
            level = Level(before, width, params.layers_per_block + 1, params)
            if max(params.stride(number)) > 1:
                level.upsamplers = nn.ModuleList([Upsample(width, params.stride(number))])
            self.up_blocks.append(level)
        self.mid_block = MiddleBlock(widths[0], params)
        self.conv_norm_out = _group_norm(widths[-1], params)
        self.conv_out = CausalConv3d(widths[-1], params.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class CausalVideoVAE(AutoEncoder):
    """Autoencoder of pictures [B, 3, H, W] and clips [B, 3, F, H, W] in -1..1, F = 1 + a multiple of the temporal
    stride; the rank given is the rank returned."""

    encoder_class, decoder_class, convolution = Encoder, Decoder, nn.Conv3d
    params: VideoAutoEncoderParams
    tiles: Tiles | None = None
    """in which it computes larger frames; None = in one piece"""

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (held to -30..20) of the raw latents, each [B, C, F', h, w], of pictures [B, C, h, w].

        ValueError when the number of frames is not 1 + a multiple of the temporal stride.
        """
        if images.ndim == 4:
            mean, logvar = self.encode_moments(images[:, :, None])
            return mean[:, :, 0], logvar[:, :, 0]
        frames, step = images.shape[2], self.params.time_compression_ratio
        if (frames - 1) % step:
            near = (frames - 1) // step * step + 1
            raise ValueError(f"the clip has {frames} frames; 1 + a multiple of {step} is needed, e.g. {near}")
        if self.tiles is None:
            return super().encode_moments(images)
        whole = super().encode_moments
        steps = (self.params.spatial_stride, 1)
        return self.tiles.run(lambda tile: torch.cat(whole(tile), dim=1), images, steps).chunk(2, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, about -1..1, of scaled latents [B, C, F', h, w], of pictures [B, C, h, w]."""
        if latents.ndim == 4:
            return self.decode(latents[:, :, None])[:, :, 0]
        if self.tiles is None:
            return super().decode(latents)
        return self.tiles.run(super().decode, latents, (1, self.params.spatial_stride))

    def set_tile_size(self, pixels: int | None) -> None:
        """Compute frames with longer sides in tiles of that many pixels a side, of which neighbours share a quarter:
        the memory of a tile, close results. None = in one piece."""
        side = None if pixels is None else pixels // self.params.spatial_stride
        self.tiles = None if side is None else Tiles(side, side // 4)

    def set_chunk_frames(self, frames: int | None) -> None:
        """Let the convolutions compute that many frames at a time: less memory, equal results. None = all at once."""
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.chunk_frames = frames


def scaled_latents(latents: Tensor, factor: float = LATENT_SCALING_FACTOR) -> Tensor:
    """What a denoiser sees of stored latents: times the factor, a picture [B, C, h, w] as a clip of one frame
    [B, C, 1, h, w]."""
    return (latents[:, :, None] if latents.ndim == 4 else latents) * factor
