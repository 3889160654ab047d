"""LoKr: factors, which half is taken apart, the rule of plain halves, dropouts, norms and arguments."""

import logging

import pytest
import torch
from torch import nn

from library.core.errors import CheckpointError, ConfigError
from library.core.keyed_random import StepDraws
from networks.kinds.factorization import factorization
from networks.kinds.registry import known_kind_of, weight_change
from networks.lokr import LoKrModule, create_network, create_network_from_weights, lokr_delta, lokr_shapes
from networks.lora import create_network_from_weights as create_any_from_weights
from tests.networks.test_loha import filled
from tests.networks.tiny_denoisers import tiny_denoiser

FACTORS = {  # size: pairs for -1, 4, 8, 16
    320: ((16, 20), (4, 80), (8, 40), (16, 20)), 640: ((20, 32), (4, 160), (8, 80), (16, 40)),
    1280: ((32, 40), (4, 320), (8, 160), (16, 80)), 3072: ((48, 64), (4, 768), (8, 384), (16, 192)),
    9216: ((96, 96), (4, 2304), (8, 1152), (16, 576)), 21504: ((128, 168), (4, 5376), (8, 2688), (16, 1344)),
    17: ((1, 17),) * 4, 127: ((1, 127),) * 4,
}  # fmt: skip


@pytest.mark.parametrize("size", FACTORS)
def test_factors(size):
    assert tuple(factorization(size, factor) for factor in (-1, 4, 8, 16)) == FACTORS[size]
    assert factorization(size, size) == (1, size)


@pytest.mark.parametrize(("shape", "rank", "how", "expected"), [
    ((24, 16), 1, {"factor": 4}, {"lokr_w1": (4, 4), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 4)}),
    ((24, 16), 3, {"factor": 4}, {"lokr_w1": (4, 4), "lokr_w2": (6, 4)}),  # 3 is half of 6
    ((24, 16), 1, {"factor": 4, "full_matrix": True}, {"lokr_w1": (4, 4), "lokr_w2": (6, 4)}),
    ((24, 16), 1, {"factor": 4, "unbalanced": True}, {"lokr_w1": (6, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)}),
    ((64, 48), 2, {"decompose_both": True}, {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 6), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}),
    ((24, 16, 3, 3), 1, {"factor": 4}, {"lokr_w1": (4, 4), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 36)}),
    ((24, 16, 3, 3), 1, {"factor": 4, "tucker": True}, {"lokr_w1": (4, 4), "lokr_t2": (1, 1, 3, 3), "lokr_w2_a": (1, 6), "lokr_w2_b": (1, 4)}),
    ((24, 16, 3, 3), 9, {"factor": 4, "tucker": True}, {"lokr_w1": (4, 4), "lokr_w2": (6, 4, 3, 3)}),
])  # fmt: skip
def test_shapes(shape, rank, how, expected):
    assert lokr_shapes(shape, rank, **how) == expected


def test_formula_by_hand():
    w1, w2 = torch.randn(2, 3), torch.randn(4, 5, 3, 3)
    delta = lokr_delta(w1, w2, 0.5)
    assert delta.shape == (8, 15, 3, 3)
    torch.testing.assert_close(delta[1 * 4 + 2, 2 * 5 + 3, 0, 1], 0.5 * w1[1, 2] * w2[2, 3, 0, 1])
    torch.testing.assert_close(lokr_delta(w1, w2[..., 0, 0], 1.0), torch.kron(w1, w2[..., 0, 0]))


def test_plain_halves_have_scale_one_whatever_alpha_says():
    adapter = filled(LoKrModule("name", nn.Linear(16, 24), lora_dim=100, alpha=3.0, factor=4))
    assert adapter.scale == 1.0 and float(adapter.file_tensors()["alpha"]) == 100.0
    tensors = adapter.file_tensors()
    expected = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    for alpha in (0.1, 1.0, 77.0):
        torch.testing.assert_close(
            weight_change({**tensors, "alpha": torch.tensor(alpha)}, torch.zeros(24, 16)), expected
        )
    torch.testing.assert_close(float(adapter.weight_norm()), float(expected.norm()))
    half = LoKrModule("name", nn.Linear(48, 64), lora_dim=2, alpha=3.0)
    assert half.scale == 1.5 and "lokr_w2_a" in half.file_tensors()


def test_factor_is_read_from_the_file(tmp_path, caplog):
    model, _ = tiny_denoiser("flux")
    made = create_network(1.0, 1, 0.5, None, [None, None], model, factor="8")
    for module in made.loras:
        filled(module)
    path = str(tmp_path / "a.safetensors")
    made.save_weights(path, None, None)
    for create in (create_network_from_weights, create_any_from_weights):
        again, tensors = create(1.0, path, None, [None, None], model)
        again.load_tensors(tensors)
        own = {module.lora_name: module for module in again.unet_loras}
        assert len(own) == len(made.unet_loras)
        for module in made.unet_loras:
            assert torch.equal(module.delta_weight(), own[module.lora_name].delta_weight())
            assert (module.lora_dim, float(module.alpha)) == (own[module.lora_name].lora_dim, 0.5)
    with pytest.raises(CheckpointError, match="lokr_w1 has shape"):
        create_network(1.0, 1, 0.5, None, [None, None], model, factor="2").load_weights(path)
    with caplog.at_level(logging.WARNING):
        create_network(1.0, 50, 1.0, None, [None, None], model)
    assert "plain matrix" in caplog.text


@pytest.mark.parametrize("how", [{}, {"factor": 2}, {"decompose_both": True}, {"full_matrix": True}])
def test_halves_are_applied_without_their_product(how):
    layer = nn.Linear(48, 64).requires_grad_(False)
    adapter = filled(LoKrModule("name", layer, 0.7, lora_dim=1, alpha=0.6, **how)).train()
    x = torch.randn(2, 3, 48)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        change = adapter.output_change(x)
    torch.testing.assert_close(change, nn.functional.linear(x, adapter.get_weight()), rtol=1e-4, atol=1e-5)
    assert max(kept) < layer.weight.numel()


def test_row_dropout_is_that_of_the_whole_change():
    """The quick way for a Linear drops the same rows, scaled the same, as the general one."""
    layer = nn.Linear(48, 64).requires_grad_(False)
    adapter = filled(LoKrModule("name", layer, lora_dim=1, rank_dropout=0.4)).train()
    adapter.step_state.draws = StepDraws(1, 2, (0, 1))
    x = torch.randn(2, 3, 48)
    quick = adapter.output_change(x)
    torch.testing.assert_close(quick, nn.functional.linear(x, adapter.step_weight()), rtol=1e-4, atol=1e-5)
    assert 0.2 < (quick.abs().sum((0, 1)) == 0).float().mean() < 0.6


@pytest.mark.parametrize("how", [{}, {"decompose_both": True}, {"full_matrix": True}])
def test_max_norm_scales_the_change(how):
    adapter = filled(LoKrModule("name", nn.Linear(48, 64), lora_dim=2, alpha=1.5, **how))
    norm = float(adapter.weight_norm())
    assert norm == pytest.approx(float(adapter.delta_weight().norm()), rel=1e-4)
    adapter.scale_weight(torch.tensor(0.3))
    assert float(adapter.delta_weight().norm()) == pytest.approx(0.3 * norm, rel=1e-4)


@pytest.mark.parametrize(("pairs", "message"), [
    ({"factor": "0"}, "divisor nearest"), ({"factor": "x"}, "factor=x"), ({"dropout": "0.1"}, "no inner values"),
    ({"full_matrix": "True", "use_tucker": "True", "conv_dim": "4"}, "nothing for use_tucker"),
    ({"decompose_bot": "True"}, "did you mean 'decompose_both'"),
])  # fmt: skip
def test_refused_arguments(pairs, message):
    with pytest.raises(ConfigError, match=message):
        create_network(1.0, 2, 1.0, None, [None], tiny_denoiser("sd")[0], **pairs)


def test_incomplete_tensors_are_told():
    with pytest.raises(CheckpointError, match="no lokr_w2"):
        known_kind_of({"lokr_w1": torch.zeros(2, 2)}, "name")
    with pytest.raises(CheckpointError, match="no lokr_w2_b"):
        known_kind_of({"lokr_w1": torch.zeros(2, 2), "lokr_w2_a": torch.zeros(2, 2)}, "name")
