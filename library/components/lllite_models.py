"""ControlNet-LLLite: small networks that change what goes into attention layers of a U-Net, by a control picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.components.unet_models import UNetBase
from library.core.keyed_random import StepDraws, keyed_generator

PREFIX = "lllite_unet_"
STRIDES = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}
"""depth -> strides of the convolutions that bring the picture to the sides of the feature map"""
PICTURE_CHANNELS = 3
VALUE_RANGE = (-1.0, 1.0)
"""darkest and brightest value of the pictures that networks see"""
_TARGETS = re.compile(
    r"(input_blocks\.(?P<block>\d+)|middle_block)\.\d+\.transformer_blocks\.\d+\.(attn1\.to_[qkv]|attn2\.to_q)"
)


@dataclass(frozen=True)
class LLLiteShape:
    """Sizes of one module. `width` of the layer's input; `strides` of the convolutions; `cond_dim` channels of the
    embedded picture, `mlp_dim` of the inner values."""

    width: int
    strides: tuple[int, ...]
    cond_dim: int
    mlp_dim: int

    @property
    def channels(self) -> list[int]:
        """Into the first convolution and out of each; all but the last have half of `cond_dim`."""
        return [PICTURE_CHANNELS, *[self.cond_dim // 2] * (len(self.strides) - 1), self.cond_dim]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a module, by name."""
        weights: dict[str, tuple[int, ...]] = {
            f"conditioning1.{2 * place}": (self.channels[place + 1], self.channels[place], stride, stride)
            for place, stride in enumerate(self.strides)
        }
        weights["down.0"] = (self.mlp_dim, self.width)
        weights["mid.0"] = (self.mlp_dim, self.mlp_dim + self.cond_dim)
        weights["up.0"] = (self.width, self.mlp_dim)
        biases = {f"{layer}.bias": shape[:1] for layer, shape in weights.items()}
        return {**{f"{layer}.weight": shape for layer, shape in weights.items()}, **biases}


@dataclass
class LLLiteState:
    """What the modules of a network share: the picture [B, 3, H, W] in -1..1 (None = they change nothing), the
    strength, and the draws of the micro-batch."""

    picture: Tensor | None = None
    multiplier: float = 1.0
    draws: StepDraws | None = None


class LLLiteModule(nn.Module):
    """For one linear layer W of input x [R, L, D]: W(x + multiplier * up(mid(cat(conditioning1(picture), down(x))))).

    The picture becomes an embedding of the sides of the feature map, whose places are the tokens of x. With more rows
    R than pictures (one for each branch of the guidance), the pictures are repeated.
    """

    def __init__(self, name: str, layer: nn.Linear, shape: LLLiteShape, state: LLLiteState, dropout: float) -> None:
        super().__init__()
        self.lllite_name = name
        self.shape = shape
        self.dropout = dropout
        self._state = state
        self._layer = (layer,)  # in a tuple, so that its weights are not counted among these
        self._embedding: Tensor | None = None
        channels = shape.channels
        steps: list[nn.Module] = []
        for place, stride in enumerate(shape.strides):
            steps += [nn.ReLU()] if place else []
            steps.append(nn.Conv2d(channels[place], channels[place + 1], stride, stride))
        self.conditioning1 = nn.Sequential(*steps)
        self.down = nn.Sequential(nn.Linear(shape.width, shape.mlp_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(shape.mlp_dim + shape.cond_dim, shape.mlp_dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(shape.mlp_dim, shape.width))
        self._hook = layer.register_forward_pre_hook(self._changed_input, prepend=True)

    @property
    def layer(self) -> nn.Linear:
        return self._layer[0]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Uniform up to 1/sqrt(inputs), as torch starts such layers; `up` is zero with its bias, so that a new module
        changes nothing."""
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = layer.weight[0].numel() ** -0.5
                for parameter in (layer.weight, layer.bias):
                    drawn = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_((2 * drawn - 1) * bound)
        self.up[0].weight.zero_()
        self.up[0].bias.zero_()

    def forget_picture(self) -> None:
        self._embedding = None

    def embedding(self) -> Tensor:
        """The picture as this layer's tokens [B, L, cond_dim]. Without gradients it is kept from step to step; with
        them it is made anew, inside the checkpointed block that the layer stands in."""
        if self._embedding is not None and not torch.is_grad_enabled():
            return self._embedding
        picture = self._fitted(self._state.picture).to(self.conditioning1[0].weight)
        found = rearrange(self.conditioning1(picture), "b c h w -> b (h w) c")
        self._embedding = None if torch.is_grad_enabled() else found
        return found

    def _fitted(self, picture: Tensor) -> Tensor:
        """A picture for whole places: the U-Net rounds up where a side cannot be halved, so that the last place of a
        side stands for pixels beyond it, which are those of the edge."""
        step = math.prod(self.shape.strides)
        below, beside = (-side % step for side in picture.shape[2:])
        return F.pad(picture, (0, beside, 0, below), mode="replicate") if below or beside else picture

    def change(self, x: Tensor) -> Tensor:
        """What is added to x [R, L, D] at a multiplier of 1."""
        condition = self.embedding()
        if len(x) % len(condition):
            raise ValueError(f"{self.lllite_name} sees {len(x)} rows for {len(condition)} pictures; needed: a multiple")
        condition = condition.repeat(len(x) // len(condition), 1, 1)  # [R, L, cond_dim]
        inner = self.mid(torch.cat((condition, self.down(x.to(condition.dtype))), dim=2))  # [R, L, mlp_dim]
        if self.dropout and self.training:
            inner = self._dropped(inner)
        return self.up(inner)

    def _dropped(self, inner: Tensor) -> Tensor:
        """Dropout with a mask keyed by sample, so that ranks, accumulation and recomputed activations see the same."""
        draws = self._state.draws
        if draws is None:  # outside a training run
            return F.dropout(inner, self.dropout)
        drawn = draws.uniform("lllite dropout", inner.shape[1:], self.lllite_name, device=inner.device)
        kept = drawn >= self.dropout  # [B, L, mlp_dim]
        return inner * (kept.to(inner.dtype) / (1 - self.dropout))

    def _changed_input(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before the layer's forward. The sum is formed in the wider number format and rounded once."""
        if self._state.picture is None or self._state.multiplier == 0:
            return None
        [x] = inputs
        change = self.change(x)
        return ((x.to(torch.promote_types(x.dtype, change.dtype)) + change * self._state.multiplier).to(x.dtype),)

    def remove(self) -> None:
        """The layer is as it was."""
        self._hook.remove()


class LLLite(nn.Module):
    """The modules of a U-Net, by their names in files. It changes nothing until it has a picture."""

    def __init__(self, unet: UNetBase, shapes: Mapping[str, LLLiteShape], dropout: float = 0.0) -> None:
        super().__init__()
        self.state = LLLiteState()
        layers = linear_layers(unet)
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.add_module(name, LLLiteModule(name, layers[name], shape, self.state, dropout))

    @property
    def parts(self) -> Iterator[LLLiteModule]:
        return (getattr(self, name) for name in self.names)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def initialize(self, seed: int) -> None:
        """Start values as a function of (seed, name) alone."""
        for part in self.parts:
            part.initialize(keyed_generator(seed, "lllite init", part.lllite_name))

    def set_picture(self, picture: Tensor | None) -> None:
        """Follow a picture [B, 3, H, W] in -1..1 of 8 times the latents' sides from here on; None = none."""
        self.state.picture = picture
        for part in self.parts:
            part.forget_picture()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, the U-Net is as if there were none."""
        before, self.state.multiplier = self.state.multiplier, 0.0
        try:
            yield
        finally:
            self.state.multiplier = before

    def remove(self) -> None:
        for part in self.parts:
            part.remove()


def linear_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Name that a module of a file would have -> the linear layer."""
    return {
        PREFIX + path.replace(".", "_"): layer for path, layer in unet.named_modules() if isinstance(layer, nn.Linear)
    }


def new_shapes(unet: UNetBase, cond_dim: int, mlp_dim: int) -> dict[str, LLLiteShape]:
    """The modules of a new network: query, key and value of self-attention and query of cross-attention, on the way
    down and in the middle. The depth is that of the level: each halves the sides once more."""
    per_level = unet.params.num_res_blocks + 1  # the one that halves included
    found = {}
    for path, layer in unet.named_modules():
        match = _TARGETS.fullmatch(path)
        if match:
            level = len(unet.params.channels) - 1 if match["block"] is None else int(match["block"]) // per_level
            name = PREFIX + path.replace(".", "_")
            found[name] = LLLiteShape(layer.in_features, STRIDES[level + 1], cond_dim, mlp_dim)
    return found


def shape_of_tensors(tensors: Mapping[str, tuple[int, ...]]) -> LLLiteShape:
    """Sizes of a module from the shapes of its tensors in a file. ValueError when these are none of a module."""
    strides = []
    while (weight := tensors.get(f"conditioning1.{2 * len(strides)}.weight")) is not None:
        strides.append(weight[-1])
    last, down = tensors.get(f"conditioning1.{2 * len(strides) - 2}.weight"), tensors.get("down.0.weight")
    if not last or down is None or len(down) != 2:
        raise ValueError(f"its tensors are {', '.join(tensors)}")
    found = LLLiteShape(down[1], tuple(strides), last[0], down[0])
    needed = found.tensors()
    for name in {**needed, **tensors}:
        if needed.get(name) != tensors.get(name):
            told = [list(shapes[name]) if name in shapes else "not there" for shapes in (tensors, needed)]
            raise ValueError(f"{name} is {told[0]}, needed: {told[1]}")
    return found
