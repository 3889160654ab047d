"""The words for a network on the page at start."""

import pytest

from networks import dylora, ia3, lora, oft
from networks.kinds.description import describe_network
from tests.networks.tiny_denoisers import tiny_denoiser


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (lora, (16, 8, {}), "lora on {} layers, rank 16, alpha 8, strength 0.5 (alpha / rank)"),
        (lora, (16, 1, {}), "lora on {} layers, rank 16, alpha 1, strength 0.0625 (alpha / rank)"),
        (lora, (4, 0, {}), "lora on {} layers, rank 4, alpha 4, strength 1 (alpha / rank)"),
        (
            lora,
            (4, 4, {"dora_wd": "True"}),
            "lora with weight decomposition (DoRA) on {} layers, rank 4, alpha 4, strength 1 (alpha / rank)",
        ),
        (lora, (4, 4, {"rs_lora": "True"}), "lora on {} layers, rank 4, alpha 8, strength 2 (alpha / rank)"),
        (
            lora,
            (4, 4, {"network_reg_dims": "img_attn=2"}),
            "lora on {} layers, rank 2 to 4, alpha 4, strength 1 to 2 (alpha / rank)",
        ),
        (dylora, (4, 2, {}), "dylora on {} layers, rank 4, alpha 2, strength 0.5 (alpha / rank)"),
        (oft, (2, 1e-3, {}), "oft on {} layers"),
        (ia3, (None, None, {}), "ia3 on {} layers"),
    ],
)
def test_kinds_ranks_and_strength(module, settings, words):
    denoiser, _ = tiny_denoiser("flux")
    rank, alpha, pairs = settings
    network = module.create_network(1.0, rank, alpha, None, None, denoiser, **pairs)
    network.apply_to(None, denoiser, False, True)
    text = describe_network(network)
    assert text == words.format(len(network.loras))


def test_norms_beside_layers_are_named():
    denoiser, _ = tiny_denoiser("sd")
    network = lora.create_network(1.0, 4, 4, None, None, denoiser, train_norm="True")
    network.apply_to(None, denoiser, False, True)
    first, second = describe_network(network).split("; ")
    assert {first.split(" on ")[0], second.split(" on ")[0]} == {"lora", "norm"} and "rank" not in (
        first + second
    ).split("norm on")[1]
