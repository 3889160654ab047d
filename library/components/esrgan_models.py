"""RRDBNet, the network of ESRGAN, Real-ESRGAN and BSRGAN files: enlarges pictures.

Source: ESRGAN, arXiv 1809.00219, section 3.1; Real-ESRGAN, arXiv 2107.10833, section 3.3 (pixel unshuffle in front for
factors below 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE, RESIDUAL = 0.2, 0.2
"""of the leaky ReLUs, and the share of what a block adds"""
CONVOLUTIONS = 5
"""of a dense block"""


@dataclass(frozen=True)
class RRDBParams:
    """`width`: channels of the trunk; `growth`: what each convolution of a dense block adds; `doublings`: steps that
    double the sides; `unshuffle`: factor by which sides become channels in front."""

    width: int
    growth: int
    blocks: int
    doublings: int
    unshuffle: int = 1

    @property
    def scale(self) -> int:
        """Sides of a result / sides of the picture."""
        return 2**self.doublings // self.unshuffle


def _convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class DenseBlock(nn.Module):
    """Convolutions that each see the input and what all before them gave."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        for number in range(CONVOLUTIONS):
            out = width if number == CONVOLUTIONS - 1 else growth
            self.add_module(f"conv{number + 1}", _convolution(width + number * growth, out))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for number in range(1, CONVOLUTIONS):
            convolution = self.get_submodule(f"conv{number}")
            found.append(F.leaky_relu(convolution(torch.cat(found, 1)), SLOPE))
        return x + RESIDUAL * self.get_submodule(f"conv{CONVOLUTIONS}")(torch.cat(found, 1))


class ResidualBlock(nn.Module):
    """Three dense blocks, and the input beside them."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(width, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """[B, 3, H, W] in 0..1 -> [B, 3, scale H, scale W], about 0..1. Sides are multiples of `unshuffle`."""

    def __init__(self, params: RRDBParams) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.conv_first = _convolution(3 * params.unshuffle**2, width)
        self.body = nn.ModuleList([ResidualBlock(width, params.growth) for _ in range(params.blocks)])
        self.conv_body = _convolution(width, width)
        self.conv_up = nn.ModuleList([_convolution(width, width) for _ in range(params.doublings)])
        self.conv_hr = _convolution(width, width)
        self.conv_last = _convolution(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(F.pixel_unshuffle(x, self.params.unshuffle))  # [B, width, h, w]
        features = x
        for block in self.body:
            features = block(features)
        x = x + self.conv_body(features)
        for convolution in self.conv_up:
            x = F.leaky_relu(convolution(F.interpolate(x, scale_factor=2, mode="nearest")), SLOPE)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), SLOPE))
