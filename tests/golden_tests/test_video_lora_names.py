"""Adapters of the video families: which layers they train at real size, their names in files of other programs, and
HunyuanVideo's on FramePack."""

from __future__ import annotations

import importlib

import pytest
import torch

from library.families.registry import record_of
from networks.files.lora_layouts import AdapterFile
from networks.kinds.adapter_family import family_of_adapter
from networks.kinds.targets import targets_of_family
from tests.golden_dir import behaviour, behaviour_cases
from tests.golden_tests.real_sizes import RealModels
from tools.lora_tools import convert

FILE = "video_lora_names.json.gz"
MODULES = {"hunyuan_video": "networks.lora", "wan": "networks.lora_wan", "framepack": "networks.lora_framepack"}


def fill(shape, start: int, times: float = 1.0) -> torch.Tensor:
    """Element n of the flattened tensor = ((7 n + start) mod 97 - 48) / 8."""
    count = torch.Size(shape).numel()
    return ((7 * torch.arange(count) + start) % 97 - 48).float().view(*shape) / 8 * times


def read(entries) -> dict[str, torch.Tensor]:
    return {
        key: fill(entry["shape"], entry["recipe"], entry.get("times", 1.0)) if isinstance(entry, dict)
        else torch.tensor(float(entry))
        for key, entry in entries.items()
    }  # fmt: skip


def family_of(names) -> str:
    text = " ".join(names)
    if "transformer_blocks" in text:
        return "framepack"
    return "hunyuan_video" if "double_blocks" in text or "single_blocks" in text else "wan"


def converted(direction: str, prefix: str | None, tensors) -> dict[str, torch.Tensor]:
    options = convert.ConvertOptions(target=direction, diffusers_prefix=prefix)
    return convert.convert(options, family_of(tensors), AdapterFile(dict(tensors)), "out.safetensors").tensors


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory) -> RealModels:
    return RealModels(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_layers_that_are_trained(case, denoisers):
    denoiser, rank = denoisers[case["model"]], behaviour(FILE)["rank"]
    module = importlib.import_module(MODULES[case["family"]])
    network = module.create_network(1.0, rank, 1.0, None, [None, None], denoiser, **case["network_args"])
    shapes = {
        lora.lora_name: [list(lora.lora_down.weight.shape), list(lora.lora_up.weight.shape)] for lora in network.loras
    }
    assert len(shapes) == case["count"]
    if "modules" in case:
        assert {name: shapes[name] for name in case["modules"]} == case["modules"]
    assert set(case.get("names", ())) <= set(shapes)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "convert"))
def test_names_of_every_layer(case):
    """kohya -> dotted and back, all layers of a file at once."""
    names = case["kohya_to_dotted"]
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": fill((1, 2), 1), f"{name}.lora_up.weight": fill((12, 1), 2)}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    there = converted("other", None, tensors)
    assert set(there) == {f"diffusion_model.{path}.lora_{end}.weight" for path in names.values() for end in "AB"}
    back = converted("default", None, there)
    assert set(back) == set(tensors)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "values", where=lambda case: "input" in case))
def test_values_of_a_file(case):
    found = converted(case["direction"], case.get("diffusers_prefix"), read(case["input"]))
    expected = read(case["expected"])
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].float(), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "values", where=lambda case: "input_keys" in case))
def test_keys_of_a_file(case):
    """A record may have one half of a LoRA; no file is whole without the other, which is added on both sides."""
    given, expected = set(case["input_keys"]), set(case["expected_keys"])
    given |= {key.replace("lora_A", "lora_B") for key in given}
    expected |= {key.replace("lora_down", "lora_up") for key in expected}
    tensors = {key: torch.tensor(1.0) if key.endswith("alpha") else torch.ones(2, 2) for key in sorted(given)}
    assert set(converted(case["direction"], None, tensors)) == expected


@pytest.mark.parametrize("case", behaviour_cases(FILE, "hunyuan_to_framepack"))
def test_an_adapter_of_hunyuan_video_on_framepack(case):
    from networks.files.network_files import to_kohya_names

    up, down = fill((case["out_features"], 2), 3), fill((2, case["in_features"]), 5)
    name = case["input"]
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    found = to_kohya_names(tensors, targets_of_family("framepack"), "file")
    expected = {}
    for part, where in case["expected"].items():
        first, last = where["rows"]
        expected |= {f"{part}.lora_down.weight": down, f"{part}.lora_up.weight": up[first:last]}
        expected[f"{part}.alpha"] = torch.tensor(1.0)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_tables_are_those_of_the_records():
    for family, module in MODULES.items():
        assert record_of(family).targets.partition(":")[0] in (module, "networks.lora_hunyuan_video")


def told(names) -> str:
    shapes = {f"{name}.lora_down.weight": (4, 3072) for name in names}
    return family_of_adapter(shapes | {f"{name}.lora_up.weight": (3072, 4) for name in names}, {}, "file")


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["lora_unet_double_blocks_3_img_mlp_fc1"], "hunyuan_video"),
        (["transformer.double_blocks.3.img_attn_qkv"], "hunyuan_video"),
        (["lora_unet_double_blocks_3_img_attn_qkv"], "flux"),  # called the same there
        (["lora_unet_double_blocks_3_img_attn_qkv", "lora_unet_double_blocks_3_txt_mlp_fc2"], "hunyuan_video"),
        (["lora_unet_blocks_7_ffn_0"], "wan"),
        (["lora_unet_blocks_7_cross_attn_k_img"], "wan"),
        (["diffusion_model.blocks.7.self_attn.q"], "wan"),
        (["blocks.7.attn2.to_out.0"], "wan"),
        (["transformer.blocks.7.ffn.net.0.proj"], "wan"),
        (["lora_unet_blocks_7_self_attn_q_proj"], "anima"),
        (["lora_unet_single_transformer_blocks_7_proj_mlp"], "framepack"),
        (["lora_unet_transformer_blocks_7_ff_context_net_2"], "framepack"),
    ],
)
def test_names_tell_the_family(names, family):
    assert told(names) == family
