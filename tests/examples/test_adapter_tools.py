"""The commands of examples/adapter_tools, one after the other as they are pasted, on a LoRA that is made here."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from library.flux_utils import load_flux
from library.safetensors_utils import load_safetensors
from networks.lora_flux import create_network
from tests.docs.commands import ROOT, fenced_commands, parse, script_and_words

PAGE = (ROOT / "examples" / "adapter_tools" / "README.md").read_text(encoding="utf-8")
TRAINING = "flux_train_network"
METADATA = {
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora_flux",
    "ss_network_dim": "16",
    "ss_network_alpha": "16.0",
}


def write_lora(path, seed):
    """A LoRA as the demo's training writes it: rank 16 on the denoiser, with random changes."""
    denoiser = load_flux("assets/tiny-flux/flux1-tiny.safetensors", torch.float32, "cpu")
    network = create_network(1.0, 16, 16.0, None, None, denoiser)
    network.apply_to(None, denoiser, False, True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.03, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save_weights(str(path), torch.float32, METADATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The top of a repository after `make demo`, and after the commands of the page. Training is not run: its files are
    made."""
    place = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "assets" / "tiny-flux", place / "assets" / "tiny-flux")
    before = os.getcwd()
    os.chdir(place)
    try:
        write_lora(place / "demo_output" / "zorbit.safetensors", 1)
        for command in fenced_commands(PAGE):
            run(command, place)
    finally:
        os.chdir(before)
    return place


def run(command, place):
    module, words = script_and_words(command)
    if module.__name__ == TRAINING:
        values = parse(command)
        for seed, epoch in enumerate(("-000004", "-000008", "-000012", "")):
            write_lora(place / values.output_dir / f"{values.output_name}{epoch}.safetensors", seed)
    elif module.__name__ == "flux_minimal_inference":
        from library.generation import flux_inference

        assert flux_inference.run(words)
    else:
        assert module.main(words) == 0, command


def same(first, second):
    wanted = load_safetensors(second)
    assert wanted.keys() == first.keys()
    return all(torch.equal(tensor, wanted[key]) for key, tensor in first.items())


def test_all_results_are_there(folder):
    results = folder / "adapter_tools"
    assert {path.name for path in results.iterdir()} == {
        "norms.png", "model.safetensors", "pictures", "extracted.safetensors", "small.safetensors", "both.safetensors",
        "both-rank8.safetensors", "peft", "from-peft.safetensors", "comfy.safetensors", "from-comfy.safetensors", "run",
        "average.safetensors",
    }  # fmt: skip
    assert len(list((results / "pictures").glob("*.png"))) == 1


def test_the_way_back_gives_the_same_tensors(folder):
    lora = load_safetensors(folder / "demo_output" / "zorbit.safetensors")
    for name in ("from-peft", "from-comfy"):
        assert same(lora, folder / "adapter_tools" / f"{name}.safetensors")
    assert not same_keys(lora, folder / "adapter_tools" / "comfy.safetensors")


def same_keys(tensors, path):
    return tensors.keys() == load_safetensors(path).keys()


def test_what_was_merged_is_extracted(folder):
    before, after = (
        load_safetensors(folder / path)
        for path in ("demo_output/zorbit.safetensors", "adapter_tools/extracted.safetensors")
    )
    name = "lora_unet_double_blocks_0_img_attn_proj"
    changes = [
        t[f"{name}.lora_up.weight"].float()
        @ t[f"{name}.lora_down.weight"].float()
        * (t[f"{name}.alpha"] / len(t[f"{name}.lora_down.weight"]))
        for t in (before, after)
    ]
    assert (changes[0] - changes[1]).norm() < 0.05 * changes[0].norm()


def test_ignored_by_version_control():
    assert "/adapter_tools/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
