"""Models whose tensors are of several types, each as its file has it: every layer computes in the type of its own
weights, and between layers there is one type."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
"""types that are computed with; others are those of weights in fewer bits"""


@dataclass(frozen=True)
class StoredTypes:
    """`computed`: the type between layers; `tensors`: how many tensors there are of each type."""

    computed: torch.dtype
    tensors: Mapping[torch.dtype, int]

    def __str__(self) -> str:
        named = ", ".join(f"{count} tensors of {_name(kind)}" for kind, count in self.tensors.items())
        return f"{named}; between layers {_name(self.computed)}"


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def entry_dtype(model: nn.Module, example: Tensor) -> torch.dtype:
    """The type that activations of a model enter with: what `compute_as_stored` found, or that of an example among its
    tensors."""
    return model.__dict__.get("computes_in") or example.dtype


def compute_as_stored(model: nn.Module, otherwise: torch.dtype, *, in_autocast: bool = False) -> StoredTypes:
    """Let a model compute that was loaded with the types of its file, before adapters are put into its layers.

    The type of most of its numbers is that between layers, or `otherwise` where most are in fewer bits. A layer of
    another type casts what it is given, computes in its own type, autocast or not, and rounds its output. A model all
    of one type computes as it would without. What the model itself keeps in float32 (`float32_parts`, beginnings of
    names) is left alone. `in_autocast`: forwards run inside autocast to `otherwise`, which is the type between layers
    then, and layers whose weights are no wider are left to it.
    """
    numbers, tensors = Counter[torch.dtype](), Counter[torch.dtype]()
    for parameter in model.parameters():
        numbers[parameter.dtype] += parameter.numel()
        tensors[parameter.dtype] += 1
    most = max(numbers, key=lambda kind: numbers[kind], default=otherwise)
    computed = most if most in COMPUTED and not in_autocast else otherwise
    left = getattr(model, "float32_parts", ())
    for name, layer in model.named_modules():
        is_layer = next(layer.children(), None) is None and next(layer.parameters(recurse=False), None) is not None
        if not is_layer or (left and name.startswith(left)):
            continue
        if not in_autocast or any(one.dtype == torch.float32 for one in layer.parameters(recurse=False)):
            _wrap(layer, computed)
    model.computes_in = computed
    return StoredTypes(computed, dict(tensors.most_common()))


def _wrap(layer: nn.Module, computed: torch.dtype) -> None:
    is_matrix = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    kinds = {parameter.dtype for parameter in layer.parameters(recurse=False)} & set(COMPUTED)
    own = layer.weight.dtype if is_matrix else max(kinds, key=lambda kind: kind.itemsize, default=computed)
    if not is_matrix:
        layer.to(own)  # nothing is lost: it is the widest of a few vectors
    layer.own_type, layer.computes_in = own if own in COMPUTED else computed, computed
    layer.takes_wider = not is_matrix
    layer.forward_in_one_type = layer.forward
    layer.bias_is_apart = is_matrix and layer.bias is not None and own in COMPUTED and layer.bias.dtype != own
    layer.forward = types.MethodType(_forward, layer)


def _forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:
    given = [_cast(value, self) for value in inputs]
    named = {name: _cast(value, self) for name, value in named.items()}
    device = next(self.parameters(recurse=False)).device
    with torch.autocast(device.type, enabled=False):
        output = _with_bias(self, *given) if self.bias_is_apart else self.forward_in_one_type(*given, **named)
    return output if self.own_type == self.computes_in and not self.bias_is_apart else output.to(self.computes_in)


def _cast(value: Any, layer: nn.Module) -> Any:
    """An input in the layer's type; norms are given wider ones on purpose."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    is_wider = layer.takes_wider and value.dtype.itemsize > layer.own_type.itemsize
    return value if is_wider else value.to(layer.own_type)


def _with_bias(layer: nn.Module, x: Tensor) -> Tensor:
    """A bias of another type is added in the wider one."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, layer.weight) + layer.bias
    product = layer._conv_forward(x, layer.weight, None)
    return product + layer.bias.view(-1, *[1] * (product.ndim - 2))
