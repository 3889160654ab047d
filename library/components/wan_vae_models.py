"""The causal video autoencoder of Wan 2.1, which Qwen-Image and Anima use for single images.

Module paths are the key names of the original files. A video goes through in pieces; every convolution over time sees
the last frames of the piece before, kept in a `Stream`. One image is one piece of one frame: what lies before it is
zero, so its convolutions over time shrink to their last tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.device_utils import to_device

HISTORY_FRAMES = 2
"""frames before its own that a convolution over time looks at"""
FIRST_PIECE, PIECE = 1, 4

# per-channel statistics of the 16 latent channels, from the released configuration
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WanVAEParams:
    """Hyper-parameters; the defaults are the released model. `latents_mean` and `latents_std`: one number per
    channel."""

    dim: int = 96
    z_dim: int = 16
    in_channels: int = 3
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries; {len(self.dim_mult) - 1} are needed"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers; the {self.z_dim} latent channels need one each"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.dim * factor for factor in self.dim_mult)

    @property
    def spatial_stride(self) -> int:
        return 2 ** len(self.temporal_downsample)


class Stream(dict[nn.Module, Tensor]):
    """What convolutions over time remember between the pieces of one video. With `home` it waits on the CPU and is
    brought to that device when it is read."""

    def __init__(self, home: torch.device | None = None) -> None:
        super().__init__()
        self.home = home

    def __setitem__(self, module: nn.Module, frames: Tensor) -> None:
        super().__setitem__(module, frames if self.home is None else frames.to("cpu"))

    def before(self, module: nn.Module) -> Tensor | None:
        """The frames that a module has seen before, None at the first piece."""
        frames = self.get(module)
        return frames if frames is None or self.home is None else frames.to(self.home)

    def remember(self, module: nn.Module, frames: Tensor) -> None:
        """Keep the last two frames that a module has seen; fewer than two are filled up with what was kept before."""
        kept = frames[:, :, -HISTORY_FRAMES:]
        before = self.before(module) if kept.shape[2] < HISTORY_FRAMES else None
        self[module] = kept if before is None else torch.cat((before[:, :, -1:], kept), dim=2)


class CausalConv3d(nn.Conv3d):
    """A convolution that looks back in time, never ahead: frames before the first are zero."""

    chunk_rows: int | None = None
    """rows that are computed at once; None = all"""

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        if self.kernel_size[0] == 1:
            return super().forward(x)
        history = stream.before(self) if stream is not None else None
        if stream is not None:
            stream.remember(self, x)
        return self.over(x, history)

    def over(self, x: Tensor, history: Tensor | None) -> Tensor:
        """The convolution of x after `history` (up to two frames; zeros before those)."""
        weight = self.weight
        if history is None and x.shape[2] == 1:
            weight = weight[:, :, -1:]  # the other taps meet zeros
        else:
            missing = HISTORY_FRAMES - (0 if history is None else history.shape[2])
            x = x if history is None else torch.cat((history, x), dim=2)
            x = F.pad(x, (0, 0, 0, 0, missing, 0))
        return self._in_rows(x, weight)

    def _in_rows(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, border = x.shape[3], self.kernel_size[1] // 2
        side = self.kernel_size[2] // 2
        if not self.chunk_rows or rows <= self.chunk_rows:
            return F.conv3d(x, weight, self.bias, padding=(0, border, side))
        padded = F.pad(x, (0, 0, border, border))
        parts = [
            F.conv3d(
                padded[:, :, :, top : min(top + self.chunk_rows, rows) + 2 * border],
                weight,
                self.bias,
                padding=(0, 0, side),
            )
            for top in range(0, rows, self.chunk_rows)
        ]
        return torch.cat(parts, dim=3)


def _conv(in_dim: int, out_dim: int, kernel: int = 3) -> CausalConv3d:
    return CausalConv3d(in_dim, out_dim, kernel)


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels. `gamma` has trailing dimensions of 1, three for video, two for
    images."""

    def __init__(self, dim: int, trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


def _norm_silu_conv(norm: nn.Module, conv: nn.Module, x: Tensor, stream: Stream) -> Tensor:
    return conv(F.silu(norm(x)), stream)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_dim), nn.SiLU(), _conv(in_dim, out_dim),
            ChannelNorm(out_dim), nn.SiLU(), nn.Identity(), _conv(out_dim, out_dim),
        )  # fmt: skip
        self.shortcut = _conv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        hidden = _norm_silu_conv(self.residual[0], self.residual[2], x, stream)
        return self.shortcut(x) + _norm_silu_conv(self.residual[3], self.residual[6], hidden, stream)


class FrameAttention(nn.Module):
    """One-head attention inside each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, trailing=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        frames = _frames(x)  # [BT, C, H, W]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]  # [BT, 1, HW, 3C]
        attended = F.scaled_dot_product_attention(*(part.contiguous() for part in qkv.chunk(3, dim=-1)))
        return x + _video(self.proj(attended[:, 0].transpose(1, 2).unflatten(2, frames.shape[2:])), x.shape[0])


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [BT, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def _video(frames: Tensor, batch_size: int) -> Tensor:
    """[BT, C, H, W] -> [B, C, T, H, W]."""
    return frames.unflatten(0, (batch_size, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Half the rows and columns, and then, where `temporal`, half the frames; the first frame of a video stays
    alone."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        if temporal:
            self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = _video(self.resample(_frames(x)), x.shape[0])
        if not self.temporal:
            return x
        before = stream.before(self)
        stream[self] = x[:, :, -1:]
        return x if before is None else self.time_conv(torch.cat((before, x), dim=2))


class Upsample(nn.Module):
    """Twice the frames, where `temporal` (the first latent frame stays one), then twice the rows and columns."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.temporal:
            if self not in stream:
                stream[self] = x[:, :, :0]  # a mark: the first latent frame passes by and is not remembered
            else:
                even, odd = self.time_conv(x, stream).chunk(2, dim=1)
                x = torch.stack((even, odd), dim=3).flatten(2, 3)  # [B, C, 2T, H, W]
        return _video(self.resample(_frames(x)), x.shape[0])


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


class Encoder(nn.Module):
    def __init__(self, params: WanVAEParams) -> None:
        super().__init__()
        widths = params.widths
        self.conv1 = _conv(params.in_channels, params.dim)
        layers: list[nn.Module] = []
        width = params.dim
        for level, level_width in enumerate(widths):
            for _ in range(params.num_res_blocks):
                layers.append(ResidualBlock(width, level_width))
                width = level_width
            if level < len(widths) - 1:
                layers.append(Downsample(width, params.temporal_downsample[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(width)
        self.head = nn.Sequential(ChannelNorm(width), nn.SiLU(), _conv(width, 2 * params.z_dim))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, stream)
        return _norm_silu_conv(self.head[0], self.head[2], x, stream)


class Decoder(nn.Module):
    def __init__(self, params: WanVAEParams) -> None:
        super().__init__()
        widths = params.widths[::-1]
        width = widths[0]
        self.conv1 = _conv(params.z_dim, width)
        self.middle = _middle(width)
        layers: list[nn.Module] = []
        for level, level_width in enumerate(widths):
            for _ in range(params.num_res_blocks + 1):
                layers.append(ResidualBlock(width, level_width))
                width = level_width
            if level < len(widths) - 1:
                layers.append(Upsample(width, params.temporal_downsample[::-1][level]))
                width //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(ChannelNorm(width), nn.SiLU(), _conv(width, params.in_channels))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.conv1(x, stream)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, stream)
        return _norm_silu_conv(self.head[0], self.head[2], x, stream)


class WanVAE(nn.Module):
    """Autoencoder of images [B, 3, H, W] and videos [B, 3, T, H, W] in -1..1; the rank given is the rank returned."""

    def __init__(self, params: WanVAEParams) -> None:
        super().__init__()
        self.params = params
        self.cache_on_cpu = False
        """what convolutions remember between the pieces of a video waits on the CPU: less memory of the device"""
        self.encoder = Encoder(params)
        self.conv1 = _conv(2 * params.z_dim, 2 * params.z_dim, 1)
        self.conv2 = _conv(params.z_dim, params.z_dim, 1)
        self.decoder = Decoder(params)

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def set_chunk_rows(self, rows: int | None) -> None:
        """Compute convolutions over `rows` rows at a time: less memory, equal results."""
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.chunk_rows = rows

    def _stream(self) -> Stream:
        return Stream(self.device if self.cache_on_cpu else None)

    def encode_mean(self, videos: Tensor) -> Tensor:
        """The posterior mean, not normalised: [B, 3, T, H, W] -> [B, C, (T-1)/4+1, H/8, W/8].

        ValueError when the number of frames is not 1 + a multiple of four.
        """
        frames = videos.shape[2]
        if (frames - FIRST_PIECE) % PIECE:
            raise ValueError(
                f"the video has {frames} frames; 1 + a multiple of {PIECE} is needed, e.g. "
                f"{frames // PIECE * PIECE + 1}"
            )
        stream = self._stream()
        pieces = videos.to(self.dtype).split([FIRST_PIECE, *[PIECE] * ((frames - FIRST_PIECE) // PIECE)], dim=2)
        moments = self.conv1(torch.cat([self.encoder(piece, stream) for piece in pieces], dim=2))
        return moments.chunk(2, dim=1)[0]

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Pixels of latents that are not normalised, not clamped: [B, C, T, h, w] -> [B, 3, 4(T-1)+1, 8h, 8w]."""
        stream = self._stream()
        frames = self.conv2(latents.to(self.dtype)).split(1, dim=2)
        return torch.cat([self.decoder(frame, stream) for frame in frames], dim=2)

    def encode(self, pixels: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Normalised latents (mean - m) / s; the posterior is not sampled, so `seeds` do not matter."""
        if pixels.ndim == 4:
            return self.encode(pixels[:, :, None])[:, :, 0]
        return self.normalize(self.encode_mean(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in -1..1 of normalised latents; one image [B, C, h, w] or a video [B, C, T, h, w]."""
        if latents.ndim == 4:
            return self.decode(latents[:, :, None])[:, :, 0]
        return self.decode_raw(self.denormalize(latents)).clamp(-1, 1)

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, 1, 1, 1)
        return tuple(
            to_device(torch.tensor(values, dtype=latents.dtype), latents.device).view(shape)
            for values in (self.params.latents_mean, self.params.latents_std)
        )
