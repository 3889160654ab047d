"""Layers whose weights are stored in 8 bits and widened for every product."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.safetensors_utils import FP8_DTYPES

FP8_STORAGE = torch.float8_e4m3fn


def _forward_widening(self: nn.Linear, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if self.bias is None else self.bias.to(dtype)
    return F.linear(x.to(dtype), self.weight.to(dtype), bias)


def _convolution_widening(self: nn.Conv2d, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = None if self.bias is None else self.bias.to(dtype)
    return self._conv_forward(x.to(dtype), self.weight.to(dtype), bias)


def shrink_to_fp8(model: nn.Module) -> int:
    """Store the weights of all linear layers and convolutions in 8 bits, without scales; norms, embeddings and biases
    keep their type. Returns the number of layers."""
    count = shrink_linears_to_fp8(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach().to(FP8_STORAGE), requires_grad=False)
            module.forward = types.MethodType(_convolution_widening, module)
            count += 1
    return count


def shrink_linears_to_fp8(model: nn.Module, keep: tuple[str, ...] = ()) -> int:
    """Store the weights of all linear layers in 8 bits, without scales; layers whose own name is in `keep` stay as they
    are.

    Embeddings, norms and biases keep their type. Returns the number of layers that changed.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in keep:
            module.weight = nn.Parameter(module.weight.detach().to(FP8_STORAGE), requires_grad=False)
    return store_linears_in_fp8(model)


def store_linears_in_fp8(model: nn.Module) -> int:
    """Let every linear layer whose weight is stored in 8 bits compute in the type of its input; returns their number.

    The layers stay nn.Linear, so that adapters find them, and the forward is replaced on the layer itself, so that an
    adapter that wraps the layer's forward wraps this one.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype in FP8_DTYPES:
            module.forward = types.MethodType(_forward_widening, module)
            count += 1
    return count


LARGEST_FP8 = 448.0
"""largest number of float8_e4m3fn"""


FP8_BLOCK = 64
"""inputs of a row that share a scale, where scales go by blocks"""


def _forward_scaled(self: nn.Linear, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if self.fp8_scale.ndim == 2:
        output = F.linear(x.to(dtype), unscaled(self.weight, self.fp8_scale).to(dtype))
    else:
        output = F.linear(x.to(dtype), self.weight.to(dtype)) * self.fp8_scale.to(dtype)  # [..., out] times [out]
    return output if self.bias is None else output + self.bias.to(dtype)


def scaled_fp8(weight: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """(weight [out, in] in 8 bits, scales [out] float32): each row divided by its largest absolute value / 448, so that
    rows of any size use the whole range. With `block` each run of so many inputs of a row has a scale of its own,
    [out, in / block], where the inputs are a multiple of it. Scales stay float32: in a format of fewer digits all
    numbers of a block would be off by the same share."""
    full = weight.detach().float()
    if block is None or full.shape[1] % block:
        scale = full.abs().amax(dim=1).clamp_min(1e-12) / LARGEST_FP8
        return (full / scale[:, None]).to(FP8_STORAGE), scale
    blocks = full.unflatten(1, (-1, block))  # [out, in / block, block]
    scale = (blocks.abs().amax(dim=2) / LARGEST_FP8).clamp_min(1e-8)
    return (blocks / scale[:, :, None]).clamp(-LARGEST_FP8, LARGEST_FP8).flatten(1).to(FP8_STORAGE), scale


def unscaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight that `scaled_fp8` stored, float32; of a convolution [out, in, ...] too, whose scales go by rows."""
    if scale.ndim == 2:
        return (weight.float().unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)
    return weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))


def use_scales(layer: nn.Linear, scale: Tensor) -> None:
    """Let a layer whose weight is that of `scaled_fp8` compute with its scales."""
    layer.register_buffer("fp8_scale", scale, persistent=False)
    layer.forward = types.MethodType(_forward_scaled, layer)


def shrink_linears_to_scaled_fp8(model: nn.Module, wanted: Callable[[str], bool]) -> int:
    """Store the weights of the linear layers whose path is `wanted` as `scaled_fp8`. Returns the number of layers."""
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not wanted(name):
            continue
        weight, scale = scaled_fp8(module.weight)
        module.weight = nn.Parameter(weight, requires_grad=False)
        use_scales(module, scale)
        count += 1
    return count
