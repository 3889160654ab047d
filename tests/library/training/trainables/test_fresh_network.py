"""A new adapter that changes the model is told at start; those of the project do not."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from library.training.adapters import KINDS
from library.training.trainables.fresh_network import changed_layer
from tests.library.training.trainables.test_network import made, tiny  # noqa: F401, a fixture
from tests.networks.tiny_denoisers import tiny_denoiser

LOUD = """
import dataclasses

from networks import lora
from networks.kinds.network_base import NetworkFunctions


class LoudModule(lora.LoRAModule):
    def initialize(self, generator=None):
        super().initialize(generator)
        self.lora_up.weight.data.fill_(0.1)


create_network = NetworkFunctions(dataclasses.replace(lora.KIND, module_class=LoudModule)).create_network
check_network_args = lora.check_network_args
"""


def hooked(kind: str, family: str = "sdxl"):
    denoiser, _ = tiny_denoiser(family)
    network = importlib.import_module(f"networks.{kind}").create_network(1.0, 2, 1.0, None, [], denoiser)
    network.initialize(3)
    network.apply_to([], denoiser, False, True)
    return network, denoiser


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_leave_the_model_as_it_is(kind: str) -> None:
    network, denoiser = hooked(kind)
    assert changed_layer(network, (denoiser, None)) is None
    if kind == "norm":
        return  # its layers are no matrices, and not tried
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    name, share = changed_layer(network, (None, denoiser))
    assert name in dict(denoiser.named_modules()) and share > 0.01


def test_a_kind_that_starts_loud_is_told(tiny, tmp_path, monkeypatch) -> None:  # noqa: F811
    (tmp_path / "loud_adapter.py").write_text(LOUD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "loud_adapter", raising=False)
    trainable, _ = made(tiny, "--network_module", "loud_adapter", "--network_alpha", "4", "--network_dim", "4")
    (told,) = [line for line in trainable.notices() if "before it has learned" in line]
    assert told.startswith("a new adapter of loud_adapter changes the model before it has learned (the output of ")
    quiet, _ = made(tiny, "--network_alpha", "4", "--network_dim", "4")
    assert not [line for line in quiet.notices() if "before it has learned" in line]
