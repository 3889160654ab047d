"""Layers whose weights are stored in fewer bits (`library.checkpoints.weight_forms`) and widened for every product.

A layer stays what it is, nn.Linear or nn.Conv2d, so that adapters find it; its forward is replaced on the layer itself,
so that an adapter that wraps the layer's forward wraps this one. `weight` is a parameter without gradient and
`weight_scale` a buffer, so that both move with the model.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.checkpoints.weight_forms import (
    FP8,
    FP8_BLOCK,
    FP8_SCALED,
    FP8_STORAGE,
    StoredWeight,
    scaled_fp8,
    stored,
    unscaled,
    widened,
)
from library.device_utils import described
from library.safetensors_utils import FP8_DTYPES

__all__ = [
    "FP8_BLOCK", "FP8_STORAGE", "can_multiply_fp8", "fp8_product_problem", "hold", "multiply_in_float32",
    "multiply_in_fp8", "scaled_fp8",
    "set_weight", "shrink_linears_to_fp8", "shrink_to_fp8", "store_layers", "store_linears_in_fp8", "stored_of",
    "unscaled", "weight_of", "weight_shape",
]  # fmt: skip

CAST_INPUTS = ("wo",)
"""layers whose input models of transformers cast to the type of their weight, which must not be 8-bit floats then"""


# -- what a layer holds ------------------------------------------------------------------------------------------------


def hold(layer: nn.Module, weight: StoredWeight) -> None:
    """Let a layer hold this weight and compute with it."""
    layer.weight = nn.Parameter(weight.data, requires_grad=False)
    layer.register_buffer("weight_scale", weight.scale, persistent=False)
    layer.weight_form, layer.full_shape = weight.form, weight.shape
    layer.multiplies_fp8 = layer.multiplies_in_float32 = False
    forward = _linear if isinstance(layer, nn.Linear) else _convolution
    layer.forward = types.MethodType(forward, layer)


def stored_of(layer: nn.Module) -> StoredWeight | None:
    """The weight that a layer holds in fewer bits; None for one that holds it as it is computed with."""
    form = getattr(layer, "weight_form", None)
    return None if form is None else StoredWeight(form, layer.weight.detach(), layer.weight_scale, layer.full_shape)


def weight_of(layer: nn.Module, name: str = "weight") -> Tensor:
    """The weight of a layer; one in fewer bits is widened to float32."""
    own = stored_of(layer) if name == "weight" else None
    return getattr(layer, name) if own is None else own.widened()


def weight_shape(layer: nn.Module) -> torch.Size:
    """[out, in, ...] of a layer's weight, however it is stored."""
    return getattr(layer, "full_shape", None) or layer.weight.shape


def set_weight(layer: nn.Module, wide: Tensor) -> None:
    """Give a layer that holds its weight in fewer bits another one, in the same form and with as many scales."""
    own = stored_of(layer)
    block = None if own.scale is None or own.scale.ndim == 1 else own.shape[1:].numel() // own.scale.shape[1]
    new = stored(wide, own.form, block)
    layer.weight.data.copy_(new.data)
    if new.scale is not None:
        layer.weight_scale.copy_(new.scale)


# -- storing -----------------------------------------------------------------------------------------------------------


def store_layers(
    model: nn.Module, form: str, *, wanted: Callable[[str], bool] = lambda path: True, block: int | None = None,
    device: torch.device | str | None = None, convolutions: bool = False,
) -> int:  # fmt: skip
    """Store the weights of the linear layers, and with `convolutions` those of Conv2d too, whose path is `wanted`, in a
    form. Returns the number of layers in fewer bits.

    Norms, embeddings and biases keep their type. Layers that are stored already stay as they are. Each weight is
    computed on `device` (None = where it is), so that a model that waits on the CPU is never there as a whole.
    """
    count = 0
    for path, parent, layer in _layers(model):
        if stored_of(layer) is None and wanted(path) and not (form in (FP8, FP8_SCALED) and _casts_input(parent, path)):
            if convolutions or isinstance(layer, nn.Linear):
                hold(layer, stored(layer.weight.to(device or layer.weight.device), form, block, f"{path}.weight"))
        count += stored_of(layer) is not None
    return count


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, parent, layer) of linear layers and convolutions."""
    for path, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            yield path, model.get_submodule(path.rpartition(".")[0]), layer


def _casts_input(parent: nn.Module, path: str) -> bool:
    return path.rpartition(".")[2] in CAST_INPUTS and type(parent).__module__.startswith("transformers.")


def shrink_to_fp8(model: nn.Module) -> int:
    """Store the weights of all linear layers and convolutions in 8 bits, without scales."""
    return store_layers(model, FP8, convolutions=True)


def shrink_linears_to_fp8(model: nn.Module) -> int:
    """Store the weights of all linear layers in 8 bits, without scales. Returns their number."""
    return store_layers(model, FP8)


def store_linears_in_fp8(model: nn.Module) -> int:
    """Let every linear layer whose weight is in 8 bits without scales compute in the type of its input; returns the
    number of layers in fewer bits."""
    for _, _, layer in _layers(model):
        if isinstance(layer, nn.Linear) and stored_of(layer) is None and layer.weight.dtype in FP8_DTYPES:
            hold(layer, StoredWeight(FP8, layer.weight.detach(), None, layer.weight.shape))
    return sum(stored_of(layer) is not None for _, _, layer in _layers(model))


# -- computing ---------------------------------------------------------------------------------------------------------


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _linear(self: nn.Linear, x: Tensor) -> Tensor:
    dtype = _compute_dtype(x)
    if self.multiplies_in_float32:
        with torch.autocast(x.device.type, enabled=False):  # which would round both sides
            return _product(self, x.float()).to(dtype)
    return _product(self, x.to(dtype))


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the type of x."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return _Product.apply(
        x, layer.weight, layer.weight_scale, bias, layer.weight_form, layer.full_shape, layer.multiplies_fp8
    )


def _convolution(self: nn.Conv2d, x: Tensor) -> Tensor:
    dtype = _compute_dtype(x)
    weight = widened(self.weight_form, self.weight, self.weight_scale, self.full_shape, dtype)
    bias = None if self.bias is None else self.bias.to(dtype)
    return self._conv_forward(x.to(dtype), weight, bias)


class _Product(torch.autograd.Function):
    """x [..., in] times a stored weight [out, in], plus a bias [out].

    Of the weight only the stored numbers are kept for the backward pass, which widens them again: the widened weights
    of all layers together would take the memory that storing them saves.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, form: str, shape: torch.Size,
        multiplies_fp8: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(data, scale)
        ctx.form, ctx.shape = form, shape
        if multiplies_fp8:
            return _fp8_product(x, data, scale, bias)
        if _scales_outputs(scale, x.dtype):
            output = F.linear(x, data.to(x.dtype)).mul_(scale)  # the product of numbers and scale is float32 inside
            return output if bias is None else output.add_(bias)
        return F.linear(x, widened(form, data, scale, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        data, scale = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            if _scales_outputs(scale, gradient.dtype):
                of_x = gradient.clone().mul_(scale) @ data.to(gradient.dtype)
            else:
                of_x = gradient @ widened(ctx.form, data, scale, ctx.shape, gradient.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, None, None, of_bias, None, None, None


def _scales_outputs(scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether scales by rows are multiplied with the outputs, which is cheaper than with the weight. Not in float16,
    whose largest number sums of unscaled products exceed."""
    return scale is not None and scale.ndim == 1 and dtype != torch.float16


# -- products of 8-bit numbers -----------------------------------------------------------------------------------------


def multiply_in_fp8(model: nn.Module) -> int:
    """Let the layers of a model in scaled 8 bits multiply in 8 bits, where their sizes allow it: inputs are rounded to
    8 bits too, each token scaled to the whole range. Backward passes widen as before. Returns the number of layers."""
    count = 0
    for _, _, layer in _layers(model):
        own = stored_of(layer)
        if own is None or own.dtype != FP8_STORAGE or own.scale is None or own.scale.ndim != 1 or own.ndim != 2:
            continue
        layer.multiplies_fp8 = not any(size % 16 for size in own.shape)  # what the kernels of cuBLAS ask for
        count += layer.multiplies_fp8
    return count


def multiply_in_float32(model: nn.Module) -> int:
    """Let the linear layers of a model in scaled 8 bits multiply in float32, with or without autocast, and round their
    outputs to the type that they would have had; not those that multiply in 8 bits. Returns the number of layers."""
    count = 0
    for _, _, layer in _layers(model):
        own = stored_of(layer)
        if own is None or own.form != FP8_SCALED or layer.multiplies_fp8 or not isinstance(layer, nn.Linear):
            continue
        layer.multiplies_in_float32 = True
        count += 1
    return count


def _fp8_product(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] in scaled 8 bits times such a weight [out, in]; sums are float32, the result is of the type of x."""
    rows, of_rows = scaled_fp8(x.flatten(0, -2))  # [tokens, in], [tokens]
    # kernels that scale both rows and columns give bfloat16 alone
    output = torch._scaled_mm(
        rows, data.t(), scale_a=of_rows[:, None], scale_b=scale[None], out_dtype=torch.bfloat16, use_fast_accum=False
    )
    output = output.to(x.dtype)
    output = output if bias is None else output + bias
    return output.view(*x.shape[:-1], len(data))


def fp8_product_problem(device: torch.device) -> str | None:
    """A message for --fp8_fast on a device that does not multiply 8-bit numbers, or None."""
    if can_multiply_fp8(device):
        return None
    return (
        f"--fp8_fast multiplies in 8 bits, which {described(device)} cannot (NVIDIA GPUs can from compute capability"
        " 8.9, RTX 40, on); leave it out: --fp8_scaled alone widens weights before each product and takes no more memory"
    )


@functools.lru_cache(maxsize=None)
def can_multiply_fp8(device: torch.device) -> bool:
    """Whether a device multiplies 8-bit numbers with scales by rows and columns (CUDA from compute capability 8.9 on):
    tried once, on small matrices."""
    try:
        numbers = torch.eye(32, device=device)
        found = _fp8_product(numbers, *scaled_fp8(2 * numbers), None)
        return bool(torch.equal(found, 2 * numbers))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return False
