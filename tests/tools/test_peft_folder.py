"""A PEFT folder (adapter_model.safetensors beside adapter_config.json): resized or averaged, it is one again, with its
strength; inspected, that is told."""

import json

import pytest
import torch

from library.safetensors_utils import load_safetensors, save_file_atomic
from tools.lora_tools.ema import main as average
from tools.lora_tools.inspection import main as inspect
from tools.lora_tools.metadata_edit import main as edit
from tools.lora_tools.resize import main

NAME = "base_model.model.transformer_blocks.0.attn.to_q"


def peft_folder(folder, seed, alpha):
    """(file, its change at strength 1) of rank 6."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(6, 20, generator=generator), torch.randn(10, 6, generator=generator)
    save_file_atomic({f"{NAME}.lora_A.weight": down, f"{NAME}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": alpha, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder / "adapter_model.safetensors"), (down, up)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "average.safetensors"])
def test_an_average_keeps_the_strength(tmp_path, name):
    files = [peft_folder(tmp_path / str(seed), seed, 12) for seed in (1, 2)]
    out = tmp_path / "out" / name
    assert average([*(path for path, _ in files), "--no_sort", "--beta", "0.5", "--output_file", str(out)]) == 0
    found = load_safetensors(out)
    assert set(found) == {f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"}
    down, up = ((a + b) / 2 for a, b in zip(files[0][1], files[1][1]))
    torch.testing.assert_close(found[f"{NAME}.lora_B.weight"] @ found[f"{NAME}.lora_A.weight"], 2.0 * up @ down)
    written = json.loads((out.parent / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (6, 6, "LORA")


def test_an_average_of_other_strengths_is_refused(tmp_path, capsys):
    files = [peft_folder(tmp_path / str(seed), seed, alpha)[0] for seed, alpha in ((1, 12), (2, 3))]
    out = tmp_path / "out" / "average.safetensors"
    assert average([*files, "--output_file", str(out)]) != 0 and not out.exists()
    assert "other alphas" in capsys.readouterr().err
    assert average([files[0], files[0], "--output_file", str(tmp_path / "1" / "average.safetensors")]) != 0
    assert "another folder" in capsys.readouterr().err


def test_the_norm_is_that_of_the_strength(tmp_path, capsys):
    file, (down, up) = peft_folder(tmp_path / "in", 1, 12)
    assert inspect([file]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("denoiser"))
    assert row.split()[-2:] == ["12", f"{float((2.0 * up @ down).norm()):.4g}"]


def test_metadata_that_move_away_from_the_strength(tmp_path, capsys):
    file = peft_folder(tmp_path / "in", 1, 12)[0]
    assert edit([file, "--set", "a=b", "--save_to", str(tmp_path / "other.safetensors")]) == 0
    assert "adapter_config.json beside it" in capsys.readouterr().err
    assert edit([file, "--set", "a=b", "--in_place"]) == 0
    assert "adapter_config.json" not in capsys.readouterr().err


def test_a_folder_of_peft(tmp_path, capsys):
    source, out = tmp_path / "in" / "adapter_model.safetensors", tmp_path / "out" / "adapter_model.safetensors"
    source.parent.mkdir()
    generator = torch.Generator().manual_seed(1)
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    down, up = torch.randn(6, 20, generator=generator), torch.randn(10, 6, generator=generator)
    save_file_atomic({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, source)
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["to_q"]}
    (source.parent / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["--model", str(source), "--new_rank", "4", "--save_to"]
    assert main([*words, str(source.with_name("other.safetensors"))]) != 0
    assert "another folder" in capsys.readouterr().err
    assert main([*words, str(out)]) == 0
    found = load_safetensors(out)
    written = json.loads((out.parent / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["r"], written["lora_alpha"], written["target_modules"], written["peft_type"]) == (
        4,
        4,
        ["to_q"],
        "LORA",
    )
    matrix = 2.0 * up @ down
    error = (found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"] - matrix).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[4:].norm(), rtol=1e-4, atol=1e-4)
