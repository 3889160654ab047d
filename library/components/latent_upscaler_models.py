"""A network that sharpens latents of enlarged images: residual blocks between convolutions, on the latents' own
grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 4
WIDTH, NARROW = 128, 64
BLOCKS, GROUP = 20, 4


def convolution(channels: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, padding=1)


class ResidualBlock(nn.Module):
    """x -> relu(x + norm(conv(relu(norm(conv(x)))))), all [B, WIDTH, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(hidden)))


class LatentUpscaler(nn.Module):
    """Latents of an image that a plain filter enlarged -> those of a sharper one, both [B, 4, h, w]; a new one changes
    nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(LATENT_CHANNELS, WIDTH), nn.BatchNorm2d(WIDTH)
        for number in range(1, BLOCKS + 1):
            self.add_module(f"res{number}", ResidualBlock(WIDTH))
        self.conv2, self.bn2 = convolution(WIDTH, NARROW), nn.BatchNorm2d(NARROW)
        self.conv3, self.bn3 = convolution(NARROW, NARROW), nn.BatchNorm2d(NARROW)
        self.conv_final = nn.Conv2d(NARROW, LATENT_CHANNELS, 1)
        nn.init.zeros_(self.conv_final.weight)
        nn.init.zeros_(self.conv_final.bias)

    def forward(self, latents: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(latents)))  # [B, 128, h, w]
        for first in range(1, BLOCKS + 1, GROUP):
            skipped = x
            for number in range(first, first + GROUP):
                x = self.get_submodule(f"res{number}")(x)
            x = x + skipped
        x = torch.relu(self.bn2(self.conv2(x)))  # [B, 64, h, w]
        x = torch.relu(self.bn3(self.conv3(x)))
        return latents + self.conv_final(x)
