"""Modules that are built without weights."""

from __future__ import annotations

import torch
from torch import nn

from library.checkpoints.loading import build_on_meta


class Layer(nn.Module):
    """A layer without weights, and a table that has values from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("table", nn.init.constant_(torch.empty(2, device="cpu"), 7.0))


def test_start_values_are_given_to_what_has_storage_alone(monkeypatch) -> None:
    filled = []
    for name in ("uniform_", "fill_"):
        method = getattr(torch.Tensor, name)

        def noting(self, *arguments, method=method, **named):
            filled.append(self.is_meta)
            return method(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, noting)
    model = build_on_meta(Layer)
    assert model.layer.weight.is_meta and model.table.tolist() == [7.0, 7.0]
    assert filled == [False]
    assert nn.Linear(3, 4).weight.abs().max() > 0  # outside, all is as ever
