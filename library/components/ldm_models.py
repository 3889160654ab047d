"""The autoencoder of latent diffusion models (Stable Diffusion 1 and 2, SDXL, FLUX.1, SD3): images <-> latents.

Module paths are the key names of the original files; leaf layers are plain nn.Conv2d, so that other code finds them by
name and class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.attention import scaled_attention
from library.device_utils import to_like


@dataclass(frozen=True, kw_only=True)
class AutoEncoderParams:
    """Hyper-parameters of the autoencoder; the defaults are the 16-channel one of FLUX.1.

    Latents seen by the denoiser are (z - shift_factor) * scaling_factor. `quant_conv`: 1x1 convolutions between the
    latents and both halves, as the 4-channel one of SD1, SD2 and SDXL has them.
    """

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    quant_conv: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups is {self.norm_groups}; it must divide every width, among them {width}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.ch * multiplier for multiplier in self.ch_mult)

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


def group_norm(width: int, params: AutoEncoderParams) -> nn.GroupNorm:
    return nn.GroupNorm(params.norm_groups, width, eps=params.norm_eps)


class ResnetBlock(nn.Module):
    def __init__(self, in_width: int, out_width: int, params: AutoEncoderParams) -> None:
        super().__init__()
        self.norm1 = group_norm(in_width, params)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = group_norm(out_width, params)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        if in_width != out_width:
            self.nin_shortcut = nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + hidden


class AttnBlock(nn.Module):
    """Attention with one head over all positions; 1x1 convolutions as projections."""

    def __init__(self, width: int, params: AutoEncoderParams) -> None:
        super().__init__()
        self.norm = group_norm(width, params)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # Dense: of transposed states torch would make the whole matrix of scores, [HW, HW].
        query, key, value = (
            rearrange(layer(normed), "b c h w -> b 1 (h w) c").contiguous() for layer in (self.q, self.k, self.v)
        )
        attended = scaled_attention(query, key, value)  # [B, HW, C]
        return x + self.proj_out(rearrange(attended, "b (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle_blocks(width: int, params: AutoEncoderParams) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResnetBlock(width, width, params)
    middle.attn_1 = AttnBlock(width, params)
    middle.block_2 = ResnetBlock(width, width, params)
    return middle


def run_middle(middle: nn.Module, x: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(x)))


def block_level(in_width: int, out_width: int, num_blocks: int, params: AutoEncoderParams) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(
        ResnetBlock(in_width if number == 0 else out_width, out_width, params) for number in range(num_blocks)
    )
    return level


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, 2 * z_channels, H / stride, W / stride] (mean and log variance)."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for number, (in_width, out_width) in enumerate(zip((params.ch, *widths), widths)):
            level = block_level(in_width, out_width, params.num_res_blocks, params)
            if number < len(widths) - 1:
                level.downsample = Downsample(out_width)
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
        return self.conv_out(F.silu(self.norm_out(run_middle(self.mid, x))))


class Decoder(nn.Module):
    """Raw latents [B, z_channels, h, w] -> images [B, out_ch, h * stride, w * stride]. `up` is indexed by level: the
    last one runs first."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], 3, padding=1)
        self.mid = middle_blocks(widths[-1], params)
        self.up = nn.ModuleList()
        for number, out_width in enumerate(widths):
            in_width = widths[min(number + 1, len(widths) - 1)]
            level = block_level(in_width, out_width, params.num_res_blocks + 1, params)
            if number > 0:
                level.upsample = Upsample(out_width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0], params)
        self.conv_out = nn.Conv2d(widths[0], params.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = run_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoEncoder(nn.Module):
    """Images in -1..1 <-> latents as the denoiser sees them. A subclass may have halves of another kind."""

    encoder_class: ClassVar[Callable[[AutoEncoderParams], nn.Module]] = Encoder
    decoder_class: ClassVar[Callable[[AutoEncoderParams], nn.Module]] = Decoder
    convolution: ClassVar[type[nn.Module]] = nn.Conv2d

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = self.encoder_class(params)
        self.decoder = self.decoder_class(params)
        if params.quant_conv:
            self.quant_conv = self.convolution(2 * params.z_channels, 2 * params.z_channels, 1)
            self.post_quant_conv = self.convolution(params.z_channels, params.z_channels, 1)

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (held to -30..20) of the raw latents, each [B, C, H / stride, W / stride]."""
        moments = self.encoder(images.to(self.device, self.dtype))
        if self.params.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Scaled latents of images [B, 3, H, W]; see `encode_raw`."""
        return self.scale(self.encode_raw(images, seeds))

    def encode_raw(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Latents without scale and shift: a posterior sample with one seed per image, or the mean without seeds.

        The noise of an image depends on its seed and its latent size alone, not on its place in the batch.
        """
        mean, logvar = self.encode_moments(images)
        if seeds is not None:
            if len(seeds) != len(mean):
                raise ValueError(f"there are {len(seeds)} seeds for {len(mean)} images; one per image is needed")
            noise = [torch.randn(mean.shape[1:], generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
            mean = mean + (0.5 * logvar).exp() * to_like(torch.stack(noise), mean)
        return mean

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about -1..1, of scaled latents [B, C, h, w]."""
        raw = self.unscale(latents.to(self.device, self.dtype))
        return self.decoder(self.post_quant_conv(raw) if self.params.quant_conv else raw)

    def scale(self, raw_latents: Tensor) -> Tensor:
        return (raw_latents - self.params.shift_factor) * self.params.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        return latents / self.params.scaling_factor + self.params.shift_factor
