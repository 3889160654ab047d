"""Every adapter on every kind of layer: what it does in a forward pass, merged, and saved and loaded, is the same."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from library.core.errors import CheckpointError, ConfigError
from networks.files.network_files import by_module, read_adapter_file, write_adapter_file
from networks.kinds.network_args import NetworkSettings
from networks.kinds.network_base import module_from_tensors
from networks.kinds.registry import bias_change, weight_change
from networks.kinds.targets import Layer
from tests.networks.adapter_table import ADAPTERS, kind_of_adapter, make_adapter

LAYERS = {
    "linear": lambda: nn.Linear(8, 12),
    "conv1x1": lambda: nn.Conv2d(8, 12, 1),
    "conv3x3": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "layer_norm": lambda: nn.LayerNorm(8),
    "group_norm": lambda: nn.GroupNorm(4, 8),
}
CELLS = (*((layer, False) for layer in LAYERS), ("conv3x3", True))
TOLERANCE = 1e-5  # float32, of the largest output
HALF_STEP = 2**-8  # of bfloat16, relative: 8 significant bits


def example(layer, dtype=torch.float32):
    shape = (2, 5, 8) if isinstance(layer, (nn.Linear, nn.LayerNorm)) else (2, 8, 6, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def trained(adapter):
    """The adapter with values as after training: none is zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return adapter


def cell(name, layer_name, tucker, dtype=torch.float32, multiplier=1.0):
    """(layer, adapter), or the one message with which the cell is refused."""
    adapter, layer = ADAPTERS[name], LAYERS[layer_name]()
    torch.manual_seed(0)
    layer.reset_parameters()
    layer.to(dtype)
    more = {"use_tucker": "True"} if tucker else {}
    if layer_name in adapter.layers and (adapter.tucker or not tucker):
        return layer, make_adapter(adapter, layer, multiplier, **more)
    if layer_name in ADAPTERS["norm"].layers:
        return None  # every adapter trains norms by the kind "norm", with train_norm=True
    with pytest.raises(ConfigError) as error:
        make_adapter(adapter, layer, multiplier, **more)
    assert len(error.value.problems) == 1
    return None


def rounding_bound(layer, x, plain, hooked):
    """How far a merged layer may be from the hooked one in bfloat16, value by value. `layer` is merged.

    Hooked: the layer's own output y0 is rounded, the change is added in float32, and the sum y is rounded: h (|y0| +
    |y|) with h the half step. Merged: every weight w' and the bias b' are rounded, which moves the output by h (sum
    |w'| |x| + |b'|) at most, and the output is rounded: h |y|. Errors of errors are h times smaller; 4 h covers them.
    Norms multiply n(x) instead of x.
    """
    weight, bias = layer.weight.detach().float().abs(), layer.bias.detach().float().abs()
    if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
        ones = {"weight": torch.ones_like(weight), "bias": torch.zeros_like(bias)}
        shape = (-1,) if isinstance(layer, nn.LayerNorm) else (-1, *[1] * (x.ndim - 2))
        moved = functional_call(layer, ones, (x.float(),)).abs() * weight.view(shape) + bias.view(shape)
    else:
        moved = functional_call(layer, {"weight": weight, "bias": bias}, (x.float().abs(),))
    return HALF_STEP * (1 + 4 * HALF_STEP) * (plain.float().abs() + 2 * hooked.float().abs() + moved).detach()


def assert_within_rounding(output, hooked, layer, x, plain):
    if x.dtype == torch.bfloat16:
        excess = (output - hooked).detach().float().abs() - rounding_bound(layer, x, plain, hooked)
        assert float(excess.max()) <= 0
    else:
        torch.testing.assert_close(
            output, hooked, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, float(hooked.detach().abs().max()))
        )


@pytest.mark.cross_product(("name", "layer_name", "tucker"), "dtype", "multiplier")
@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("layer_name", "tucker"), CELLS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_forward_merge_and_file_are_equal(name, layer_name, tucker, dtype, multiplier, tmp_path):
    made = cell(name, layer_name, tucker, dtype, multiplier)
    if made is None:
        return
    layer, adapter = made
    trained(adapter).eval()
    x = example(layer, dtype)
    plain, own = layer(x), {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    adapter.apply_to()
    hooked = layer(x)
    adapter.remove_from()
    assert (multiplier == 0) == torch.equal(hooked, plain)

    file = tmp_path / "adapter.safetensors"
    write_adapter_file(
        str(file), {f"lora_unet_layer.{name}": tensor for name, tensor in adapter.file_tensors().items()}, None, None
    )
    tensors = by_module(read_adapter_file(file))["lora_unet_layer"]
    weight = own["weight"].float()
    merged = (weight + weight_change(tensors, weight, multiplier)).to(dtype)
    adapter.merge_to()
    assert multiplier == 0 or not torch.equal(layer.weight, own["weight"])
    torch.testing.assert_close(layer.weight, merged, rtol=0, atol=0)
    by_hand = layer(x)
    for key, parameter in layer.named_parameters():
        parameter.data.copy_(own[key])
    adapter.load_file_tensors(tensors)
    for key, tensor in adapter.file_tensors().items():
        assert torch.equal(tensor, tensors[key]), key

    loaded = module_from_tensors(tensors, Layer("lora_unet_layer", "layer", layer), None, multiplier, NetworkSettings())
    loaded.load_file_tensors(tensors)
    loaded.eval().apply_to()
    if ADAPTERS[name].pairs.get("split_qkv"):  # a file holds the parts as one pair
        assert_within_rounding(layer(x), hooked, layer, x, plain)
    else:
        assert torch.equal(layer(x), hooked)
    loaded.remove_from()
    loaded.merge_to()
    torch.testing.assert_close(layer.weight, merged, rtol=0, atol=0)
    bias = bias_change(tensors, multiplier)
    torch.testing.assert_close(
        layer.bias, own["bias"] if bias is None else (own["bias"].float() + bias).to(dtype), rtol=0, atol=0
    )
    for output in (layer(x), by_hand):
        assert_within_rounding(output, hooked, layer, x, plain)


@pytest.mark.parametrize(("layer_name", "tucker"), CELLS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_start_and_gradients(name, layer_name, tucker):
    """A new adapter changes nothing, and gradients reach its parameters alone."""
    made = cell(name, layer_name, tucker)
    if made is None:
        return
    layer, adapter = made
    layer.requires_grad_(False)
    x = example(layer)
    plain = layer(x)
    adapter.apply_to()
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    trained(adapter)
    layer(x).square().sum().backward()
    for parameter_name, parameter in adapter.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == parameter.requires_grad, parameter_name
    assert all(parameter.grad is None for parameter in layer.parameters())
    fixed = {key.partition(".")[0] for key in adapter.file_tensors()} - {
        key.partition(".")[0] for key, _ in adapter.named_parameters()
    }
    assert fixed == {*ADAPTERS[name].fixed, *(("alpha",) if adapter.has_alpha else ())}, (
        "tensors of the file that are not trained"
    )


@pytest.mark.parametrize("layer_name", ["linear", "conv3x3"])
@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if "linear" in adapter.layers])
def test_a_change_of_the_bias_may_stand_beside_any_kind(name, layer_name):
    """diff_b, which LyCORIS and others write: hooked, merged and written again; a layer without bias refuses it."""
    layer, adapter = cell(name, layer_name, False, multiplier=0.5)
    tensors = {key: tensor.clone() for key, tensor in trained(adapter).file_tensors().items()}
    tensors["diff_b"] = torch.linspace(-1, 1, 12)
    at = Layer("lora_unet_layer", "layer", layer)
    loaded = module_from_tensors(tensors, at, None, 0.5, NetworkSettings(), kind_of_adapter(ADAPTERS[name]))
    loaded.load_file_tensors(tensors)
    assert torch.equal(loaded.file_tensors()["diff_b"], tensors["diff_b"])
    x, shape = example(layer), (-1,) if layer_name == "linear" else (-1, 1, 1)
    loaded.eval().apply_to()
    hooked = layer(x)
    loaded.diff_b.data.zero_()
    torch.testing.assert_close(
        hooked - layer(x), (0.5 * tensors["diff_b"]).view(shape).expand_as(hooked), rtol=1e-4, atol=1e-5
    )
    loaded.load_file_tensors(tensors)
    loaded.remove_from()
    loaded.merge_to()
    torch.testing.assert_close(layer(x), hooked, rtol=1e-4, atol=1e-4)
    layer.bias = None
    with pytest.raises(CheckpointError, match="has no bias"):
        module_from_tensors(tensors, at, None, 1.0, NetworkSettings())
