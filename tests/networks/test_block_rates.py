"""Learning rate factors of U-Net blocks: curves and lists against numbers by hand, blocks left out, groups of the
optimizer."""

import logging

import pytest
import torch

from library.core.errors import ConfigError
from networks.kinds.block_rates import block_factors
from networks.kinds.network_args import NetworkSettings, parse_network_args
from networks.kinds.targets import targets_of_family
from networks.lora import create_network
from tests.networks.tiny_denoisers import tiny_denoiser

QUARTERS = [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]
SINES = [0.0, 0.19509, 0.38268, 0.55557, 0.70711, 0.83147, 0.92388, 0.98079, 1.0]
"""sines of 0, 11.25, ..., 90 degrees"""
ONES = [1.0] * 9


def factors_of(family, **pairs):
    targets = targets_of_family(family)
    return block_factors(targets, NetworkSettings(values=parse_network_args(pairs, targets)))


@pytest.mark.parametrize(("text", "nine"), [
    ("sine", SINES),
    ("cosine", SINES[::-1]),
    ("linear", QUARTERS),
    ("reverse_linear", QUARTERS[::-1]),
    ("zeros", [0.0] * 9),
    ("zeros+0.5", [0.5] * 9),
    ("sine+.25", [sine + 0.25 for sine in SINES]),
    ("cosine + 1", [sine + 1 for sine in SINES[::-1]]),
    ("0.5", [0.5] * 9),
    ("0.5,,2", [0.5, 0.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ("[1,2,3,4,5,6,7,8,9]", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]),
])  # fmt: skip
def test_sdxl_has_nine_ways_down_three_in_the_middle_nine_up(text, nine):
    """Blocks 0 (embedders) and 22 (output) have no factor and keep the rate."""
    assert factors_of("sdxl", down_lr_weight=text) == pytest.approx([1, *nine, 1, 1, 1, *ONES, 1], abs=1e-5)
    assert factors_of("sdxl", up_lr_weight=text) == pytest.approx([1, *ONES, 1, 1, 1, *nine, 1], abs=1e-5)


@pytest.mark.parametrize(("text", "three", "one"), [
    ("sine", [0.0, 0.70711, 1.0], 0.0),
    ("cosine", [1.0, 0.70711, 0.0], 1.0),
    ("linear+.25", [0.25, 0.75, 1.25], 0.25),
    ("reverse_linear", [1.0, 0.5, 0.0], 1.0),
    ("0.3", [0.3, 0.3, 0.3], 0.3),
])  # fmt: skip
def test_factors_of_the_middle(text, three, one):
    assert factors_of("sdxl", mid_lr_weight=text) == pytest.approx([1, *ONES, *three, *ONES, 1], abs=1e-5)
    assert factors_of("sd", mid_lr_weight=text) == pytest.approx([1] * 12 + [one] + [1] * 12, abs=1e-5)


def test_sd_has_twelve_ways_down_one_in_the_middle_twelve_up():
    eleventh = [i / 11 for i in range(12)]
    got = factors_of("sd", down_lr_weight="linear", mid_lr_weight="0.5", up_lr_weight="reverse_linear+0.1")
    assert got == pytest.approx([*eleventh, 0.5, *[1.1 - x for x in eleventh]])
    assert factors_of("sd", down_lr_weight="sine")[4] == pytest.approx(0.540641, abs=1e-6)  # sine of 360 / 11 degrees
    assert factors_of("sd") is None


def test_factors_up_to_the_threshold_count_as_zero():
    got = factors_of("sdxl", down_lr_weight="linear", mid_lr_weight="0.25,0.3,0.2", block_lr_zero_threshold="0.25")
    assert got == [1, 0, 0, 0, *QUARTERS[3:], 0, 0.3, 0, *ONES, 1]


@pytest.mark.parametrize(("family", "pairs", "message"), [
    ("sd", {"down_lr_weight": ",".join("1" * 13)}, "13 factors for 12 blocks"),
    ("sdxl", {"up_lr_weight": ",".join("1" * 10)}, "10 factors for 9 blocks"),
    ("sd", {"mid_lr_weight": "1,1"}, "2 factors for 1 blocks"),
    ("sdxl", {"mid_lr_weight": "1,1,1,1"}, "4 factors for 3 blocks"),
    ("sd", {"down_lr_weight": "cosin"}, "did you mean 'cosine'"),
    ("sd", {"down_lr_weight": "1,two"}, "'two' is no number"),
    ("sd", {"down_lr_weight": "-1"}, "0 or more"),
    ("sd", {"down_lr_weight": "nan"}, "curve 'nan'"),
    ("sd", {"down_lr_weight": "1,nan"}, "0 or more"),
    ("sd", {"block_lr_zero_threshold": "0.1"}, "without any of down_lr_weight"),
    ("sd", {"block_lr_zero_threshold": "-0.1", "down_lr_weight": "1"}, "0 or more"),
])  # fmt: skip
def test_bad_factors_are_refused(family, pairs, message):
    with pytest.raises(ConfigError, match=message):
        factors_of(family, **pairs)


@pytest.mark.parametrize(("family", "name", "where"), [
    ("flux", "down_lr_weight", "sd, sdxl"),
    ("anima", "block_dims", "sd, sdxl"),
    ("sd", "train_double_block_indices", "flux"),
    ("sdxl", "train_llm_adapter", "anima"),
])  # fmt: skip
def test_an_argument_of_another_family_is_refused_with_its_name(family, name, where):
    with pytest.raises(ConfigError, match=f"no argument '{name}' for {family}; known for {where}"):
        factors_of(family, **{name: "1"})


# -- networks --------------------------------------------------------------------------------------------------------

NUMBERS = {
    "sd": {
        "conv_in": None, "down_blocks.0.attentions.0.proj_in": 1, "down_blocks.0.downsamplers.0.conv": 3,
        "down_blocks.2.attentions.1.proj_in": 8,
        "down_blocks.3.resnets.1.conv1": 11, "mid_block.attentions.0.proj_in": 12, "up_blocks.0.upsamplers.0.conv": 15,
        "up_blocks.1.attentions.0.proj_in": 16, "up_blocks.3.attentions.2.proj_out": 24,
    },
    "sdxl": {
        "time_embed.0": 0, "label_emb.0.0": 0, "input_blocks.4.1.proj_in": 5, "input_blocks.8.0.op": 9,
        "middle_block.1.proj_in": 11,
        "output_blocks.0.1.proj_in": 13, "output_blocks.5.1.proj_in": 18, "output_blocks.8.0.out_layers.3": 21,
        "out.2": 22,
    },
}  # fmt: skip
"""family -> layers of the full models and the numbers of their blocks, by hand"""
UP_BLOCKS = {"sd": (16, 17, 19, 20), "sdxl": (13, 14, 15, 16)}
"""blocks with attention on the way up of the tiny models"""


def network_for(family, **pairs):
    return create_network(1.0, 2, 1.0, None, None, tiny_denoiser(family)[0], **pairs)


def blocks_of(network):
    """Number of a block -> its modules."""
    blocks = {}
    for module in network.unet_loras:
        blocks.setdefault(module.block, []).append(module)
    return blocks


@pytest.mark.parametrize("family", NUMBERS)
def test_blocks_have_the_numbers_that_people_know(family):
    index_of = targets_of_family(family).blocks.index_of
    assert {path: index_of(path) for path in NUMBERS[family]} == NUMBERS[family]


@pytest.mark.parametrize("family", UP_BLOCKS)
def test_optimizer_groups_by_block(family):
    """Rates by hand: 2e-4 * (0.5 + i / (n - 1)) for way up i of n; LoRA+ times 4."""
    network = network_for(family, up_lr_weight="linear+0.5", loraplus_unet_lr_ratio="4")
    groups, names = network.prepare_optimizer_params(None, 2e-4)
    assert all(name.startswith("unet_block") for name in names)
    rates = dict(zip(names, (group["lr"] for group in groups), strict=True))
    steps = {"sd": 11, "sdxl": 8}[family]
    for block in UP_BLOCKS[family]:
        rate = 2e-4 * (0.5 + (block - 13) / steps)
        assert rates[f"unet_block{block}"] == pytest.approx(rate)
        assert rates[f"unet_block{block} plus"] == pytest.approx(4 * rate)
    outside = next(name for name in names if int(name.removeprefix("unet_block").removesuffix(" plus")) < 13)
    assert rates[outside] in (2e-4, 8e-4)
    for group, name in zip(groups, names, strict=True):
        block = int(name.removeprefix("unet_block").removesuffix(" plus"))
        part = "lora_up" if name.endswith("plus") else "lora_down"
        assert {id(p) for p in group["params"]} == {
            id(getattr(module, part).weight) for module in blocks_of(network)[block]
        }


@pytest.mark.parametrize("family", UP_BLOCKS)
def test_blocks_up_to_the_threshold_are_not_built(family, caplog):
    whole = set(blocks_of(network_for(family)))
    count = {"sd": 12, "sdxl": 9}[family]
    with caplog.at_level(logging.INFO):
        network = network_for(family, up_lr_weight="linear", block_lr_zero_threshold="0.5")
    left = {block for block in whole if block < 13 or (block - 13) / (count - 1) > 0.5}
    assert set(blocks_of(network)) == left < whole
    assert f"blocks {', '.join(str(block) for block in sorted(whole - left))}" in caplog.text
    assert set(blocks_of(network_for(family, up_lr_weight="zeros"))) == {block for block in whole if block < 13}
    assert not network_for(family, down_lr_weight="0", mid_lr_weight="0", up_lr_weight="0").unet_loras


def test_factors_can_be_set_and_read():
    network = network_for("sd")
    assert network.get_lr_weight(16) == 1.0 and network.prepare_optimizer_params(None, 1e-3)[1] == ["unet"]
    network.set_block_lr_weight([0.1 * i for i in range(25)])
    assert network.get_lr_weight(16) == pytest.approx(1.6) and network.get_lr_weight(None) == 1.0
    groups, names = network.prepare_optimizer_params(None, 1e-3)
    assert groups[names.index("unet_block16")]["lr"] == pytest.approx(1.6e-3)
    network.set_block_lr_weight([0.0] * 16 + [1.0] + [0.0] * 8)
    assert network.prepare_optimizer_params(None, 1e-3)[1] == ["unet_block16"]  # a rate of 0 has no group
    network.set_block_lr_weight(None)
    assert network.prepare_optimizer_params(None, 1e-3)[1] == ["unet"]
    with pytest.raises(ConfigError, match="23 learning rate factors are given; the denoiser of sd has 25"):
        network.set_block_lr_weight([1.0] * 23)


def test_ranks_of_a_block_and_factors_together():
    dims = ",".join("3" if block == 11 else "0" for block in range(23))
    network = network_for("sdxl", block_dims=dims, mid_lr_weight="1,0.25")
    assert {(module.block, module.lora_dim) for module in network.unet_loras} == {(11, 3)}
    groups, names = network.prepare_optimizer_params(None, 1e-3)
    assert names == ["unet_block11"] and groups[0]["lr"] == pytest.approx(2.5e-4)
    assert torch.equal(groups[0]["params"][0], network.unet_loras[0].lora_down.weight)
