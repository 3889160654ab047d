"""DoRA beside every kind that can be decomposed: gradients, memory, dropouts, limited norms; and what is never
decomposed."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from library.core.errors import CheckpointError, ConfigError
from library.core.registry import import_target
from library.checkpoints.weight_forms import stored
from library.fp8_optimization_utils import store_layers, weight_of
from networks.files.network_files import by_module
from networks.kinds.additional_network import AdditionalNetwork
from networks.kinds.network_args import NetworkSettings
from networks.kinds.network_base import build_module, module_from_tensors, read_settings
from networks.kinds.registry import MARKS, weight_change
from networks.kinds.selection import LayerPlan
from networks.kinds.targets import Layer, targets_of_family
from tests.networks.adapter_table import ADAPTERS, Adapter, kind_of_adapter, make_adapter
from tests.networks.test_every_adapter import CELLS, LAYERS, cell, example, trained
from tests.networks.tiny_denoisers import DENOISERS, tiny_denoiser

DECOMPOSED = [name for name, adapter in ADAPTERS.items() if adapter.pairs.get("dora_wd")]
DORA_CELLS = [(name, layer, tucker) for name in DECOMPOSED for layer, tucker in CELLS if "norm" not in layer]


def test_both_kinds_of_lengths_are_in_the_table():
    ways = {
        (adapter.module, adapter.pairs.get("wd_on_output", "True"))
        for adapter in ADAPTERS.values()
        if adapter.pairs.get("dora_wd")
    }
    assert ways == {(f"networks.{kind}", on) for kind in ("lora", "loha", "lokr") for on in ("True", "False")}


@pytest.mark.parametrize(("name", "layer_name", "tucker"), DORA_CELLS)
def test_gradients_are_those_of_the_formula(name, layer_name, tucker):
    """The output is scaled without the changed weight being built; its derivatives are those of c (W + D) x."""
    layer, adapter = cell(name, layer_name, tucker, multiplier=0.7)
    layer.requires_grad_(False)
    trained(adapter).train()
    x = example(layer).requires_grad_()
    gradients = []
    for way in ("hooked", "formula"):
        adapter.zero_grad()
        x.grad = None
        if way == "hooked":
            adapter.apply_to()
            output = layer(x)
            adapter.remove_from()
        else:
            values = {"weight": layer.weight + weight_change(adapter.tensors(), layer.weight, 0.7), "bias": layer.bias}
            output = functional_call(layer, values, (x,))
        (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
        gradients.append([x.grad.clone(), *(parameter.grad.clone() for parameter in adapter.parameters())])
    for hooked, formula in zip(*gradients, strict=True):
        torch.testing.assert_close(hooked, formula, rtol=1e-4, atol=1e-4 * float(formula.abs().max()))


def kept_bytes(adapter, layer, x):
    """Bytes that a forward pass keeps for the backward pass beside parameters and its input."""
    adapter.apply_to()
    kept, own = (
        {},
        {parameter.data_ptr() for module in (layer, adapter) for parameter in module.parameters()} | {x.data_ptr()},
    )

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    adapter.remove_from()
    output.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DECOMPOSED)
def test_nothing_of_the_weights_size_is_kept(name, dtype):
    """A layer of 512 x 512 (1 MiB in float32) on 16 tokens: DoRA keeps two tensors of the tokens' size more than the
    plain kind."""
    layer = nn.Linear(512, 512).requires_grad_(False).to(dtype)
    x = torch.randn(1, 16, 512, requires_grad=True)
    used = []
    for pairs in (ADAPTERS[name].pairs, {}):
        adapter = trained(make_adapter(Adapter(ADAPTERS[name].module, pairs, rank=4), layer)).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            used.append(kept_bytes(adapter, layer, x))
    tokens = 16 * 512 * 4
    assert used[0] <= used[1] + 3 * tokens
    assert used[0] < 512 * 512 * 2


DROPS = [(name, layer, tucker, drop) for name, adapter in ADAPTERS.items() for layer, tucker in CELLS
         if layer in adapter.layers and (adapter.tucker or not tucker) for drop in ("dropout", "rank_dropout", "module_dropout")]  # fmt: skip


@pytest.mark.parametrize(("name", "layer_name", "tucker", "drop"), DROPS)
def test_a_dropout_works_or_is_refused(name, layer_name, tucker, drop):
    """Every kind, decomposed or not: a dropout that is accepted changes the output of training and that alone."""
    adapter, layer = ADAPTERS[name], LAYERS[layer_name]()
    kind = kind_of_adapter(adapter)
    if drop not in kind.module_class.drops:
        with pytest.raises(ConfigError, match="has none|no argument"):
            read_settings(
                kind, kind.targets(targets_of_family(adapter.families[0])), 2, 1.0, None, {**adapter.pairs, drop: "0.5"}
            )
        return
    more = {"use_tucker": "True"} if tucker else {}
    module = trained(make_adapter(adapter, layer, **{drop: "0.5"}, **more))
    x = example(layer)
    module.apply_to()
    rest = module.eval()(x)
    torch.manual_seed(1)
    outputs = [module.train()(x) for _ in range(6)]
    assert any(not torch.allclose(output, rest, rtol=1e-3, atol=1e-4) for output in outputs)
    module.dropout = module.rank_dropout = module.module_dropout = None
    torch.testing.assert_close(module.train()(x), rest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer_name", "tucker"), DORA_CELLS)
def test_limited_norms(name, layer_name, tucker):
    """The whole change of the weight is brought to the limit, once; the numbers of the log are those of the network."""
    layer, adapter = cell(name, layer_name, tucker)
    network = AdditionalNetwork(targets_of_family("sd"), NetworkSettings(), [trained(adapter)], 1.0)
    limit = 0.3
    assert float(adapter.weight_norm()) > 2 * limit
    count, mean, largest = network.apply_max_norm_regularization(limit)
    norm = float((weight_change(adapter.file_tensors(), layer.weight.detach())).norm())
    assert norm == pytest.approx(limit, rel=1e-3)
    assert (count, mean, largest) == (1, pytest.approx(norm, rel=1e-3), pytest.approx(norm, rel=1e-3))
    low_rank = float(adapter.step_weight().detach().norm())
    for _ in range(20):
        network.apply_max_norm_regularization(limit)
    assert float(adapter.weight_norm()) == pytest.approx(limit, rel=1e-3)
    assert float(adapter.step_weight().detach().norm()) == pytest.approx(low_rank, rel=1e-2)
    held = {key: tensor.clone() for key, tensor in adapter.file_tensors().items()}
    network.apply_max_norm_regularization(limit * 2)
    assert all(torch.equal(tensor, held[key]) for key, tensor in adapter.file_tensors().items()), (
        "nothing is above the limit"
    )


@pytest.mark.parametrize(("layer_name", "tucker"), CELLS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_can_be_scaled(name, layer_name, tucker):
    """--scale_weight_norms multiplies the norm that it measured, whatever the kind."""
    made = cell(name, layer_name, tucker)
    if made is None:
        return
    _, adapter = made
    before = float(trained(adapter).weight_norm())
    adapter.scale_change(torch.tensor(0.3))
    assert float(adapter.weight_norm()) == pytest.approx(0.3 * before, rel=2e-3)


@pytest.mark.parametrize("on_output", ["True", "False"])
@pytest.mark.parametrize("family", DENOISERS)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_norms_are_never_decomposed(kind, family, on_output):
    """dora_wd with train_norm: a file of norms and DoRA that loads again with the same output."""
    model, inputs = tiny_denoiser(family)
    create = import_target(f"networks.{kind}:create_network")
    network = create(1.0, 2, 1.0, None, None, model, train_norm="True", dora_wd="True", wd_on_output=on_output)
    network.apply_to(None, model, False, True)
    plain = model(*inputs)
    trained(network)
    with torch.no_grad():
        hooked = model(*inputs)
    assert not torch.allclose(hooked, plain, rtol=1e-3, atol=1e-4)
    tensors = network.file_state_dict()
    for name, part in by_module(tensors).items():
        assert ("dora_scale" in part) != ("w_norm" in part), name
    network.remove_from()
    again, _ = import_target(f"networks.{kind}:create_network_from_weights")(
        1.0, None, None, None, model, weights_sd=tensors
    )
    again.load_tensors(tensors)
    again.apply_to(None, model, False, True)
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), hooked, rtol=1e-4, atol=1e-5)


def norm_plan():
    return LayerPlan(Layer("lora_unet_norm", "norm", nn.LayerNorm(8)), 2, 1.5)


@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if adapter.module != "networks.norm"])
def test_no_argument_of_a_kind_reaches_norms(name):
    """train_norm beside any kind and its arguments: a norm is trained as a norm, and the kind's last touch passes it
    over."""
    adapter = ADAPTERS[name]
    kind = kind_of_adapter(adapter)
    targets = kind.targets(targets_of_family(adapter.families[0]))
    settings = read_settings(kind, targets, adapter.rank, adapter.alpha, None, {**adapter.pairs, "train_norm": "True"})
    norm = build_module(kind, norm_plan(), 1.0, settings)
    linear = build_module(
        kind, LayerPlan(Layer("lora_unet_layer", "layer", nn.Linear(8, 12)), adapter.rank, adapter.alpha), 1.0, settings
    )
    kind.prepare(AdditionalNetwork(targets, settings, [norm, linear], 1.0))
    assert set(norm.state_dict()) == {"w_norm", "b_norm"}


def test_rotations_tell_their_own_alpha(caplog):
    caplog.set_level("INFO")
    model, _ = tiny_denoiser("sd")
    import_target("networks.oft:create_network")(1.0, 4, 0.001, None, None, model, train_norm="True")
    assert "with alpha 0.001 (0 = no limit" in caplog.text


@pytest.mark.parametrize("name", ["ia3", "oft", "diag_oft", "boft", "norm"])
def test_lengths_beside_a_kind_that_has_none_are_refused(name):
    layer = nn.LayerNorm(8) if name == "norm" else nn.Linear(8, 12)
    tensors = {**make_adapter(ADAPTERS[name], layer).file_tensors(), "dora_scale": torch.ones(12, 1)}
    with pytest.raises(CheckpointError, match="dora_scale, which"):
        module_from_tensors(tensors, Layer("lora_unet_layer", "layer", layer), None, 1.0, NetworkSettings())


@pytest.mark.parametrize("name", ["dylora", "lora_fa", "tlora"])
def test_a_file_with_lengths_is_trained_as_lora_and_that_is_said(name, caplog):
    model, _ = tiny_denoiser("flux")
    network = import_target("networks.lora:create_network")(1.0, 2, 1.0, None, None, model, dora_wd="True")
    tensors = network.file_state_dict()
    again, _ = import_target(f"networks.{name}:create_network_from_weights")(
        1.0, None, None, None, model, weights_sd=tensors
    )
    assert {type(module).__name__ for module in again.loras} == {"LoRAModule"}
    assert "are not trained as" in caplog.text
    again.load_tensors(tensors)
    assert torch.equal(again.loras[0].dora_scale, network.loras[0].dora_scale)


def test_lengths_of_fused_layers_are_not_taken_apart():
    model, _ = tiny_denoiser("flux")
    tensors = import_target("networks.lora:create_network")(
        1.0, 3, 1.0, None, None, model, dora_wd="True"
    ).file_state_dict()
    with pytest.raises(CheckpointError, match="leave split_qkv out"):
        import_target("networks.lora:create_network_from_weights")(
            1.0, None, None, None, model, weights_sd=tensors, split_qkv="True"
        )


@pytest.mark.parametrize(("pairs", "option"), [({"neuron_dropout": 0.1}, "--network_dropout"), ({"loraplus_lr_ratio": "4"}, "loraplus_lr_ratio"),
                                               ({"rank_dropout": "0.1"}, "rank_dropout")])  # fmt: skip
def test_arguments_that_do_nothing_for_the_kinds_of_a_file(pairs, option, caplog):
    """The file's layers have the kinds of their tensors, whatever --network_module is."""
    model, _ = tiny_denoiser("flux")
    tensors = import_target("networks.ia3:create_network")(1.0, None, None, None, None, model).file_state_dict()
    create = import_target("networks.lora:create_network_from_weights")
    with pytest.raises(ConfigError, match=f"{option} is given"):
        create(1.0, None, None, None, model, weights_sd=tensors, **pairs)
    lora = import_target("networks.lora:create_network")(
        1.0, 2, 1.0, None, None, model, train_norm="True"
    ).file_state_dict()
    del caplog.records[:]
    create(1.0, None, None, None, model, weights_sd=lora, **pairs)
    assert "does nothing" not in caplog.text
    mixed = {**lora, **{key: tensor for key, tensor in tensors.items() if "double_blocks_0_img_attn_qkv" in key}}
    mixed = {
        key: tensor
        for key, tensor in mixed.items()
        if "img_attn_qkv.lora" not in key and "img_attn_qkv.alpha" not in key
    }
    create(1.0, None, None, None, model, weights_sd=mixed, **pairs)
    assert f"{option} does nothing for 1 of" in caplog.text


@pytest.mark.parametrize(
    ("form", "make", "inputs"),
    [
        ("fp8_scaled", lambda: nn.Linear(32, 12), (2, 5, 32)), ("nf4", lambda: nn.Linear(32, 12), (2, 5, 32)),
        ("nf4", lambda: nn.Conv2d(32, 12, 3, padding=1), (2, 32, 6, 7)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in ("norm", "split_qkv")])
def test_weights_in_fewer_bits(name, form, make, inputs):
    """Kinds whose change depends on the weight, or that are made by its shape, see the weight, not the numbers that
    stand for it; merged, they change it in its form."""
    model = nn.Sequential(make()).requires_grad_(False)
    store_layers(model, form, convolutions=True)
    layer = model[0]
    wide = make()
    with torch.no_grad():
        wide.weight.copy_(weight_of(layer))
        wide.bias.copy_(layer.bias)
    x = torch.randn(*inputs, generator=torch.Generator().manual_seed(7))
    outputs = []
    for own in (layer, wide):
        torch.manual_seed(0)
        module = trained(make_adapter(ADAPTERS[name], own)).eval()
        forward = own.forward
        module.apply_to()
        with torch.no_grad():
            outputs.append(own(x))
        own.forward = forward
        module.merge_to()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    expected = stored(wide.weight, form)
    assert weight_of(layer).shape == wide.weight.shape and layer.weight.dtype == expected.data.dtype
    torch.testing.assert_close(weight_of(layer), expected.widened(), rtol=0.3, atol=0.02)


def test_marks_know_the_decomposed_kinds():
    assert {import_target(target).name for target in MARKS if import_target(target).module_class.decomposable} == {
        "LoRA",
        "LoHa",
        "LoKr",
        "GLoRA",
        "full",
    }
