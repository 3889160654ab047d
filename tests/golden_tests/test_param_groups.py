"""What learns, at which rate, at the sizes of real models: blocks, parts and frozen layers, counted."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from library.core.errors import ConfigError
from library.core.learning_rates import rate_groups
from library.core.registry import import_target
from library.families.registry import record_of
from library.training import parser_common
from library.training.trainables.full import FullTrainable
from library.training.wiring.anima import WHOLE_RATE_PATTERNS
from library.training.wiring.sdxl import BLOCKS
from tests.golden_dir import BEHAVIOUR_DIR, MissingFile, behaviour
from tests.golden_tests.real_sizes import RealModels

FILE = "param_groups.json"
Named = Iterable[tuple[str, torch.Tensor]]


def cases(name: str, key: str = "cases") -> list[Any]:
    if not (BEHAVIOUR_DIR / FILE).exists():
        return [pytest.param(MissingFile(BEHAVIOUR_DIR / FILE), id="missing")]
    return behaviour(FILE)[name][key]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModels:
    return RealModels(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def sdxl(real: RealModels) -> dict[str, torch.Tensor]:
    return dict(real["sdxl_checkpoint"].named_parameters())


def recorded(name: str) -> Any:
    return behaviour(FILE)[name]


def counts(tensors: Iterable[torch.Tensor]) -> list[int]:
    listed = list(tensors)
    return [len(listed), sum(tensor.numel() for tensor in listed)]


def groups_of(family: str, named: Named, *words: str) -> list[dict[str, Any]]:
    """Optimizer groups of the denoiser in a run with these options."""
    config = parser_common.parse(list(words), family, "full")
    trainable, wiring = FullTrainable(config), import_target(record_of(family).family)(config)
    return rate_groups(named, trainable.rate, trainable._denoiser_rates(wiring), name="denoiser")


def test_blocks_of_sdxl(sdxl: dict[str, torch.Tensor]) -> None:
    given = recorded("sdxl_block_lr")
    found = defaultdict(list)
    for name, tensor in sdxl.items():
        found[next(i for i, pattern in enumerate(BLOCKS) if re.match(pattern, name))].append(tensor)
    assert [counts(found[i]) for i in range(len(BLOCKS))] == given["counts"]
    rates = ",".join(map(str, given["example_rates"]))
    groups = groups_of("sdxl", sdxl.items(), "--learning_rate=1e-5", f"--block_lr={rates}")
    assert {group["lr"]: len(group["params"]) for group in groups} == {lr: n for _, lr, n in given["example_groups"]}


@pytest.mark.parametrize("case", cases("sdxl_block_lr", "errors"))
def test_wrong_rates_of_blocks(case: dict[str, Any]) -> None:
    values = case["values"]
    text = ",".join(["1e-4"] * values) if isinstance(values, int) else values
    with pytest.raises(ConfigError, match="needed: 23"):
        groups_of("sdxl", [], "--learning_rate=1e-5", f"--block_lr={text}")


def test_the_first_text_encoder_of_sdxl_learns_what_is_read() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    given = recorded("sdxl_text_encoder_1_frozen")
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        ))  # fmt: skip
    wiring = import_target(record_of("sdxl").family)(parser_common.parse([], "sdxl", "full"))
    named = {f"text_model.{name.removeprefix('text_model.')}": p for name, p in encoder.named_parameters()}
    unused = tuple(wiring.unused_text_layers(0, encoder))
    frozen = {name: p for name, p in named.items() if name.startswith(unused)}
    assert set(frozen) == set(given["keys"]) and counts(frozen.values()) == given["counts"]


@pytest.mark.parametrize("case", cases("sdxl_fused_optimizer_groups"))
def test_fused_groups_of_sdxl(case: dict[str, Any], sdxl: dict[str, torch.Tensor]) -> None:
    """Each tensor is updated alone here, in groups by rate alone: these hold what the known groups of a rate hold."""
    assert len(sdxl) == recorded("sdxl_fused_optimizer_groups")["tensors"]["unet"]
    words = ("--learning_rate=1e-5", f"--fused_optimizer_groups={case['groups']}")
    assert [len(group["params"]) for group in groups_of("sdxl", sdxl.items(), *words)] == [case["parts"][0][1]]
    by_rate: dict[float, int] = defaultdict(int)
    for rate, count in case["result"]:
        by_rate[rate] += count
    wanted: dict[float, int] = defaultdict(int)
    for rate, count in case["parts"]:
        wanted[rate] += count
    assert by_rate == wanted


def test_parts_of_anima(real: RealModels) -> None:
    given = recorded("anima_parts")
    named = dict(real["anima"].named_parameters())
    found = defaultdict(list)
    for name, tensor in named.items():
        option = next((o for o, pattern in WHOLE_RATE_PATTERNS.items() if re.match(pattern, name)), "base_lr")
        found[option.removesuffix("_lr")].append(tensor)
    assert {part: counts(tensors) for part, tensors in found.items()} == given["counts"]
    rates = {name: rate for name, rate in given["example"].items() if name != "groups" and rate is not None}
    groups = groups_of("anima", named.items(), *(f"--{name}={rate}" for name, rate in rates.items()))
    learned: dict[float, int] = defaultdict(int)
    for _, rate, count in given["example"]["groups"]:
        learned[rate] += count
    assert {group["lr"]: len(group["params"]) for group in groups} == learned


@pytest.mark.parametrize("case", cases("sd3_frozen"))
def test_frozen_blocks_of_sd3(case: dict[str, Any], real: RealModels) -> None:
    """The file's tensors are counted: position embeddings, which never learn, among those that are not frozen."""
    model, file = real[case["model"]], real.file(case["model"])
    number = case["num_last_block_to_freeze"]
    groups = groups_of(
        "sd3", model.named_parameters(), "--learning_rate=1e-5", f"--num_last_block_to_freeze={number}",
        f"--pretrained_model_name_or_path={file}",
    )
    learning = {id(p) for group in groups for p in group["params"]}
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in learning}
    assert counts(frozen.values()) == case["frozen"] and min(map(block, frozen)) == block(case["first_frozen"])
    rest = [t for name, t in model.state_dict(keep_vars=True).items() if name not in frozen]
    assert counts(rest) == case["trained"]


def block(name: str) -> int:
    return int(name.split(".")[1])


GROUPS = {
    "flux_dev": {r"double_blocks\.(\d+)\.": "double.{}", r"single_blocks\.(\d+)\.": "single.{}"},
    "sd3_medium": {r"joint_blocks\.(\d+)\.": "joint.{}"},
    "lumina2": {r"layers\.(\d+)\.": "main.{}", r"(?:context|noise)_refiner\.": "refiner"},
}
"""model -> pattern of a path -> name of its group"""


@pytest.mark.parametrize("model", GROUPS)
def test_blocks_of_blockwise_updates(model: str, real: RealModels) -> None:
    """--blockwise_fused_optimizers updates each tensor alone; together they are the blocks of the known groups."""
    found = defaultdict(list)
    for name, tensor in real[model].named_parameters():
        matches = ((re.match(pattern, name), group) for pattern, group in GROUPS[model].items())
        found[next((group.format(*match.groups()) for match, group in matches if match), "other")].append(tensor)
    assert {group: counts(tensors) for group, tensors in found.items()} == recorded("blockwise_groups")[model]
    assert set(recorded("blockwise_groups")) == set(GROUPS)
