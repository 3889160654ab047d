"""DyLoRA: the piece of a step is drawn by key, what stands behind it is cut off, and nothing but the piece is
trained."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from networks.dylora import create_network, create_network_from_weights
from tests.networks.adapter_table import ADAPTERS, make_adapter
from tests.networks.tiny_denoisers import tiny_denoiser

RANK, UNIT, ALPHA = 6, 2, 1.5
"""of the adapter table; every layer has three pieces"""
LAYERS = {"linear": lambda: nn.Linear(8, 12), "conv3x3": lambda: nn.Conv2d(8, 12, 3, padding=1)}


def adapter_of(layer):
    """In training, with random values in every piece."""
    adapter = make_adapter(ADAPTERS["dylora"], layer)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapter.train()


def start_step(adapter, step, positions=(0, 1), seed=4):
    adapter.step_state.draws = StepDraws(seed, step, positions)
    adapter.on_step_draws()
    return adapter.piece


def example(layer):
    shape = (2, 5, 8) if isinstance(layer, nn.Linear) else (2, 8, 6, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_the_draw_belongs_to_the_optimizer_step():
    adapter = adapter_of(LAYERS["linear"]())
    pieces = [start_step(adapter, step) for step in range(300)]
    assert pieces == [
        start_step(adapter, step, positions=(6, 7, 8)) for step in range(300)
    ]  # another micro-batch or rank
    assert pieces != [start_step(adapter, step, seed=5) for step in range(300)]
    assert all(75 < pieces.count(piece) < 125 for piece in range(3))
    other = make_adapter(ADAPTERS["dylora"], nn.Linear(8, 12))
    other.lora_name = "lora_unet_other"
    assert pieces != [start_step(other, step) for step in range(300)]


@pytest.mark.parametrize("layer_name", LAYERS)
def test_ranks_behind_the_piece_are_cut_off(layer_name):
    """change = alpha / R * sqrt(R / (t + unit)) * up[:, :t + unit] @ down[:t + unit], t = unit * piece."""
    layer = LAYERS[layer_name]()
    adapter, x = adapter_of(layer), example(layer)
    tensors = adapter.file_tensors()
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    seen = set()
    for step in range(20):
        used = UNIT * (start_step(adapter, step) + 1)
        seen.add(used)
        change = torch.einsum("or,r...->o...", up[:, :used].flatten(1), down[:used]) * (
            ALPHA / RANK * math.sqrt(RANK / used)
        )
        expected = F.linear(x, change) if isinstance(layer, nn.Linear) else F.conv2d(x, change, padding=1)
        torch.testing.assert_close(adapter.output_change(x), expected)
    assert seen == {2, 4, 6}
    adapter.eval()
    whole = adapter.delta_weight()
    expected = F.linear(x, whole) if isinstance(layer, nn.Linear) else F.conv2d(x, whole, padding=1)
    torch.testing.assert_close(adapter.output_change(x), expected)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_pieces_are_left_alone_by_weight_decay_and_momentum(optimizer_class):
    layer = nn.Linear(8, 12).requires_grad_(False)
    adapter, x = adapter_of(layer), example(layer)
    optimizer = optimizer_class(adapter.parameters(), lr=0.1, weight_decay=0.5)
    adapter.apply_to()
    for step in range(12):
        piece = start_step(adapter, step)
        before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
        for micro_batch in range(2):
            assert start_step(adapter, step, positions=(2 * micro_batch, 2 * micro_batch + 1)) == piece
            layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, parameter in adapter.named_parameters():
            assert torch.equal(parameter, before[name]) == (not name.endswith(f".{piece}")), (step, name)


def test_images_are_made_with_the_whole_rank_and_leave_the_draw_alone():
    layer = nn.Linear(8, 12)
    adapter, x = adapter_of(layer), example(layer)
    assert any(start_step(adapter, step) == 0 for step in range(50))
    small = adapter.output_change(x)
    adapter.eval()
    torch.testing.assert_close(adapter.output_change(x), F.linear(x, adapter.delta_weight()))
    adapter.train()
    assert adapter.piece == 0 and torch.equal(adapter.output_change(x), small)


def test_a_file_of_any_rank_is_read(tmp_path):
    """The rank of a file is that of its tensors; the pieces come from `unit`, and what was cut off is gone."""
    model, _ = tiny_denoiser("sd")
    network = create_network(1.0, RANK, ALPHA, None, None, model, unit="2")
    for module in network.loras:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    own = {module.lora_name: module for module in network.unet_loras}
    path = str(tmp_path / "whole.safetensors")
    network.apply_to(None, model, False, True)
    network.save_weights(path, torch.float32, {"ss_a": "1"})
    for unit, count in (("2", 3), ("3", 2), ("6", 1), (None, 6)):
        again, tensors = create_network_from_weights(1.0, path, None, None, model, **({"unit": unit} if unit else {}))
        again.load_tensors(tensors)
        assert {len(module.lora_down) for module in again.unet_loras} == {count}
        for module in again.unet_loras:
            torch.testing.assert_close(module.delta_weight(), own[module.lora_name].delta_weight())
    cut = {
        name: tensor[:4]
        if name.endswith("lora_down.weight")
        else tensor[:, :4]
        if name.endswith("lora_up.weight")
        else tensor
        for name, tensor in network.file_state_dict().items()
    }
    part, tensors = create_network_from_weights(1.0, None, None, None, model, weights_sd=cut, unit="2")
    part.load_tensors(tensors)
    assert {module.lora_name for module in part.unet_loras} == set(own)
    for module in part.unet_loras:
        assert module.lora_dim == 4
        down, up = own[module.lora_name]._joined(2)
        torch.testing.assert_close(module.delta_weight().flatten(1), ALPHA / 4 * up.flatten(1) @ down.flatten(1))
    with pytest.raises(ConfigError, match="rank 6, which is no multiple of unit=4"):
        create_network_from_weights(1.0, path, None, None, model, unit="4")
    network.remove_from()


@pytest.mark.parametrize("unit", ["0", "-1", "1.5", "two"])
def test_bad_units_are_refused(unit):
    with pytest.raises(ConfigError, match="1 or more"):
        make_adapter(ADAPTERS["dylora"], nn.Linear(8, 12), unit=unit)
