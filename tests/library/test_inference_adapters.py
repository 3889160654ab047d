"""Adapters of the image scripts: layer filters, multipliers, several at once, devices, files of other frameworks."""

import pytest
import torch

from library.core.errors import CheckpointError
from library.flux_utils import load_flux
from library.generation.adapter_files import (
    AdapterFile,
    LayerFilter,
    adapter_problems,
    file_problem,
    multiplier_problems,
)
from library.generation.adapters import LoadedAdapters
from library.generation.gen_img.networks import network_problems
from library.generation.gen_img.options import GenerationNetworkOptions
from library.safetensors_utils import save_file_atomic
from tests.tiny import build_tiny_flux

PATH = "double_blocks.0.img_attn.qkv"
NAME = f"lora_unet_{PATH.replace('.', '_')}"


def lora(seed: int, name: str = NAME) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 32, generator=generator), torch.randn(96, 4, generator=generator)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}


@pytest.fixture
def model(tmp_path):
    return load_flux(build_tiny_flux(tmp_path / "tiny").flux, torch.float32, "cpu")


def change(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return 0.5 * tensors[f"{NAME}.lora_up.weight"] @ tensors[f"{NAME}.lora_down.weight"]


def test_two_adapters_add(model, tmp_path):
    layer, x = model.get_submodule(PATH), torch.randn(5, 32)
    before, adapters = layer(x).detach(), LoadedAdapters(model, [])
    for number, multiplier in ((1, 0.8), (2, -0.5)):
        save_file_atomic(lora(number), tmp_path / f"{number}.safetensors")
        adapters.add(AdapterFile(str(tmp_path / f"{number}.safetensors"), multiplier))
    expected = before + 0.8 * x @ change(lora(1)).T - 0.5 * x @ change(lora(2)).T
    torch.testing.assert_close(layer(x), expected)
    adapters.set_multipliers((0.0,))
    torch.testing.assert_close(layer(x), before - 0.5 * x @ change(lora(2)).T)
    adapters.set_multipliers(None)
    torch.testing.assert_close(layer(x), expected)


def test_adapters_follow_their_layers(model, tmp_path):
    save_file_atomic(lora(1), tmp_path / "lora.safetensors")
    adapters = LoadedAdapters(model, [])
    adapters.add(AdapterFile(str(tmp_path / "lora.safetensors")))
    model.to("meta")
    adapters.follow_models()
    assert {parameter.device.type for parameter in adapters.networks[0].parameters()} == {"meta"}


def test_files_that_fit_and_that_do_not(model, tmp_path):
    torch.save(lora(1), tmp_path / "old.pt")
    assert file_problem(str(tmp_path / "old.pt"), "lora_weights", "flux") is None
    adapters = LoadedAdapters(model, [])
    adapters.add(AdapterFile(str(tmp_path / "old.pt")))
    assert len(adapters.networks) == 1
    save_file_atomic(lora(1, "lora_unet_blocks_0_self_attn_q_proj"), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no layer of this model"):
        adapters.add(AdapterFile(str(tmp_path / "other.safetensors")))


def test_layer_filter():
    names = [NAME, PATH]
    assert LayerFilter().accepts(names) and LayerFilter(include=(r"img_attn\.qkv$",)).accepts(names)
    assert not LayerFilter(include=("txt",)).accepts(names)
    assert not LayerFilter(include=("img",), exclude=("qkv",)).accepts(names)
    assert len(LayerFilter(include=("(", "a"), exclude=("[",)).problems()) == 2


@pytest.mark.parametrize(
    ("multipliers", "count", "merged", "words"),
    [
        (None, 0, True, None),
        ((1.0,), 2, False, None),
        ((1.0,), 0, False, "no adapters"),
        ((1.0,), 1, True, "hooked"),
        ((1.0, 1.0), 1, False, "2 multipliers"),
    ],
)
def test_multipliers_of_a_line(multipliers, count, merged, words):
    problems = multiplier_problems(multipliers, count, merged=merged)
    assert problems == [] if words is None else words in problems[0]


def test_adapters_of_other_families_are_named_before_a_model_is_loaded(tmp_path):
    path = tmp_path / "anima.safetensors"
    stem = "lora_unet_blocks_0_self_attn_q_proj"
    save_file_atomic(lora(1, stem), path)
    told = "this is a LoRA-type adapter for Anima; needed: one for SDXL"
    assert (
        told in file_problem(str(path), "lora_weights", "sdxl")
        and file_problem(str(path), "lora_weight", "anima") is None
    )
    modules = GenerationNetworkOptions(network_module=["networks.lora_flux"], network_weights=[str(path)])
    module_problem, weights_problem = network_problems(modules, "sdxl")
    assert (
        "networks.lora_flux, which is for FLUX.1 or Chroma; use networks.lora_sdxl or networks.lora" in module_problem
    )
    assert told in weights_problem


def test_a_strength_in_the_place_of_a_file_is_told_how_it_is_given(tmp_path):
    save_file_atomic(lora(1), tmp_path / "lora.safetensors")
    found = adapter_problems([str(tmp_path / "lora.safetensors"), "0.8"], "flux")
    assert len(found) == 1 and 'given as "FILE;0.8"' in found[0]
    assert "--lora_multiplier 0.8" in file_problem("0.8", "lora_weight", "anima")
    assert "given as" not in file_problem(str(tmp_path / "none.safetensors"), "lora_weights", "flux")
