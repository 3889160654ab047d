"""What denoisers and adapters ask of a device, seen on one without data: no number format that some lack, no waiting
for it.

On the device "meta" a tensor has a shape and no values, so that everything which reads one fails.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from networks.files.network_files import is_finite
from tests.networks.adapter_table import ADAPTERS
from tests.networks.test_every_adapter import LAYERS, cell
from tests.networks.tiny_denoisers import DENOISERS, tiny_denoiser

WAITS = ("_linalg_check_errors", "_local_scalar_dense", "is_nonzero", "equal.")
POSITIONS = (1, 3)
"""inputs of FLUX and Chroma that are read on the CPU"""


class OnDevice(TorchDispatchMode):
    """Notes operators that wait for the device, and tensors there of a format that MPS and some XPUs lack."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [
            leaf
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta"
        ]
        if tensors and any(wait in str(function) for wait in WAITS):
            self.found.add(f"{function} waits")
        if any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors):
            self.found.add(f"{function} with 64 bits")
        return result


@pytest.mark.parametrize("family", DENOISERS)
def test_a_denoiser_neither_waits_nor_needs_64_bits(family: str) -> None:
    model, inputs = tiny_denoiser(family)
    model = model.to("meta")
    moved = [x if family in ("flux", "chroma") and number in POSITIONS else x.to("meta") for number, x in enumerate(inputs)]
    with OnDevice() as noted:
        assert model(*moved).device.type == "meta"
    assert noted.found == set()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_step_of_an_adapter_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # autocast knows real devices only
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    layer, adapter = cell(name, next(kind for kind in LAYERS if kind in ADAPTERS[name].layers), False)
    adapter.apply_to()
    layer, adapter = layer.to("meta"), adapter.to("meta").train()
    x = torch.randn((2, 8, 6, 7) if isinstance(layer, nn.Conv2d) else (2, 5, 8), device="meta")
    with OnDevice() as noted:
        layer(x).sum().backward()
    assert noted.found == set()
    assert any(parameter.grad is not None for parameter in adapter.parameters())


def test_whether_weights_are_finite_is_found_without_64_bits() -> None:
    largest = torch.finfo(torch.float32).max
    for values, finite in (
        ([1.0, -2.0], True),
        ([], True),
        ([largest] * 3, True),
        ([1.0, float("nan")], False),
        ([float("-inf"), 0.0], False),
    ):
        assert is_finite(torch.tensor(values)) == finite
        assert is_finite(torch.tensor(values).to(torch.bfloat16).clamp(-3e38, 3e38)) == finite or not finite
    assert not is_finite(torch.tensor([1e5]).half())
    with pytest.raises((NotImplementedError, RuntimeError)), OnDevice() as noted:
        is_finite(torch.ones(3, device="meta"))
    assert not [what for what in noted.found if "64 bits" in what]


@pytest.mark.parametrize("family", ["flux", "anima"])
def test_tables_of_positions_are_made_once_for_a_size(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import library.anima_models
    import library.flux_models

    module, name = (library.flux_models, "rope_cos_sin") if family == "flux" else (library.anima_models, "image_angles")
    made, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *words: made.append(1) or original(*words))
    model, inputs = tiny_denoiser(family)
    with torch.inference_mode():  # what is made for a picture serves in training
        first = model(*inputs)
    hidden = inputs[0].clone().requires_grad_()
    second = model(hidden, *inputs[1:])
    second.sum().backward()
    assert len(made) == 1 and torch.equal(first, second)
    wider = torch.cat((inputs[0], inputs[0]), dim=-1) if family == "anima" else inputs[0]
    more = [wider, *inputs[1:]] if family == "anima" else [wider, inputs[1] + 1, *inputs[2:]]
    third = model(*more)
    assert len(made) == 2 and (third.shape != first.shape or not torch.equal(third, first))


def test_rope_equals_the_formula_in_64_bits() -> None:
    from library.attention import rope_cos_sin

    positions = torch.tensor([[[0.0, 5, 130], [1, 2, 4095]]])
    cos, sin = rope_cos_sin(positions, (4, 6, 6), 10000)
    angles = torch.cat(
        [
            positions[..., a, None].double() * 10000.0 ** -(torch.arange(0, d, 2).double() / d)
            for a, d in enumerate((4, 6, 6))
        ],
        -1,
    )
    assert torch.equal(cos, angles.cos().float()) and torch.equal(sin, angles.sin().float())
