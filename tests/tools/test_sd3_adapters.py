"""Adapter tools on SD3: merged into the model with its encoders inside and into files of their own, extracted, renamed
there and back, resized, told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.safetensors_utils import read_header, save_file_atomic
from library.sd3_utils import load_clip_g, load_clip_l, load_sd3
from library.tiny_models.sd3_tiny import TinySd3, build_tiny_sd3
from networks.lora_sd3 import create_network, create_network_from_weights
from tools import check_lora, convert_lora, extract_lora, merge_lora, resize_lora

HOW = (torch.float32, "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySd3:
    return build_tiny_sd3(tmp_path_factory.mktemp("tiny"), with_whole=True)


def models_of(tiny: TinySd3, model: Path, clip_l: Path | None = None, clip_g: Path | None = None):
    encoders = [load_clip_l(clip_l or model, *HOW), load_clip_g(clip_g or model, *HOW), None]
    return load_sd3(model, *HOW), encoders


@pytest.fixture(scope="module")
def lora(tiny: TinySd3) -> Path:
    """A LoRA of every layer of denoiser and both CLIPs with weights that show."""
    denoiser, encoders = models_of(tiny, tiny.whole)
    network = create_network(1.0, 4, 2.0, None, encoders, denoiser)
    network.apply_to(encoders, denoiser)
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    path = tiny.folder / "lora.safetensors"
    network.save_weights(str(path), torch.float32, {"ss_base_model_version": "5-medium"})
    return path


def merged_states(tiny: TinySd3, lora: Path, ratio: float) -> list[dict[str, torch.Tensor]]:
    """The weights of denoiser, CLIP-L and CLIP-G with the adapter merged by its own modules."""
    denoiser, encoders = models_of(tiny, tiny.whole)
    network, tensors = create_network_from_weights(ratio, str(lora), None, encoders, denoiser, for_inference=True)
    network.merge_to(encoders, denoiser, tensors)
    return [model.state_dict() for model in (denoiser, *encoders[:2])]


def assert_alike(models, states) -> None:
    denoiser, encoders = models
    for model, state in zip((denoiser, *encoders[:2]), states):
        for key, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-5)


def test_merging_into_one_file_and_into_files_of_their_own(tiny: TinySd3, lora: Path, tmp_path: Path) -> None:
    wanted, plain = merged_states(tiny, lora, 0.7), load_file(tiny.whole)
    whole = tmp_path / "whole.safetensors"
    words = ["--models", str(lora), "--ratios", "0.7"]
    assert merge_lora.main(["--model", str(tiny.whole), "--save_to", str(whole), *words]) == 0
    assert_alike(models_of(tiny, whole), wanted)
    written = load_file(whole)
    changed = {key.split(".")[1] for key, tensor in written.items() if not torch.equal(tensor, plain[key])}
    assert written.keys() == plain.keys() and changed == {"diffusion_model", "clip_l", "clip_g"}
    apart = {name: tmp_path / f"{name}.safetensors" for name in ("model", "clip_l", "clip_g")}
    files = [
        word
        for name in ("clip_l", "clip_g")
        for word in (f"--{name}", str(getattr(tiny, name)), f"--{name}_save_to", str(apart[name]))
    ]
    assert merge_lora.main(["--model", str(tiny.model), "--save_to", str(apart["model"]), *files, *words]) == 0
    assert_alike(models_of(tiny, apart["model"], apart["clip_l"], apart["clip_g"]), wanted)


def test_extracting_what_was_merged(tiny: TinySd3, lora: Path, tmp_path: Path) -> None:
    tuned, found = tmp_path / "tuned.safetensors", tmp_path / "found.safetensors"
    assert merge_lora.main(["--model", str(tiny.whole), "--save_to", str(tuned), "--models", str(lora)]) == 0
    words = ["--model_org", str(tiny.whole), "--model_tuned", str(tuned), "--save_to", str(found), "--dim", "4"]
    assert extract_lora.main([*words, "--save_precision", "float"]) == 0
    metadata = read_header(found)[1]
    assert metadata["ss_base_model_version"] == "5-medium"
    assert metadata["modelspec.architecture"] == "stable-diffusion-3-5-medium/lora"
    names = {key.partition(".")[0] for key in load_file(found)}
    assert names == {key.partition(".")[0] for key in load_file(lora)}
    for one, other in zip(merged_states(tiny, found, 1.0), merged_states(tiny, lora, 1.0)):
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "peft"])
def test_names_there_and_back(tiny: TinySd3, lora: Path, tmp_path: Path, layout: str) -> None:
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    family = ["--family", "sd3"]  # names of diffusers do not tell it
    assert convert_lora.main([str(lora), str(there), "--to", layout, *family]) == 0
    assert convert_lora.main([str(there), str(back), "--to", "kohya", *family]) == 0
    names = set(load_file(there))
    if layout == "diffusers":
        assert "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight" in names
        assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight" in names
    if layout == "comfy":
        assert any(name.startswith("diffusion_model.joint_blocks.0.x_block.attn2.qkv.") for name in names)
        assert any(name.startswith("text_encoders.clip_g.transformer.text_model.") for name in names)
    for one, other in zip(merged_states(tiny, back, 1.0), merged_states(tiny, lora, 1.0)):
        for key, tensor in one.items():
            torch.testing.assert_close(tensor, other[key], rtol=1e-4, atol=1e-5)


def test_resizing_and_telling(lora: Path, tmp_path: Path, capsys) -> None:
    small = tmp_path / "small.safetensors"
    assert resize_lora.main(["--model", str(lora), "--save_to", str(small), "--new_rank", "2"]) == 0
    state = load_file(small)
    assert {tensor.shape[0] for key, tensor in state.items() if key.endswith("lora_down.weight")} == {2}
    assert check_lora.main([str(small)]) == 0
    told = capsys.readouterr()
    assert "Stable Diffusion 3" in told.out + told.err or "sd3" in told.out + told.err
    other = tmp_path / "flux.safetensors"
    save_file_atomic({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(4, 8),
                      "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.zeros(8, 4)}, other)  # fmt: skip
    assert merge_lora.main(["--models", str(lora), str(other), "--save_to", str(tmp_path / "x.safetensors")]) == 2
    assert "different families" in capsys.readouterr().err
