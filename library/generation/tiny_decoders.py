"""Tiny autoencoders that show latents quickly: TAESD of pictures and TAEHV of clips (github.com/madebyollin). Widths
come from the shapes in a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from library.checkpoints.loading import assign_state, build_on_meta
from library.core.errors import CheckpointError
from library.safetensors_utils import load_safetensors

PREFIXES = ("decoder.layers.", "taesd_decoder.", "decoder.", "")
"""before the numbers of the layers; the first is that of diffusers, whose files do not count the bounding of latents"""
FIRST_FRAMES = 3
"""pictures that TAEHV makes before the first of the clip"""


class Bounded(nn.Module):
    """3 tanh(x / 3)."""

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / 3) * 3


def _convolution(inner: int, outer: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, bias=bias)


class Block(nn.Module):
    """ReLU(three convolutions + skip) of [B, C, h, w]. With `remembers` the convolutions see the frame before, too
    (zeros before the first); frames come one after the other, in the batch or from call to call."""

    def __init__(self, inner: int, outer: int, *, remembers: bool = False) -> None:
        super().__init__()
        seen = 2 * inner if remembers else inner
        self.conv = nn.Sequential(
            _convolution(seen, outer), nn.ReLU(), _convolution(outer, outer), nn.ReLU(), _convolution(outer, outer)
        )
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, bias=False)
        self.remembers, self.last = remembers, None

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if self.remembers:
            before = torch.zeros_like(x[:1]) if self.last is None else self.last
            seen, self.last = torch.cat((x, torch.cat((before, x[:-1]))), dim=1), x[-1:]
        return functional.relu(self.conv(seen) + self.skip(x))


class Frames(nn.Module):
    """`count` frames of each: [F, C, h, w] becomes [F * count, C, h, w]."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * count, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyDecoder(nn.Module):
    """`layers` give colours from 0 to 1 of latents as the denoiser has them."""

    def __init__(self, layers: nn.Sequential, channels: int, *, is_clips: bool) -> None:
        super().__init__()
        self.layers, self.channels, self.is_clips = layers, channels, is_clips

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] from 0 to 1 of latents [C, F, h, w]: one for each frame, or 4 F - 3 of a clip; frame by
        frame, so that little is in memory."""
        for layer in self.layers:
            if isinstance(layer, Block):
                layer.last = None
        made = torch.cat([self.layers(frame[None]).float().cpu() for frame in latents.movedim(1, 0)])
        return made[FIRST_FRAMES if self.is_clips else 0 :].clamp(0, 1)


def picture_layers(channels: int, width: int) -> nn.Sequential:
    """The decoder of TAESD."""
    layers: list[nn.Module] = [Bounded(), _convolution(channels, width), nn.ReLU()]
    for _ in range(3):
        layers += [*(Block(width, width) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [_convolution(width, width, bias=False)]
    return nn.Sequential(*layers, Block(width, width), _convolution(width, 3))


def clip_layers(channels: int, widths: tuple[int, int, int, int]) -> nn.Sequential:
    """The decoder of TAEHV."""
    layers: list[nn.Module] = [Bounded(), _convolution(channels, widths[0]), nn.ReLU()]
    for inner, outer, count in zip(widths, widths[1:], (1, 2, 2)):
        layers += [*(Block(inner, inner, remembers=True) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [Frames(inner, count), _convolution(inner, outer, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _convolution(widths[3], 3))


def load_tiny_decoder(path: str) -> TinyDecoder:
    """On the CPU, float32. CheckpointError for a file that is none."""
    state = _numbered(load_safetensors(path))
    try:
        first, is_clips = state["1.weight"], "7.conv.weight" in state
        if is_clips:
            widths = (first.shape[0], *(state[f"{number}.weight"].shape[0] for number in (8, 14, 20)))
            build = lambda: clip_layers(first.shape[1], widths)  # noqa: E731
        else:
            build = lambda: picture_layers(first.shape[1], first.shape[0])  # noqa: E731
        layers = build_on_meta(build)
        wanted = layers.state_dict()
        if is_clips:  # some make more frames of each, of which the last ones count
            for number in (7, 13, 19):
                key = f"{number}.conv.weight"
                state[key] = state[key][-wanted[key].shape[0] :]
        fits = all(key in state and state[key].shape == tensor.shape for key, tensor in wanted.items())
    except (KeyError, IndexError):
        fits = False
    if not fits:
        raise CheckpointError(
            f"{path} is no tiny autoencoder; needed: the decoder of TAESD (taesd_decoder, taesdxl_decoder, taesd3_decoder,"
            " taef1_decoder) or of TAEHV (taehv, taew2_1)"
        )
    assign_state(layers, {key: state[key].float() for key in wanted})
    return TinyDecoder(layers.eval().requires_grad_(False), first.shape[1], is_clips=is_clips)


def _numbered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by `<number of the layer>.<name>`, counted from the bounding of latents."""
    for prefix in PREFIXES:
        found = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        found = {key: value for key, value in found.items() if key.partition(".")[0].isdigit()}
        if found and "0.weight" in found:
            return {f"{int(key.partition('.')[0]) + 1}.{key.partition('.')[2]}": found[key] for key in found}
        if found:
            return found
    return {}
