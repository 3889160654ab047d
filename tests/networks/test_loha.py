"""LoHa: start values, memory of a step, dropouts, rates, norms and arguments."""

import pytest
import torch
from torch import nn

from library.core.errors import CheckpointError, ConfigError
from library.core.keyed_random import StepDraws, keyed_generator
from networks.kinds.registry import known_kind_of
from networks.loha import LoHaModule, create_network, create_network_from_weights, loha_delta
from tests.networks.tiny_denoisers import tiny_denoiser


def filled(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return adapter


def test_formula_of_a_convolution_by_hand():
    generator = torch.Generator().manual_seed(0)
    t1, t2 = (torch.randn(2, 3, 3, 2, generator=generator) for _ in range(2))
    a1, a2 = (torch.randn(2, 5, generator=generator) for _ in range(2))
    b1, b2 = (torch.randn(3, 4, generator=generator) for _ in range(2))
    delta = loha_delta((a1, b1), (a2, b2), 0.5, (t1, t2))
    halves = [
        sum(t[i, j, 1, 0] * a[i, 2] * b[j, 3] for i in range(2) for j in range(3)) for t, a,
        b in ((t1, a1, b1), (t2, a2, b2))
    ]  # fmt: skip
    torch.testing.assert_close(delta[2, 3, 1, 0], 0.5 * halves[0] * halves[1])


@pytest.mark.parametrize("tucker", [False, True])
def test_start_values(tucker):
    adapter = LoHaModule("name", nn.Conv2d(40, 50, 3), lora_dim=30, tucker=tucker)
    adapter.initialize(keyed_generator(1, "network init", "name"))
    again = LoHaModule("name", nn.Conv2d(40, 50, 3), lora_dim=30, tucker=tucker)
    again.initialize(keyed_generator(1, "network init", "name"))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    wanted = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0, "hada_t1": 0.1, "hada_t2": 0.1}
    for name, parameter in adapter.named_parameters():
        assert float(parameter.std()) == pytest.approx(wanted[name], rel=0.1), name
    assert not adapter.delta_weight().any()


def test_a_step_keeps_no_matrix_of_the_weights_size():
    layer = nn.Linear(60, 50).requires_grad_(False)
    adapter = filled(LoHaModule("name", layer, lora_dim=2)).train()
    adapter.apply_to()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        output = layer(torch.randn(1, 3, 60))
    own = {layer.weight.shape, layer.weight.T.shape}  # of the frozen layer, which is there anyway
    assert sum(shape in own for shape in kept) <= 1, kept
    output.square().sum().backward()
    recomputed = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    LoHaModule.recomputes, before = False, LoHaModule.recomputes
    try:
        torch.manual_seed(0)
        x = torch.randn(1, 3, 60)
        layer(x).square().sum().backward()
        plain = [parameter.grad.clone() for parameter in adapter.parameters()]
        adapter.zero_grad()
    finally:
        LoHaModule.recomputes = before
    layer(x).square().sum().backward()
    for one, other in zip(plain, (parameter.grad for parameter in adapter.parameters()), strict=True):
        torch.testing.assert_close(one, other)
    assert all(gradient.any() for gradient in recomputed)


@pytest.mark.parametrize("is_keyed", [True, False])
def test_row_dropout_is_one_mask_for_the_step(is_keyed):
    layer = nn.Linear(8, 400, bias=False).requires_grad_(False)
    adapter = filled(LoHaModule("name", layer, rank_dropout=0.25)).train()
    adapter.step_state.draws = StepDraws(1, 2, (0, 1)) if is_keyed else None
    adapter.apply_to()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = nn.functional.linear(x, layer.weight)
        change = layer(x) - plain
        whole = nn.functional.linear(x, adapter.delta_weight())
    dropped = change.abs().sum(0) < 1e-6
    assert 0.15 < dropped.float().mean() < 0.35
    torch.testing.assert_close(change[:, ~dropped], whole[:, ~dropped] / 0.75, rtol=1e-3, atol=1e-4)
    layer(x).square().sum().backward()  # the recomputed mask is that of the forward pass
    gone = adapter.hada_w1_a.grad.abs().sum(1) == 0
    assert not is_keyed or torch.equal(gone, dropped)
    assert 0.15 < gone.float().mean() < 0.35


def test_max_norm_scales_the_change():
    for tucker in (False, True):
        adapter = filled(LoHaModule("name", nn.Conv2d(4, 5, 3), lora_dim=2, tucker=tucker))
        norm = float(adapter.weight_norm())
        adapter.scale_weight(torch.tensor(0.3))
        assert float(adapter.delta_weight().norm()) == pytest.approx(0.3 * norm, rel=1e-4)


def test_groups_of_loraplus():
    model, _ = tiny_denoiser("flux")
    network = create_network(1.0, 2, 1.0, None, [None, None], model, loraplus_lr_ratio="4")
    groups, names = network.prepare_optimizer_params(None, 1e-3)
    assert names == ["unet", "unet plus"] and groups[1]["lr"] == pytest.approx(4e-3)
    assert {id(p) for p in groups[1]["params"]} == {id(m.hada_w2_a) for m in network.unet_loras}


@pytest.mark.parametrize(("pairs", "message"), [
    ({"dropout": "0.1"}, "no inner values"),
    ({"use_tuker": "True"}, "did you mean 'use_tucker'"),
    ({"factor": "4"}, "no argument 'factor'"),
    ({"split_qkv": "True"}, "no argument 'split_qkv'"),
])  # fmt: skip
def test_refused_arguments(pairs, message):
    with pytest.raises(ConfigError, match=message):
        create_network(1.0, 2, 1.0, None, [None, None], tiny_denoiser("flux")[0], **pairs)


def test_a_file_may_mix_kinds_and_each_layer_has_its_own_form():
    from networks.loha import KIND as loha
    from networks.lokr import KIND as lokr
    from networks.lora import KIND as lora

    model, _ = tiny_denoiser("sd")
    place = "lora_unet_down_blocks_0_resnets_0_"
    tensors = {f"{place}conv1.{key}": torch.randn(shape) for key, shape in {
        "hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3), "hada_w1_a": (2, 16), "hada_w1_b": (2, 16),
        "hada_w2_a": (2, 16), "hada_w2_b": (2, 16),
    }.items()}  # fmt: skip
    tensors |= {f"{place}conv2.{key}": torch.randn(shape) for key, shape in {
        "hada_w1_a": (16, 3), "hada_w1_b": (3, 144), "hada_w2_a": (16, 3), "hada_w2_b": (3, 144),
    }.items()}  # fmt: skip
    tensors |= {f"{place}time_emb_proj.lokr_w1": torch.randn(4, 8), f"{place}time_emb_proj.lokr_w2": torch.randn(4, 4)}
    tensors |= {
        "lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.randn(16, 2, 1, 1),
    }
    network, _ = create_network_from_weights(1.0, None, None, None, model, weights_sd=tensors)
    network.load_tensors(tensors)
    found = {
        module.lora_name.removeprefix(place): (type(module), module.lora_dim, float(module.alpha))
        for module in network.unet_loras
    }
    assert found == {
        "conv1": (loha.module_class, 2, 2.0), "conv2": (loha.module_class, 3, 3.0),
        "time_emb_proj": (lokr.module_class, 4, 4.0),
        "lora_unet_conv_in": (lora.module_class, 2, 2.0),
    }  # fmt: skip


def test_incomplete_tensors_are_told():
    tensors = {name: torch.zeros(2, 2) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    with pytest.raises(CheckpointError, match="no hada_w2_b"):
        known_kind_of({name: tensor for name, tensor in tensors.items() if name != "hada_w2_b"}, "name")
    with pytest.raises(CheckpointError, match="no hada_t2"):
        known_kind_of({**tensors, "hada_t1": torch.zeros(2, 2, 3, 3)}, "name")
