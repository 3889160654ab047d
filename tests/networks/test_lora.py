"""LoRA of one layer and of a whole network: the change is the same in forward, merge and file; dropout is keyed."""

import pytest
import torch
from torch import nn

from library.core.errors import CheckpointError, ConfigError
from library.core.keyed_random import StepDraws
from library.flux_models import Flux, FluxParams
from library.training import optimizers
from library.training.optimizers import OptimizerOptions
from networks.lora import LoRAModule, create_network, create_network_from_weights, fuse_pairs, lora_delta, split_pair

LAYERS = {
    "linear": lambda: nn.Linear(8, 6),
    "conv1x1": lambda: nn.Conv2d(8, 6, 1),
    "conv3x3": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "conv3x3_strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2),
}
KINDS = {"plain": {}, "tucker": {"tucker": True}, "split": {"split": (2, 3, 1)}}


def example_input(layer, batch=2):
    generator = torch.Generator().manual_seed(7)
    shape = (batch, 5, 8) if isinstance(layer, nn.Linear) else (batch, 8, 6, 7)
    return torch.randn(shape, generator=generator)


def adapter_for(layer, multiplier=1.0, **how):
    """An adapter with random weights, alpha != rank."""
    adapter = LoRAModule("lora_unet_layer", layer, multiplier, lora_dim=3, alpha=1.3, **how)
    generator = torch.Generator().manual_seed(3)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return adapter


def combinations():
    """(layer, kind) pairs that exist."""
    for layer in LAYERS:
        for kind in KINDS:
            if (
                (kind == "tucker" and layer.startswith("conv3x3"))
                or (kind == "split" and layer == "linear")
                or kind == "plain"
            ):
                yield layer, kind


class OpenLoRA(LoRAModule):
    """Leaves the ways that take fewer kernels, because its change is its own."""

    def output_change(self, x, multiplier=None):
        return super().output_change(x, multiplier)


def learned(module_class, dtype, is_plain, **dropouts):
    """(output, gradients of input, down and up) of a layer with an adapter in training."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).requires_grad_(False)
    own = layer.forward
    if not is_plain:  # as layers with stored numbers of other formats have
        layer.forward = lambda x: own(x)
    adapter = module_class("lora_unet_layer", layer, 0.5, lora_dim=3, alpha=1.3, **dropouts)
    adapter.step_state.draws = StepDraws(1, 2, (0, 1))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapter.apply_to()
    x = example_input(layer).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = layer(x)
    output.float().square().sum().backward()
    return output, x.grad, adapter.lora_down.weight.grad, adapter.lora_up.weight.grad


@pytest.mark.parametrize("dropouts", [{}, {"dropout": 0.5}, {"rank_dropout": 0.5}, {"module_dropout": 0.9999}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_with_fewer_kernels_give_the_same(dtype, dropouts):
    wanted = learned(OpenLoRA, dtype, is_plain=True, **dropouts)
    rounding = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    for is_plain in (True, False):
        found = learned(LoRAModule, dtype, is_plain, **dropouts)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **rounding)


def test_a_base_in_another_type_is_summed_in_the_wider():
    layer = nn.Linear(8, 6).to(torch.bfloat16)
    x = example_input(layer).to(torch.bfloat16)
    adapter = adapter_for(layer)
    adapter.apply_to()
    hooked = layer(x)
    change = x.float() @ lora_delta(adapter.lora_down.weight, adapter.lora_up.weight, adapter.scale).mT
    assert hooked.dtype == torch.bfloat16
    torch.testing.assert_close(hooked, (adapter.org_forward(x) + change).bfloat16(), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize(("layer", "kind"), list(combinations()))
@pytest.mark.parametrize("multiplier", [1.0, 0.5, 0.0, -1.0])
def test_hooked_merged_and_reloaded_forward_are_equal(layer, kind, multiplier):
    torch.manual_seed(0)
    layer = LAYERS[layer]()
    x = example_input(layer)
    plain = layer(x)
    adapter = adapter_for(layer, multiplier, **KINDS[kind])
    adapter.apply_to()
    hooked = layer(x)
    adapter.remove_from()
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=0)
    assert (multiplier == 0) == torch.equal(hooked, plain)

    how = {**KINDS[kind]}
    reloaded = LoRAModule("lora_unet_layer", layer, multiplier, lora_dim=3, alpha=99.0, **how)
    reloaded.load_file_tensors(adapter.file_tensors())
    reloaded.apply_to()
    torch.testing.assert_close(layer(x), hooked, rtol=0, atol=0)
    reloaded.remove_from()

    adapter.merge_to()
    torch.testing.assert_close(layer(x), hooked, rtol=1e-5, atol=1e-5)


def test_bf16_layer_gets_the_float32_change_rounded_once():
    layer = nn.Linear(8, 6).to(torch.bfloat16)
    x = example_input(layer).to(torch.bfloat16)
    adapter = adapter_for(layer)
    base = layer(x)
    change = nn.functional.linear(x.float(), adapter.delta_weight())
    adapter.apply_to()
    output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, (base.float() + change).to(torch.bfloat16), rtol=0, atol=0)


def test_autocast_and_float8_weights():
    layer = nn.Linear(8, 6).to(torch.float8_e4m3fn)
    adapter = adapter_for(layer)
    adapter.apply_to()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(example_input(layer))
        output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert adapter.lora_up.weight.grad.dtype == torch.float32
    before = layer.weight.float()
    adapter.merge_to()
    assert layer.weight.dtype == torch.float8_e4m3fn and not torch.equal(layer.weight.float(), before)


def test_initial_change_is_zero():
    adapter = LoRAModule("lora_unet_layer", nn.Linear(8, 6), lora_dim=3)
    assert not adapter.delta_weight().any() and adapter.lora_down.weight.any()


def test_alpha_stays_float32_and_the_scale_follows_it():
    adapter = LoRAModule("lora_unet_layer", nn.Linear(8, 6), lora_dim=4, alpha=12.34)
    adapter.to(torch.bfloat16)
    assert adapter.lora_up.weight.dtype == torch.bfloat16
    assert adapter.alpha.dtype == torch.float32 and float(adapter.alpha) == pytest.approx(12.34)
    adapter.load_state_dict({**adapter.state_dict(), "alpha": torch.tensor(2.0)})
    assert adapter.scale == 0.5
    assert LoRAModule("n", nn.Linear(8, 6), lora_dim=4, alpha=0).scale == 1.0


def test_grouped_convolution_is_refused():
    with pytest.raises(ConfigError, match="grouped"):
        LoRAModule("lora_unet_layer", nn.Conv2d(8, 8, 3, groups=2))


def test_kernel_axes_of_size_one_are_added_or_removed_on_load():
    layer = nn.Conv2d(8, 6, 1)
    tensors = adapter_for(layer).file_tensors()
    flat = {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}
    adapter = LoRAModule("lora_unet_layer", layer, lora_dim=3)
    adapter.load_file_tensors(flat)
    assert torch.equal(adapter.lora_up.weight, tensors["lora_up.weight"])
    with pytest.raises(CheckpointError, match="shape"):
        adapter.load_file_tensors({**flat, "lora_up.weight": torch.zeros(6, 4)})


def test_lora_delta_refuses_different_ranks():
    with pytest.raises(ValueError, match="ranks"):
        lora_delta(torch.zeros(3, 8), torch.zeros(6, 2), 1.0)


def test_split_file_is_fused_with_alpha_times_parts():
    layer = nn.Linear(8, 6)
    adapter = adapter_for(layer, split=(2, 3, 1))
    tensors = adapter.file_tensors()
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "lora_down.weight": [9, 8], "lora_up.weight": [6, 9], "alpha": []
    }
    scale = float(tensors["alpha"]) / 9
    torch.testing.assert_close(
        lora_delta(tensors["lora_down.weight"], tensors["lora_up.weight"], scale), adapter.delta_weight()
    )
    with pytest.raises(CheckpointError, match="split_qkv"):
        dense = {**tensors, "lora_up.weight": torch.ones(6, 9)}
        LoRAModule("lora_unet_layer", layer, lora_dim=3, split=(2, 3, 1)).load_file_tensors(dense)


def test_fused_pairs_are_split_again():
    pairs = [(torch.randn(2, 5), torch.randn(rows, 2)) for rows in (3, 4)]
    again = split_pair(*fuse_pairs(pairs), [3, 4])
    assert all(
        torch.equal(a, b) for pair, other in zip(pairs, again, strict=True) for a, b in zip(pair, other, strict=True)
    )


# -- dropout ---------------------------------------------------------------------------------------------------------


def output_in_training(adapter, layer, x, draws):
    adapter.train()
    adapter.step_state.draws = draws
    adapter.apply_to()
    try:
        return layer(x)
    finally:
        adapter.remove_from()


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
@pytest.mark.parametrize("layer", ["linear", "conv3x3"])
def test_dropout_depends_on_the_sample_alone(kind, layer):
    torch.manual_seed(0)
    layer = LAYERS[layer]()
    adapter = adapter_for(layer, **{kind: 0.5})
    x = example_input(layer, batch=4)
    whole = output_in_training(adapter, layer, x, StepDraws(1, 5, (0, 1, 2, 3)))
    again = output_in_training(adapter, layer, x, StepDraws(1, 5, (0, 1, 2, 3)))
    assert torch.equal(whole, again)  # as when a checkpointed block runs again
    split = [output_in_training(adapter, layer, x[i : i + 2], StepDraws(1, 5, (i, i + 1))) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(split), whole)
    other_step = output_in_training(adapter, layer, x, StepDraws(1, 6, (0, 1, 2, 3)))
    assert not torch.equal(other_step, whole)
    adapter.eval()
    adapter.apply_to()
    evaluated = layer(x)
    assert not torch.allclose(evaluated, whole)
    adapter.remove_from()


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout"])
def test_dropout_keeps_the_mean(kind):
    layer = nn.Linear(8, 6)
    adapter = adapter_for(layer, **{kind: 0.3})
    x = example_input(layer, batch=1)
    mean = torch.stack([output_in_training(adapter, layer, x, StepDraws(1, step, (0,))) for step in range(3000)]).mean(
        0
    )
    adapter.eval()
    adapter.apply_to()
    torch.testing.assert_close(mean, layer(x), rtol=0, atol=0.08)


def test_module_dropout_is_one_decision_per_step_for_all_samples():
    layer = nn.Linear(8, 6)
    adapter = adapter_for(layer, module_dropout=0.4)
    x = example_input(layer)
    plain = layer(x)
    dropped = []
    for step in range(300):
        first = output_in_training(adapter, layer, x, StepDraws(1, step, (0, 1)))
        second = output_in_training(adapter, layer, x, StepDraws(1, step, (6, 7)))  # another micro-batch or rank
        assert torch.equal(first, second)
        dropped.append(torch.equal(first, plain))
    assert 0.3 < sum(dropped) / 300 < 0.5
    step = dropped.index(True)
    output_in_training(adapter, layer, x, StepDraws(1, step, (0, 1))).sum().backward()
    assert adapter.lora_up.weight.grad is not None and not adapter.lora_up.weight.grad.any()


def test_rows_that_are_no_multiple_of_the_samples_are_an_error():
    adapter = adapter_for(nn.Linear(8, 6), dropout=0.5)
    with pytest.raises(ValueError, match="rows"):
        output_in_training(adapter, adapter.org_module, torch.zeros(3, 8), StepDraws(1, 0, (0, 1)))


# -- networks --------------------------------------------------------------------------------------------------------


def tiny_flux(depth=2):
    torch.manual_seed(0)
    return Flux(FluxParams(
        vec_in_dim=16, context_in_dim=24, hidden_size=32, num_heads=2, depth=depth, depth_single_blocks=2,
        axes_dim=(4, 6, 6)
    ))


def network_for(denoiser, rank=4, alpha=1.0, **pairs):
    return create_network(1.0, rank, alpha, None, [None, None], denoiser, **pairs)


def ranks(network):
    return {lora.lora_name.removeprefix("lora_unet_"): lora.lora_dim for lora in network.unet_loras}


def test_part_ranks_zero_leaves_out():
    got = ranks(network_for(tiny_flux(), img_attn_dim="2", txt_mod_dim="0", single_dim="3"))
    assert got["double_blocks_0_img_attn_qkv"] == got["double_blocks_1_img_attn_proj"] == 2
    assert got["single_blocks_0_linear1"] == got["single_blocks_1_linear2"] == 3
    assert got["single_blocks_0_modulation_lin"] == got["double_blocks_0_txt_attn_qkv"] == 4
    assert not any("txt_mod" in name for name in got)


def test_blocks_and_precedence():
    pairs = {
        "train_double_block_indices": "1", "network_reg_dims": r"double_blocks_\d_img=7,linear1=5", "img_attn_dim": "2",
        "single_dim": "3",
    }  # fmt: skip
    got = ranks(network_for(tiny_flux(), **pairs))
    assert not any(name.startswith("double_blocks_0") for name in got)  # the selection of blocks beats everything
    assert got["double_blocks_1_img_attn_qkv"] == 7  # an expression beats the rank of a part
    assert got["single_blocks_0_linear1"] == 5 and got["single_blocks_0_linear2"] == 3
    assert got["double_blocks_1_txt_mlp_0"] == 4


@pytest.mark.parametrize(("choice", "count"), [("all", 2 * 10 + 2 * 3), ("double", 20), ("single", 6)])
def test_train_blocks(choice, count):
    assert len(network_for(tiny_flux(), train_blocks=choice).unet_loras) == count


def test_in_dims():
    got = ranks(network_for(tiny_flux(), in_dims="[1,2,0,5,6]"))
    extra = {name: rank for name, rank in got.items() if "_in" in name.split("_blocks")[0]}
    assert extra == {
        "img_in": 1, "time_in_in_layer": 2, "time_in_out_layer": 2, "guidance_in_in_layer": 5,
        "guidance_in_out_layer": 5, "txt_in": 6,
    }  # fmt: skip


def test_patterns_leave_layers_out():
    got = ranks(network_for(tiny_flux(), exclude_patterns=r"[r'double_blocks\..*']", include_patterns=r".*img_mlp\.0"))
    assert sorted(name for name in got if name.startswith("double")) == [
        "double_blocks_0_img_mlp_0",
        "double_blocks_1_img_mlp_0",
    ]


@pytest.mark.parametrize(("pairs", "message"), [
    ({"rank_dropuot": "0.1"}, "did you mean 'rank_dropout'"),
    ({"rank_dropout": "much"}, "rank_dropout=much"),
    ({"rank_dropout": "1"}, "below 1"),
    ({"split_qkv": "maybe"}, "truth value"),
    ({"train_blocks": "some"}, "all, double, single"),
    ({"in_dims": "[1,2]"}, "5 ranks"),
    ({"train_single_block_indices": "3-1"}, "3-1"),
    ({"train_single_block_indices": "0-2"}, "blocks 0-1"),
    ({"network_reg_dims": "(=3"}, "regular expression"),
    ({"network_reg_dims": "qkv"}, "expression=value"),
    ({"ggpo_sigma": "0.1"}, "ggpo_beta"),
    ({"conv_alpha": "1"}, "without conv_dim"),
    ({"use_tucker": "True"}, "without conv_dim"),
    ({"wd_on_output": "False"}, "without dora_wd"),
])  # fmt: skip
def test_bad_arguments_are_refused(pairs, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        network_for(tiny_flux(), **pairs)


def test_all_bad_arguments_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        network_for(tiny_flux(), rank_dropout="x", split_qkv="y", nonsense="1")
    assert len(caught.value.problems) == 3


def test_regex_mapping_with_commas_and_json():
    assert ranks(network_for(tiny_flux(), network_reg_dims=r"linear1{1,2}=5"))["single_blocks_0_linear1"] == 5
    assert ranks(network_for(tiny_flux(), network_reg_dims='{"linear[12]": 6}'))["single_blocks_0_linear2"] == 6


def test_groups_of_rates_and_loraplus():
    network = network_for(tiny_flux(), loraplus_lr_ratio="16", network_reg_lrs="img_mlp=1e-3,txt_mlp=0")
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5, 2e-5], None, 1e-4)
    assert names == ["unet", "unet plus", "unet reg_lr_0", "unet reg_lr_0 plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 16e-4, 1e-3, 16e-3])
    mlp = [lora for lora in network.unet_loras if "txt_mlp" in lora.lora_name]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert not any(id(parameter) in trained for lora in mlp for parameter in lora.parameters())
    ups = [lora.lora_up.weight for lora in network.unet_loras if "_mlp" not in lora.lora_name]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in ups}


def test_named_weights_are_excluded_from_weight_decay(caplog):
    network = network_for(tiny_flux(), loraplus_lr_ratio="2", excludes_weight_decay="['img_mlp.*lora_up','nowhere']")
    groups, names = network.prepare_optimizer_params(None, None, 1e-4)
    assert names == ["unet", "unet plus", "unet plus undecayed"]
    assert "no weight of the network has 'nowhere' in its name" in caplog.text and "img_mlp" not in caplog.text
    ups = [lora.lora_up.weight for lora in network.unet_loras if "img_mlp" in lora.lora_name]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in ups}
    assert [group.get("weight_decay") for group in groups] == [None, None, 0.0]
    build = optimizers.build(OptimizerOptions(learning_rate=1e-4), groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for parameter in parameters:
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build.optimizer.step()
    still = {id(p) for p in parameters if bool((p == 1).all())}
    assert still == {id(p) for p in ups} and build.notices == []
    plain = optimizers.build(OptimizerOptions(optimizer_type="SGDNesterov"), groups)
    assert "weight_decay of SGDNesterov is 0" in plain.notices[0]


def test_rates_of_zero_and_none():
    network = network_for(tiny_flux())
    assert network.prepare_optimizer_params(None, 0.0, 1e-4) == ([], [])
    groups, names = network.prepare_optimizer_params(None, None, 1e-4)
    assert names == ["unet"] and groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("pairs", [{}, {"split_qkv": "true"}])
def test_network_is_the_same_after_saving_and_loading(tmp_path, pairs):
    denoiser = tiny_flux()
    network = network_for(denoiser, alpha=2.0, **pairs)
    generator = torch.Generator().manual_seed(0)
    for lora in network.unet_loras:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, generator=generator)
    deltas = {lora.lora_name: lora.delta_weight() for lora in network.unet_loras}
    path = str(tmp_path / "a.safetensors")
    network.save_weights(path, torch.float32, {"ss_seed": "1"})
    for how in ({}, pairs):
        again, weights = create_network_from_weights(1.0, path, None, [None, None], denoiser, **how)
        assert not again.load_tensors(weights)["missing"]
        for lora in again.unet_loras:
            torch.testing.assert_close(lora.delta_weight(), deltas[lora.lora_name])
    assert all(lora.lora_dim == 4 for lora in again.unet_loras)
    fresh = network_for(denoiser, alpha=7.0, **pairs)
    assert fresh.load_weights(path) == {"missing": [], "unexpected": []}
    for lora in fresh.unet_loras:
        torch.testing.assert_close(lora.delta_weight(), deltas[lora.lora_name])


def test_saved_dtype_hashes_and_equal_bytes(tmp_path):
    from safetensors import safe_open

    network = network_for(tiny_flux(), alpha=12.34)
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for path in paths:
        network.save_weights(path, torch.bfloat16, {"ss_b": "1", "ss_a": "2"})
    with safe_open(paths[0], "pt") as file:
        assert len(file.metadata()["sshs_model_hash"]) == 64 and len(file.metadata()["sshs_legacy_hash"]) == 8
        for key in file.keys():
            assert file.get_tensor(key).dtype == (torch.float32 if key.endswith("alpha") else torch.bfloat16)
        assert float(file.get_tensor("lora_unet_double_blocks_0_img_attn_qkv.alpha")) == pytest.approx(12.34)
    assert open(paths[0], "rb").read() == open(paths[1], "rb").read()
    network.save_weights(str(tmp_path / "c.pt"), None, None)
    assert torch.load(tmp_path / "c.pt", weights_only=True)[
        "lora_unet_double_blocks_0_img_attn_qkv.alpha"
    ] == torch.tensor(12.34)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "c.pt"]


def test_file_of_another_rank_is_refused(tmp_path):
    path = str(tmp_path / "a.safetensors")
    network_for(tiny_flux(), rank=2).save_weights(path, None, None)
    with pytest.raises(CheckpointError, match="lora_down.weight has shape"):
        network_for(tiny_flux(), rank=4).load_weights(path)


def test_merging_a_network_equals_its_forward():
    denoiser = tiny_flux()
    network = network_for(denoiser)
    for lora in network.unet_loras:
        nn.init.normal_(lora.lora_up.weight, std=0.1)
    inputs = denoiser_inputs(denoiser)
    with torch.no_grad():
        plain = denoiser(**inputs)
        network.apply_to([None, None], denoiser, True, True)
        hooked = denoiser(**inputs)
        network.remove_from()
        network.merge_to([None, None], denoiser, network.file_state_dict())
        torch.testing.assert_close(denoiser(**inputs), hooked, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, hooked, atol=1e-3)


def denoiser_inputs(denoiser, batch=2):
    from library.flux_utils import prepare_img_ids

    params, generator = denoiser.params, torch.Generator().manual_seed(5)
    return {
        "img": torch.randn(batch, 6, params.in_channels, generator=generator),
        "img_ids": prepare_img_ids(batch, 2, 3),
        "txt": torch.randn(batch, 3, params.context_in_dim, generator=generator),
        "txt_ids": torch.zeros(batch, 3, 3),
        "timesteps": torch.tensor([0.3, 0.8][:batch]),
        "y": torch.randn(batch, params.vec_in_dim, generator=generator),
        "guidance": torch.full((batch,), 3.5),
    }


def test_max_norm():
    network = network_for(tiny_flux())
    for number, lora in enumerate(network.unet_loras):
        nn.init.normal_(lora.lora_up.weight, std=0.02 * (number % 3))
    before = [float(lora.delta_weight().detach().norm()) for lora in network.unet_loras]
    scaled, mean, largest = network.apply_max_norm_regularization(0.05, "cpu")
    after = [float(lora.delta_weight().detach().norm()) for lora in network.unet_loras]
    assert after == pytest.approx([min(norm, 0.05) for norm in before], rel=1e-4)
    assert scaled == sum(norm > 0.05 for norm in before)
    assert (mean, largest) == pytest.approx((sum(after) / len(after), max(after)), rel=1e-4)
    empty = network_for(tiny_flux(), train_single_block_indices="none", train_double_block_indices="none")
    assert empty.apply_max_norm_regularization(1.0) == (0, 0.0, 0.0)


def test_start_weights_depend_on_seed_and_name():
    first, second = network_for(tiny_flux()), network_for(tiny_flux(), train_blocks="single")
    first.initialize(11)
    second.initialize(11)
    same = {lora.lora_name: lora.lora_down.weight for lora in first.unet_loras}
    assert all(torch.equal(lora.lora_down.weight, same[lora.lora_name]) for lora in second.unet_loras)
    second.initialize(12)
    assert not any(torch.equal(lora.lora_down.weight, same[lora.lora_name]) for lora in second.unet_loras)


def test_ggpo_norms_and_perturbation():
    layer = nn.Linear(8, 6)
    denoiser = tiny_flux(depth=1)
    network = network_for(denoiser, alpha=2.0, ggpo_sigma="0.1", ggpo_beta="0.5")
    lora = network.unet_loras[0]
    layer = lora.org_module
    nn.init.normal_(lora.lora_up.weight)
    lora.lora_down.weight.grad, lora.lora_up.weight.grad = (
        torch.randn_like(lora.lora_down.weight),
        torch.randn_like(lora.lora_up.weight),
    )
    network.update_grad_norms()
    network.update_norms()
    up, down = lora.lora_up.weight.detach(), lora.lora_down.weight.detach()
    gradient = lora.scale * (up @ lora.lora_down.weight.grad + lora.lora_up.weight.grad @ down)
    torch.testing.assert_close(lora.ggpo.grad_norms, gradient.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    estimate = layer.weight.norm(dim=1).mean()
    expected = (estimate**2 + lora.delta_weight().square().sum(1, keepdim=True)).sqrt()
    torch.testing.assert_close(lora.ggpo.combined_norms, expected.detach(), rtol=1e-4, atol=1e-5)

    x = torch.randn(2, layer.in_features)
    network.set_step_draws(StepDraws(1, 2, (0, 1)))
    network.apply_to([None, None], denoiser, True, True)
    network.train()
    noisy, again = layer(x), layer(x)
    network.eval()
    assert torch.equal(noisy, again) and not torch.allclose(noisy, layer(x), atol=1e-3)
    restored = network_for(denoiser, ggpo_sigma="0.1", ggpo_beta="0.5").unet_loras[0]
    restored.ggpo.load_state(lora.ggpo.state(), torch.device("cpu"))
    assert torch.equal(restored.ggpo.grad_norms, lora.ggpo.grad_norms)


def test_state_dict_has_the_names_of_the_file():
    denoiser = tiny_flux()
    network = network_for(denoiser)
    network.apply_to([None, None], denoiser, True, True)
    assert set(network.state_dict()) == set(network.file_state_dict())
    assert not any("lora" in key for key in denoiser.state_dict())


def test_chunks_of_one_sample_have_masks_of_their_own():
    """Text encoders see several rows per sample; the masks still follow the sample."""
    layer = nn.Linear(8, 6)
    adapter = adapter_for(layer, dropout=0.5)
    x = example_input(layer, batch=1).expand(4, -1, -1)
    whole = output_in_training(adapter, layer, x, StepDraws(1, 5, (0, 1)))
    assert not any(torch.equal(whole[i], whole[j]) for i in range(4) for j in range(i))
    torch.testing.assert_close(output_in_training(adapter, layer, x[:2], StepDraws(1, 5, (1,))), whole[2:])


def test_rows_with_gaps_between_them_reach_the_layer_as_they_are(monkeypatch: pytest.MonkeyPatch):
    """Texts of a sequence with pictures, say: put together they would be for another kernel, with other last digits
    than without an adapter."""
    layer, x, given = nn.Linear(8, 6), torch.randn(2, 7, 8), []
    adapter_for(layer).apply_to()

    def linear(rows, weight, *bias, known=nn.functional.linear):
        given.extend([rows] * (weight is layer.weight))
        return known(rows, weight, *bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    for part in (x[:, :3], x.transpose(0, 1)):
        layer(part)
        assert given[-1].shape == part.shape and given[-1].stride() == part.stride()
    layer(x)
    assert given[-1].shape == (14, 8)
