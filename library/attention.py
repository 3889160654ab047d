"""Attention, rotary positions and time embeddings shared by the denoisers."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library.components.attention_backends import END_TO_END, KERNELS, by_sample
from library.components.packed_tokens import SampleVectors, Segments
from library.core.attention_modes import AttentionChoice


def scaled_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | Segments | None = None,
    choice: AttentionChoice = AttentionChoice(),
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for [B, heads, L, D]; `key_mask` [B, L], true or 1 = attend, or which tokens of a row
    of several samples attend to which. Returns [B, L, heads * D].

    Query and key may come in float32 (from norms and rotations); they are rounded to the type of `value` here.
    """
    if isinstance(key_mask, Segments):
        query, key = query.to(value.dtype), key.to(value.dtype)
        if choice.mode in END_TO_END and not choice.split and not key_mask.has_masks:
            return key_mask.attend_at_once(END_TO_END[choice.mode], query, key, value)
        return key_mask.attend(functools.partial(scaled_attention, choice=choice), query, key, value)
    mask = None if key_mask is None else key_mask.bool()
    states, kernel = (query.to(value.dtype), key.to(value.dtype), value), KERNELS[choice.mode]
    attended = by_sample(kernel, *states, mask) if choice.split else kernel(*states, mask)  # [B, L, heads, D]
    return attended.flatten(2)


class AttentionModule(nn.Module):
    """A module whose forward computes attention, in the way that is chosen for its model (`use_attention`)."""

    attention_choice = AttentionChoice()

    def scaled_attention(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | Segments | None = None
    ) -> Tensor:
        return scaled_attention(query, key, value, key_mask, self.attention_choice)


def use_attention(model: nn.Module, choice: AttentionChoice) -> int:
    """Let every AttentionModule of a model compute in this way; returns their number."""
    found = [module for module in model.modules() if isinstance(module, AttentionModule)]
    for module in found:
        module.attention_choice = choice
    return len(found)


def in_heads(states: Tensor, num_heads: int) -> Tensor:
    """[B, L, heads * D] as [B, heads, L, D], a view."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def split_query_key_value(joined: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, L, 3 * heads * D] -> three of [B, heads, L, D], views. They are cut where they lie side by side, so that the
    backward pass writes their gradients side by side, in one pass."""
    query, key, value = joined.unflatten(-1, (3 * num_heads, -1)).split(num_heads, dim=2)  # [B, L, heads, D]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def joined_along_tokens(*states: Tensor) -> Tensor:
    """Several of [B, heads, L, D] as one with all their tokens, laid out in memory as [B, L, heads, D], which is how
    projections leave them: whole rows are copied."""
    return torch.cat([part.transpose(1, 2) for part in states], dim=1).transpose(1, 2)


class DeviceTables:
    """Small tables that are computed on the CPU, so that every device gets the same numbers and needs no type that it
    lacks (MPS and some XPUs have no float64), and are kept on the devices that use them: the last `kept` of them."""

    def __init__(self, kept: int = 32) -> None:
        self.kept = kept
        self._tables: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tables of `key` on `device`; `make` computes them on the CPU where they are not there."""
        place = (key, str(device))
        if place not in self._tables:
            with torch.no_grad(), torch.inference_mode(False):  # made while sampling, they serve in training too
                self._tables[place] = tuple(table.to(device) for table in make())
            while len(self._tables) > self.kept:
                self._tables.popitem(last=False)
        self._tables.move_to_end(place)
        return self._tables[place]


def rope_cos_sin(
    positions: Tensor, axes_dim: Sequence[int], theta: float, first_axis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary angles position * theta^(-2i/d) for each axis, axes side by side. `first_axis`
    [d / 2]: frequencies of the first axis in the place of these.

    `positions` [B, L, axes]; each result [B, L, sum(axes_dim) / 2] in float32 and on the CPU, computed in float64
    because angles of large positions lose digits otherwise.
    """
    positions, angles = positions.cpu(), []
    for axis, width in enumerate(axes_dim):
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        frequencies = theta**-exponents if axis or first_axis is None else first_axis.double()
        angles.append(positions[..., axis, None].to(torch.float64) * frequencies)
    joined = torch.cat(angles, dim=-1)
    return joined.cos().float(), joined.sin().float()


TURNS_IN_CLIP = 0.9
"""of a frequency of time that RifleX slows down, over all latent frames of a clip"""


def riflex_frequencies(width: int, theta: float, index: int, frames: int) -> Tensor | None:
    """[width / 2] float64: the frequencies of the axis of time, the one with this number (from 1 on) so slow that it
    does not come round within `frames` latent frames; None for index 0. ValueError when there is no such frequency.

    Source: arXiv 2502.15894, section 4.2.
    """
    if not index:
        return None
    if index > width // 2:
        raise ValueError(f"riflex_index is {index}; the model has {width // 2} frequencies of time")
    frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    frequencies[index - 1] = TURNS_IN_CLIP * 2 * math.pi / frames
    return frequencies


def rotate_pairs(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (2i, 2i+1) of `states` [B, heads, L, D] by the angles of `rope` ([B or 1, L, D/2] each); float32
    result."""
    cos, sin = rope[0][:, None], rope[1][:, None]  # [B, 1, L, D/2]
    pairs = states.float().unflatten(-1, (-1, 2))  # [B, heads, L, D/2, 2]
    if torch.compiler.is_compiling():  # it fuses these, and has no complex numbers
        first, second = pairs.unbind(-1)
        return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    return torch.view_as_real(as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)  # one kernel


def as_complex(pairs: Tensor) -> Tensor:
    """Real and imaginary parts [..., 2] as complex numbers [...]; without a copy where they lie in memory as such."""
    *outer, inner = pairs.stride()
    is_fit = inner == 1 and pairs.storage_offset() % 2 == 0 and not any(stride % 2 for stride in outer)
    return torch.view_as_complex(pairs if is_fit else pairs.clone(memory_format=torch.contiguous_format))


def rotate_halves(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D/2) of `states` [B, heads, L, D] by the angles of `rope` ([L, D] each, halves repeated);
    float32 result."""
    cos, sin = rope
    full = states.float()
    first, second = full.chunk(2, dim=-1)
    return full * cos + torch.cat((-second, first), dim=-1) * sin


def timestep_embedding(timesteps: Tensor, width: int, time_factor: float = 1000.0) -> Tensor:
    """[cos(t w) | sin(t w)] with w_k = 10000^(-k / (width/2)), t = timesteps * time_factor. [B, ...] -> [B, ...,
    width], float32."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = (timesteps.float() * time_factor)[..., None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def per_token(vec: Tensor) -> Tensor:
    """[B, D] as [B, 1, D], for all tokens alike; [B, L, D] as it is."""
    return vec[:, None] if vec.ndim == 2 else vec


def of_tokens(project: Callable[[Tensor], Tensor], vec: Tensor | SampleVectors) -> Tensor:
    """What a layer makes of vectors [B, D] or [B, L, D], for each token: [B, 1 or L, ...]."""
    return vec.through(project) if isinstance(vec, SampleVectors) else per_token(project(vec))


def of_text(vec: Tensor | SampleVectors) -> Tensor | SampleVectors:
    """The vector [B, D] of text tokens, which have no time of their own: the mean of those of the image tokens."""
    if isinstance(vec, SampleVectors):
        return vec.of_text()
    return vec if vec.ndim == 2 else vec.mean(dim=1)


def of_joined_tokens(vec: Tensor, num_text: int, *, text_first: bool = True) -> Tensor:
    """The vectors of text and image tokens together [B, T + L, D]; one for all [B, D] stays."""
    if vec.ndim == 2:
        return vec
    text = of_text(vec)[:, None].expand(-1, num_text, -1)
    return torch.cat((text, vec) if text_first else (vec, text), dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * x + shift, rounded once."""
    return torch.addcmul(shift, 1 + scale, x)


class _RmsNormed(torch.autograd.Function):
    """Keeps its input in the type in which it came, where autograd would keep it in float32 and pass over it twice as
    often."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        full = x.float()
        factors = full.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factors)
        return full * factors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, factors = ctx.saved_tensors
        normed = x.float() * factors
        along = (gradient * normed).mean(dim=-1, keepdim=True)  # a change of the length changes nothing
        return torch.addcmul(gradient, normed, along, value=-1).mul_(factors).to(x.dtype), None


def rms_normed(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, float32."""
    return _RmsNormed.apply(x, eps)


def plain_norm(width: int) -> nn.LayerNorm:
    """A norm without weights of its own, which a modulation follows."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class FinalLayer(nn.Module):
    """The last layer of a denoiser: a norm that the time modulates, and a projection to what a token holds."""

    def __init__(self, hidden: int, out_width: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(hidden)
        self.linear = nn.Linear(hidden, out_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x [B, L, hidden] -> [B, L, out_width]; vec [B, hidden] or [B, L, hidden]."""
        shift, scale = per_token(self.adaLN_modulation(vec)).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def never_empty(mask: Tensor) -> Tensor:
    """A mask [B, L] of keys as booleans; a row without any attends to its first, as softmax over nothing is no
    number."""
    mask = mask.bool()
    first = torch.zeros_like(mask)
    first[:, 0] = ~mask.any(dim=1)
    return mask | first
