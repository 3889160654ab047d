"""OFT, Diag-OFT and BOFT: rotations, their limit, blocks, target layers, names, dropouts and arguments."""

import logging

import pytest
import torch
from torch import nn

from library.components.unet_models import UNetParams
from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.sd_models import UNet2DConditionModel
from networks import boft, diag_oft, oft, oft_flux
from networks.boft import BOFTModule
from networks.diag_oft import DiagOFTModule
from networks.kinds.registry import kind_of
from networks.lora import create_network_from_weights as create_any_from_weights
from networks.oft import OFTModule, cayley
from tests.networks.test_loha import filled
from tests.networks.tiny_denoisers import tiny_denoiser

MODULES = {"oft": (OFTModule, 4), "diag_oft": (DiagOFTModule, 4), "boft": (BOFTModule, 8)}


def matrix_of(adapter):
    """The matrix that a layer's weight is multiplied with: the change of the unit matrix, which is the layer's weight
    here."""
    return adapter.org_module.weight + adapter.get_weight(1.0)


def rotation_of(name, rows=24, alpha=0.0, **more):
    layer = nn.Linear(rows, rows).requires_grad_(False)
    nn.init.eye_(layer.weight)
    module, rank = MODULES[name]
    return filled(module("name", layer, lora_dim=rank if name != "boft" else 6, alpha=alpha, **more))


@pytest.mark.parametrize("name", MODULES)
def test_what_is_trained_is_a_rotation(name):
    matrix = matrix_of(rotation_of(name)).detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24), rtol=1e-4, atol=1e-5)
    assert (matrix - torch.eye(24)).abs().max() > 0.1
    # a butterfly reaches rows in other blocks, a block-diagonal rotation does not
    size = {"oft": 6, "diag_oft": 4, "boft": 6}[name]
    outside = matrix * (1 - torch.block_diag(*[torch.ones(size, size)] * (24 // size)))
    assert (outside.abs().max() > 0.01) == (name == "boft")


def test_cayley_by_hand():
    angle = 0.3
    block = torch.tensor([[[0.0, angle], [0.0, 0.0]]])  # Q = [[0, a], [-a, 0]]
    turn = 2 * torch.atan(torch.tensor(angle))
    expected = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])[None]
    torch.testing.assert_close(cayley(block), expected)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.05, 100.0])
def test_the_limit_is_alpha_times_rows(alpha):
    blocks = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    skew = blocks - blocks.mT
    rotations = cayley(blocks, alpha * 12)
    identity = torch.eye(4)
    found = torch.linalg.solve(rotations + identity, rotations - identity)  # Q = (R + I)^-1 (R - I)
    limit = min(alpha * 12, float(skew.norm())) if alpha else float(skew.norm())
    assert float(found.norm()) == pytest.approx(limit, rel=1e-3)
    torch.testing.assert_close(found / found.norm(), skew / skew.norm(), rtol=1e-3, atol=1e-4)


def test_alpha_is_no_scale():
    assert OFTModule("name", nn.Linear(8, 8), alpha=0.0).file_tensors()["alpha"] == 0.0
    adapter = OFTModule("name", nn.Linear(8, 8), alpha=None)
    assert adapter.scale == 1.0 and float(adapter.alpha) == pytest.approx(1e-3)
    plain = {"oft_blocks": torch.randn(2, 4, 4)}
    loaded = OFTModule("name", nn.Linear(8, 8), shapes={"oft_blocks": (2, 4, 4)}, alpha=3.0)
    loaded.load_file_tensors(plain)
    assert float(loaded.alpha) == 0.0  # a file without one has no limit


def test_blocks_by_name():
    def shapes(module, rows, rank):
        return list(module("name", nn.Linear(8, rows), lora_dim=rank, alpha=0.0).oft_blocks.shape)

    assert shapes(OFTModule, 24, 4) == [4, 6, 6]
    assert shapes(DiagOFTModule, 24, 4) == [6, 4, 4]
    assert shapes(DiagOFTModule, 320, 7) == [64, 5, 5]
    assert shapes(BOFTModule, 32, 4) == [4, 8, 4, 4]
    assert shapes(BOFTModule, 320, 10) == [6, 32, 10, 10]
    assert shapes(BOFTModule, 6, 6) == [1, 1, 6, 6]


@pytest.mark.parametrize(("module", "rows", "rank", "message"), [
    (OFTModule, 30, 4, r"30 rows do not divide into 4 blocks.*1, 2, 3, 5, 6"),
    (BOFTModule, 3072, 4, "--network_dim 6 or more"),
    (BOFTModule, 640, 4, "--network_dim 10 or more"),
    (BOFTModule, 15, 4, "exclude this layer"),
    (DiagOFTModule, 35, 4, "--network_dim 5 or more"),
    (DiagOFTModule, 17, 4, "exclude this layer"),
])  # fmt: skip
def test_rows_that_cannot_be_cut(module, rows, rank, message):
    with pytest.raises(ConfigError, match=message):
        module("name", nn.Linear(4, rows), lora_dim=rank)


@pytest.mark.parametrize(("pairs", "count"), [
    ({}, 16 * 8), ({"enable_all_linear": "True"}, 192), ({"enable_all_linear": "true", "enable_conv": "True"}, 278),
])  # fmt: skip
def test_layers_of_stable_diffusion(pairs, count):
    with torch.device("meta"):
        model = UNet2DConditionModel(UNetParams())
    network = oft.create_network(1.0, 4, 0.001, None, [None], model, **pairs)
    assert len(network.unet_loras) == count
    assert all(module.lora_name.startswith("oft_unet_") for module in network.unet_loras)
    kernels = [module for module in network.unet_loras if getattr(module.org_module, "kernel_size", (1, 1)) != (1, 1)]
    assert bool(kernels) == ("enable_conv" in pairs)
    assert all(module.lora_dim == 4 and float(module.alpha) == pytest.approx(1e-3) for module in kernels)


def test_names_and_parts_of_flux():
    model, _ = tiny_denoiser("flux")
    network = oft_flux.create_network(1.0, 4, 0.001, None, [None, None], model, enable_all_linear="True")
    shapes = {key: list(tensor.shape) for key, tensor in network.file_state_dict().items() if not key.endswith("alpha")}
    place = "oft_unet_double_blocks_0_"
    assert [shapes[f"{place}img_attn_qkv.oft_blocks.{i}"] for i in range(3)] == [[4, 8, 8]] * 3
    assert shapes[f"{place}txt_attn_proj.oft_blocks.0"] == [4, 8, 8]
    assert [shapes[f"oft_unet_single_blocks_0_linear1.oft_blocks.{i}"] for i in range(4)] == [[4, 8, 8]] * 3 + [
        [4, 32, 32]
    ]
    assert f"{place}img_attn_proj.oft_blocks.1" not in shapes
    few = oft.create_network(1.0, 4, 0.001, None, [None, None], model)
    assert sorted(m.lora_name.removeprefix(place) for m in few.unet_loras) == [
        "img_attn_proj", "img_attn_qkv", "txt_attn_proj", "txt_attn_qkv"
    ]  # fmt: skip
    plain = diag_oft.create_network(1.0, 4, 0.001, None, [None, None], model)
    assert {m.lora_name for m in plain.unet_loras} == {
        m.lora_name.replace("oft_unet", "lora_unet") for m in few.unet_loras
    }
    again, _ = oft.create_network_from_weights(1.0, None, None, [None, None], model, weights_sd=few.file_state_dict())
    assert set(again.file_state_dict()) == set(few.file_state_dict())


def test_layers_of_the_other_families():
    expected = {"sdxl": ("attn1", "attn2"), "anima": ("self_attn", "cross_attn")}
    for family, parts in expected.items():
        network = boft.create_network(
            1.0, 6, 0.0, None, [None, None][: 2 if family == "sdxl" else 1], tiny_denoiser(family)[0]
        )
        assert network.unet_loras and all(
            any(part in module.lora_name for part in parts) for module in network.unet_loras
        )


@pytest.mark.parametrize(("module", "pairs", "message"), [
    (oft, {"conv_dim": "4"}, "enable_conv=True"), (oft, {"use_tucker": "True"}, "no argument 'use_tucker'"),
    (oft, {"rescaled": "True"}, "no argument 'rescaled'"), (oft, {"dropout": "0.5"}, "no inner values"),
    (diag_oft, {"loraplus_lr_ratio": "16"}, "LoRA\\+"), (boft, {"enable_con": "True"}, "did you mean 'enable_conv'"),
    (boft, {"dora_wd": "True"}, "no argument 'dora_wd'"),
])  # fmt: skip
def test_refused_arguments(module, pairs, message):
    with pytest.raises(ConfigError, match=message):
        module.create_network(1.0, 4, 0.001, None, [None], tiny_denoiser("sd")[0], **pairs)


def test_flux_has_no_convolutions_and_no_text_encoder_to_train():
    for pairs in ({"enable_conv": "True"}, {"train_t5xxl": "True"}, {"train_blocks": "double"}):
        with pytest.raises(ConfigError, match="no argument"):
            oft.check_network_args(pairs, "flux")
    block = type("CLIPAttention", (nn.Sequential,), {})(nn.Linear(4, 4))
    network = oft.create_network(1.0, 4, 0.001, None, [nn.Sequential(block)], tiny_denoiser("sd")[0])
    assert network.unet_loras and not network.text_encoder_loras


def test_the_meaning_of_alpha_is_told(caplog):
    with caplog.at_level(logging.INFO):
        oft.create_network(1.0, 4, 1.0, None, [None], tiny_denoiser("sd")[0])
    assert "alpha is no scale" in caplog.text and "alpha 1 " in caplog.text


@pytest.mark.parametrize("name", MODULES)
def test_block_dropout_leaves_a_rotation(name):
    adapter = rotation_of(name, rank_dropout=0.5).train()
    adapter.step_state.draws = StepDraws(3, 1, (0,))
    matrix = (adapter.org_module.weight + adapter.step_weight()).detach()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(matrix, matrix_of(adapter), atol=1e-3)
    assert torch.equal(matrix, (adapter.org_module.weight + adapter.step_weight()).detach())
    adapter.step_state.draws = StepDraws(3, 2, (0,))
    assert not torch.equal(matrix, (adapter.org_module.weight + adapter.step_weight()).detach())
    assert torch.equal(adapter.eval().step_weight(), adapter.get_weight())


@pytest.mark.parametrize("name", MODULES)
def test_norm_limit_counts_the_free_matrices(name):
    adapter = rotation_of(name)
    norm = float(adapter.weight_norm())
    assert norm == pytest.approx(float(adapter.oft_blocks.norm()), rel=1e-5)
    adapter.scale_weight(torch.tensor(0.25))
    assert float(adapter.weight_norm()) == pytest.approx(norm / 4, rel=1e-5)
    matrix = matrix_of(adapter)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24), rtol=1e-4, atol=1e-5)


def test_kinds_with_the_same_name_are_told_apart_by_their_axes():
    assert kind_of({"oft_blocks": torch.zeros(2, 4, 4)}) is oft.KIND
    assert kind_of({"oft_blocks.0": torch.zeros(2, 4, 4)}) is oft.KIND
    assert kind_of({"oft_blocks": torch.zeros(3, 2, 4, 4)}) is boft.KIND
    assert kind_of({"oft_blocks": torch.zeros(4, 4)}) is None


def test_file_of_sd_scripts_for_any_network_module(tmp_path):
    """Both prefixes load, through OFT's own module and through that of LoRA."""
    model, inputs = tiny_denoiser("sd")
    made = oft.create_network(1.0, 4, 0.0, None, [None], model)
    for module in made.unet_loras:
        filled(module)
    tensors = made.file_state_dict()
    made.apply_to(None, model, False, True)
    made.eval()
    with torch.no_grad():
        expected = model(*inputs)
        made.remove_from()
        for prefix in ("oft_unet_", "lora_unet_"):
            renamed = {key.replace("oft_unet_", prefix): tensor for key, tensor in tensors.items()}
            for create in (oft.create_network_from_weights, create_any_from_weights):
                network, _ = create(1.0, None, None, [None], model, weights_sd=renamed)
                assert network.load_tensors(renamed) == {"missing": [], "unexpected": []}
                network.apply_to(None, model, False, True)
                torch.testing.assert_close(model(*inputs), expected)
                network.remove_from()


def test_layers_that_cannot_be_cut_are_told_together():
    with pytest.raises(ConfigError) as caught:
        oft.create_network(1.0, 5, 0.001, None, [None], tiny_denoiser("sd")[0])
    assert len(caught.value.problems) == 6 and "more layers" in caught.value.problems[-1]
