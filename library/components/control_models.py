"""What ControlNets of all families have in common: pictures that guide a denoiser, and what is added to its features.

A net is called as its denoiser is, with the picture before the other inputs, and gives one residual for each place of
the denoiser where something can be added. Source: "Adding Conditional Control to Text-to-Image Diffusion Models",
arXiv 2302.05543.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GuidedBy:
    """A net with its picture [B or 1, 3, H, W], in the range that the net has learned with, and its strength.

    Where a denoiser has more places than the net has residuals, place n gets residual n mod their number; with
    `repeats` False neighbours share one, place n that of n // ceil(places / residuals).
    """

    net: nn.Module
    picture: Tensor
    multiplier: float = 1.0
    repeats: bool = True

    def residuals(self, places: int, sample: Tensor, *inputs: object) -> list[Tensor]:
        """One for each place. `sample` [R, ...] may hold several branches of B samples, one after the other."""
        picture = self.picture.to(sample.device)
        picture = picture.repeat(len(sample) // len(picture), 1, 1, 1)  # [R, 3, H, W]
        found = self.net(picture, sample, *inputs)
        together = math.ceil(places / len(found))
        numbers = [place % len(found) if self.repeats else place // together for place in range(places)]
        return [found[number] if self.multiplier == 1.0 else found[number] * self.multiplier for number in numbers]


@dataclass(frozen=True)
class Control:
    """All that guides one forward of a denoiser."""

    parts: tuple[GuidedBy, ...]

    def residuals(self, places: int, *inputs: object) -> list[Tensor]:
        """The sums over all nets, one for each place; `inputs` are those of the denoiser."""
        return [sum(each[1:], each[0]) for each in zip(*(part.residuals(places, *inputs) for part in self.parts))]


class HintConvolutions(nn.Module):
    """A picture [B, 3, H, W] becomes features [B, out_width, H / 8, W / 8]: `channels` of its levels from the first to
    the last, with SiLU between the convolutions."""

    def __init__(self, channels: Sequence[int], out_width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in zip(channels[:-1], channels[1:]):
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1))
            self.blocks.append(nn.Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(channels[-1], out_width, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for convolution in self.blocks:
            x = F.silu(convolution(x))
        return self.conv_out(x)


def start_values(shapes: Iterable[tuple[str, Tensor]], generator: torch.Generator) -> dict[str, Tensor]:
    """name -> float32 start values of layers that are neither copied nor zero, as torch starts linear layers and
    convolutions: uniform within 1 / sqrt(inputs). `shapes`: (name, tensor) pairs, a bias after its weight."""
    found: dict[str, Tensor] = {}
    inputs = 1
    for name, tensor in shapes:
        inputs = tensor[0].numel() if tensor.ndim > 1 else inputs
        found[name] = (torch.rand(tensor.shape, generator=generator) * 2 - 1) / math.sqrt(inputs)
    return found
