"""Layers of Anima that an adapter trains, at real size on the meta device, and rates of parts."""

from __future__ import annotations

import pytest
import torch

from library.anima_models import AdapterParams, Anima, AnimaParams
from networks import lora_anima

ADAPTER = {"train_llm_adapter": "True"}
EVERYTHING = {**ADAPTER, "include_patterns": "['.*']"}


@pytest.fixture(scope="module")
def model() -> Anima:
    with torch.device("meta"):
        return Anima(AnimaParams(adapter=AdapterParams()))


def network_of(model: Anima, **arguments: str):
    return lora_anima.create_network(1.0, 4, 1.0, None, [None], model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 280), (ADAPTER, 340), (EVERYTHING, 514), ({"include_patterns": "['.*']"}, 454),
        ({"exclude_patterns": "['.*mlp.*']"}, 224), ({"include_patterns": r"['blocks\\.0\\.adaln.*']"}, 286),
        ({"network_reg_dims": r".*cross_attn.*=0"}, 168),
    ],
)  # fmt: skip
def test_number_of_layers(model: Anima, arguments: dict[str, str], count: int) -> None:
    assert len(network_of(model, **arguments).unet_loras) == count


def test_shapes_of_layers_that_patterns_include(model: Anima) -> None:
    shapes = {
        lora.lora_name: (lora.lora_down.weight.shape[1], lora.lora_up.weight.shape[0])
        for lora in network_of(model, **EVERYTHING).unet_loras
    }
    assert shapes["lora_unet_x_embedder_proj_1"] == (68, 2048)
    assert shapes["lora_unet_t_embedder_1_linear_2"] == (2048, 6144)
    assert shapes["lora_unet_blocks_0_adaln_modulation_self_attn_2"] == (256, 6144)
    assert shapes["lora_unet_final_layer_linear"] == (2048, 64)
    assert shapes["lora_unet_llm_adapter_blocks_5_mlp_0"] == (1024, 4096)
    assert not any("llm_adapter_out_proj" in name for name in shapes)


def test_rates_by_the_patterns_of_the_options(model: Anima) -> None:
    from library.training.wiring.anima import RATE_PATTERNS

    rates = {pattern: 10.0**-position for position, pattern in enumerate(RATE_PATTERNS.values(), start=1)}
    network = network_of(model, **EVERYTHING, network_reg_lrs=rates)
    found: dict[float | None, int] = {}
    for lora in network.unet_loras:
        found[lora.rate[1] if lora.rate else None] = found.get(lora.rate[1] if lora.rate else None, 0) + 1
    assert [found[rate] for rate in rates.values()] == [60, 112, 112, 56, 168]
    assert found[None] == 6  # embedders and the final layer keep the general rate
