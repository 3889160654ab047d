"""Layers of PEFT and ours: the same merged weight. PEFT turns the inputs of a layer where our kinds turn its outputs,
so that rotations are compared on the transposed weight."""

import pytest
import torch
from torch import nn

from networks.files.parameter_names import layer_tensors
from networks.kinds.network_args import NetworkSettings
from networks.kinds.network_base import module_from_tensors
from networks.kinds.registry import weight_change
from networks.kinds.targets import Layer

peft = pytest.importorskip("peft")

LAYERS = {
    "linear": lambda: nn.Linear(48, 64),
    "odd": lambda: nn.Linear(35, 21, bias=False),
    "conv1x1": lambda: nn.Conv2d(12, 20, 1),
    "conv3x3": lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1),
    "conv5x5": lambda: nn.Conv2d(9, 15, 5, padding=2, dilation=2),
}
CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2.0, target_modules=["layer"], init_weights=False),
    "loha_conv": lambda: peft.LoHaConfig(
        r=3, alpha=2.0, target_modules=["layer"], init_weights=False, use_effective_conv2d=True
    ),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=0.7, target_modules=["layer"], init_weights=False),
    "lokr_8": lambda: peft.LoKrConfig(r=1, alpha=0.7, decompose_factor=8, target_modules=["layer"], init_weights=False),
    "lokr_both": lambda: peft.LoKrConfig(
        r=1, alpha=0.7, decompose_both=True, target_modules=["layer"], init_weights=False
    ),
    "lokr_conv": lambda: peft.LoKrConfig(
        r=1, alpha=0.7, decompose_factor=4, target_modules=["layer"], init_weights=False, use_effective_conv2d=True
    ),
}


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def merged_by_peft(config, layer, seed=4):
    """(the adapter's tensors by the last part of their names, the weight with them merged)."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(Model(layer), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    marks = (".hada_", ".lokr_", ".oft_R", ".boft_R")
    tensors = {
        "".join(mark for mark in marks if mark in name)[1:] + name.split("".join(mark for mark in marks if mark in name), 1)[1].split(".default")[0]:
        parameter.detach().clone()
        for name, parameter in model.named_parameters() if any(mark in name for mark in marks)
    }  # fmt: skip
    merged = model.merge_and_unload().layer.weight.detach()
    return tensors, merged


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_products(name, layer_name):
    torch.manual_seed(1)
    layer, config = LAYERS[layer_name](), CONFIGS[name]()
    weight = layer.weight.detach().clone()
    tensors, expected = merged_by_peft(config, layer)
    assert (expected - weight).abs().max() > 0.01
    is_plain = {"lokr_w1", "lokr_w2"} <= set(tensors)  # PEFT scales where LyCORIS, whose files these are, does not
    tensors["alpha"] = torch.tensor(float(config.alpha))
    change = weight_change(tensors, weight) * (config.alpha / config.r if is_plain else 1.0)
    torch.testing.assert_close(weight + change, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "size"), [(10, 24, 4), (33, 21, 7), (16, 64, 32)])
def test_rotations(rows, columns, size):
    torch.manual_seed(2)
    layer = nn.Linear(columns, rows)
    weight = layer.weight.detach().clone()
    config = peft.OFTConfig(
        r=0, oft_block_size=size, target_modules=["layer"], use_cayley_neumann=False, init_weights=False
    )
    tensors, expected = merged_by_peft(config, layer)
    (upper,) = tensors.values()  # [k, n * (n - 1) / 2]
    blocks = torch.zeros(columns // size, size, size)
    places = torch.triu_indices(size, size, 1)
    blocks[:, places[0], places[1]] = upper
    changed = weight.T + weight_change({"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, weight.T.contiguous())
    assert (expected - weight).abs().max() > 0.01
    torch.testing.assert_close(changed.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer_name", ["linear", "odd", "conv3x3"])
def test_lengths_apart_from_directions(layer_name):
    """DoRA: the output of a layer of PEFT, and its change of the weight (whose gradient PEFT takes for a constant, we
    do not)."""
    torch.manual_seed(3)
    layer = LAYERS[layer_name]()
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["layer"], use_dora=True)
    model = peft.get_peft_model(Model(layer), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    x = torch.randn((2, 5, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 9, 8))
    expected = model(x)
    names = {
        "lora_A.default": "lora_down",
        "lora_B.default": "lora_up",
        "lora_magnitude_vector.default": "lora_magnitude_vector",
    }
    tensors = {"alpha": torch.tensor(2.0)}
    for name, parameter in model.named_parameters():
        tensors.update({name.split("layer.")[1].replace(old, new): parameter.detach().flatten() if "magnitude" in old else parameter.detach()
                        for old, new in names.items() if old in name})  # fmt: skip
    tensors = layer_tensors(tensors)
    ours = module_from_tensors(tensors, Layer("name", "name", layer), None, 1.0, NetworkSettings())
    ours.load_file_tensors(tensors)
    ours.train().apply_to()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert (layer(x) - ours.org_forward(x)).abs().max() > 0.05
