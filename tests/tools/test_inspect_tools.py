"""What check_lora, inspect_lora and show_metadata tell of a file."""

import json
import re

import pytest
import torch
from PIL import Image

from library.components.lllite_models import LLLite, new_shapes
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.sdxl_models import SdxlUNet2DConditionModel
from networks.files.adapter_report import report
from networks.files.lora_conversion import to_diffusers, to_dotted
from tests.tiny_sd import build_tiny_sd, tiny_params
from tests.tools.test_merge_lora import models_of, write_lora
from tools import check_lora, inspect_lora, show_metadata


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    model = build_tiny_sd(folder, "sd1", num_res_blocks=2).model
    return write_lora(folder / "lora.safetensors", *models_of("sd1", model), seed=1, metadata={
        "ss_base_model_version": "sd_v1", "ss_network_dim": "2", "ss_tag_frequency": json.dumps({"a": {"cat": 3}}),
        "ss_bucket_info": '{"x": "[1, 2]"}',
    })  # fmt: skip


@pytest.mark.parametrize("tool", [check_lora, inspect_lora])
def test_what_is_in_a_file(lora, tmp_path, capsys, tool):
    plot = tmp_path / "new" / "norms.png"
    assert tool.main([lora, "--plot", str(plot)]) == 0
    told = capsys.readouterr().out
    count = sum(key.endswith("alpha") for key in load_safetensors(lora))
    assert f"{count} layers for sd, kohya names" in told and "base model sd_v1" in told
    assert "denoiser down_blocks 0" in told and "te layers 1" in told
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.width > 300


@pytest.mark.parametrize("convert", [to_diffusers, to_dotted])
def test_norms_do_not_depend_on_the_naming(lora, convert):
    tensors = load_safetensors(lora)
    one = report(tensors, "sd")
    two = report(convert("sd", {key: tensor for key, tensor in tensors.items() if "lora_unet" in key}), "sd")
    wanted = sorted(layer.norm for layer in one.layers if layer.part == "denoiser")
    assert sorted(layer.norm for layer in two.layers) == pytest.approx(wanted, rel=1e-4)
    for layer in one.layers:
        up, down = (tensors[f"{layer.name}.{half}.weight"].flatten(1) for half in ("lora_up", "lora_down"))
        assert layer.norm == pytest.approx(float((0.75 * up @ down).norm()), rel=1e-4) and (
            layer.rank,
            layer.alpha,
        ) == (2, 1.5)


def test_every_matrix_once(lora, capsys):
    assert check_lora.main([lora, "--weights"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".weight,(" in line]
    assert len(lines) == 2 * sum(key.endswith("alpha") for key in load_safetensors(lora)) == len(set(lines))
    assert check_lora.main([lora, "-s"]) == 0
    assert sum(",(" in line for line in capsys.readouterr().out.splitlines()) == len(load_safetensors(lora))


def test_what_is_wrong_with_a_file(lora, tmp_path, capsys):
    tensors, path = load_safetensors(lora), tmp_path / "bad.safetensors"
    name = next(iter(tensors)).partition(".")[0]
    without = {key: tensor for key, tensor in tensors.items() if key != f"{name}.lora_up.weight"}
    for change, told in (
        ({**tensors, f"{name}.lora_up.weight": tensors[f"{name}.lora_up.weight"] * float("nan")}, "not finite"),
        (without, "needed for LoRA"),
        ({**tensors, "something.else": torch.zeros(1)}, "belongs to no adapter"),
        ({**tensors, "lora_unet_nowhere.lora_down.weight": torch.ones(2, 3), "lora_unet_nowhere.lora_up.weight": torch.ones(3, 2)}, "1 layers are in no sd"),
    ):  # fmt: skip
        save_file_atomic(change, path, {"ss_base_model_version": "sd_v1"})
        assert check_lora.main([str(path)]) != 0
        assert told in capsys.readouterr().err
    save_file_atomic({key: tensor for key, tensor in tensors.items() if "alpha" not in key}, path)
    assert check_lora.main([str(path)]) == 0
    assert "have no alpha" in capsys.readouterr().out
    assert check_lora.main([str(path), "--plot", str(path)]) == 2
    assert check_lora.main([]) == 2


def test_refiners_are_blocks_of_their_own() -> None:
    names = ("noise_refiner_0_attention_out", "context_refiner_1_attention_out", "final_layer_linear")
    parts = {"lora_down.weight": torch.ones(1, 4), "lora_up.weight": torch.ones(4, 1)}
    found = report({f"lora_unet_{name}.{part}": parts[part] for name in names for part in parts}, "lumina").layers
    assert sorted(layer.block for layer in found) == ["context_refiner 1", "noise_refiner 0", "other"]


def test_a_control_net_lllite(tmp_path, capsys):
    """Its modules by block, its sizes, and what is wrong with it."""
    unet = SdxlUNet2DConditionModel(tiny_params("sdxl"))
    tensors = LLLite(unet, new_shapes(unet, 6, 5)).state_dict()
    path, some = tmp_path / "net.safetensors", next(iter(tensors))
    save_file_atomic(tensors, path, {"ss_cond_emb_dim": "6", "ss_network_dim": "5"})
    assert check_lora.main([str(path)]) == 0
    told = capsys.readouterr().out
    assert "20 layers for sdxl, LLLite names" in told and "rank 5, cond_emb_dim 6" in told
    assert re.search(r"denoiser middle_block 1 +8 +LLLite +5", told) and "embedded in 6 channels" in told
    assert "change nothing" not in told
    idle = {key: tensor * 0 if ".up." in key else tensor for key, tensor in tensors.items()}
    save_file_atomic(idle, path)
    assert check_lora.main([str(path)]) == 0 and "20 modules change nothing" in capsys.readouterr().out
    for changed, message in (
        ({**tensors, some: tensors[some] * float("nan")}, "not finite"),
        ({key: tensor for key, tensor in tensors.items() if key != some}, "is incomplete"),
    ):
        save_file_atomic(changed, path)
        assert check_lora.main([str(path)]) != 0 and message in capsys.readouterr().err


def test_metadata_as_json(lora, tmp_path, capsys, caplog):
    capsys.readouterr()
    assert show_metadata.main(["--model", lora]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ss_tag_frequency"] == '{"a": {"cat": 3}}'
    assert show_metadata.main([lora, "--decode"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (
        shown["ss_tag_frequency"] == {"a": {"cat": 3}}
        and shown["ss_bucket_info"] == {"x": [1, 2]}
        and shown["ss_network_dim"] == "2"
    )
    save_file_atomic({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert show_metadata.main([str(tmp_path / "x.safetensors")]) == 0
    assert "no metadata" in caplog.text
    assert show_metadata.main(["--model", str(tmp_path / "none.safetensors")]) == 2 and show_metadata.main([]) == 2
