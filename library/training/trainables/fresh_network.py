"""Whether an adapter that has not learned leaves the model as it is: one layer of each kind is tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from library.core.keyed_random import isolated_rng

if TYPE_CHECKING:
    from library.training.protocols import AdapterNetwork

LEAST = 0.01
"""share of a layer's output below which a change is rounding, in 16 bits too"""


@torch.no_grad()
def changed_layer(
    network: AdapterNetwork, models: Iterable[torch.nn.Module | None]
) -> tuple[str, float] | None:
    """(path of a layer, share of its output) of the first kind of layer whose output the hooked `network` changes; None
    when it changes none of those that are tried: the first of each class of adapter and of layer."""
    network.eval()
    for name, layer in _hooked_layers(models):
        with isolated_rng(0):
            x = _input_of(layer)
            try:
                before, after = type(layer).forward(layer, x).float(), layer(x).float()
            except Exception:  # an adapter of another package that needs more than an input: nothing is known of it
                continue
        share = float((after - before).norm() / before.norm().clamp_min(1e-12))
        if share > LEAST:
            return name, share
    return None


def _hooked_layers(models: Iterable[torch.nn.Module | None]) -> Iterator[tuple[str, torch.nn.Module]]:
    """The first layer of each class whose `forward` an adapter of each class has put itself in the place of."""
    seen = set()
    for model in models:
        for name, layer in model.named_modules() if model is not None else ():
            hooked = vars(layer).get("forward")
            kind = (type(getattr(hooked, "__self__", None)), type(layer))
            weight = getattr(layer, "weight", None)
            is_known = isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
            if hooked is None or kind in seen or not is_known or weight.dtype.itemsize == 1:
                continue
            seen.add(kind)
            yield name, layer


def _input_of(layer: torch.nn.Module) -> torch.Tensor:
    """Numbers of the shape that a layer takes: [4, in] or [1, in, 4, 4]."""
    weight = layer.weight
    shape = (4, layer.in_features) if isinstance(layer, torch.nn.Linear) else (1, layer.in_channels, 4, 4)
    return torch.randn(shape).to(weight)
