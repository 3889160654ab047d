"""A PEFT folder (adapter_model.safetensors beside adapter_config.json): resized, it is one again, with its scale and ranks."""

import json

import torch

from library.safetensors_utils import load_safetensors, save_file_atomic
from tools.lora_tools.resize import main


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
    assert (written["r"], written["lora_alpha"], written["target_modules"], written["peft_type"]) == (4, 4, ["to_q"], "LORA")
    matrix = 2.0 * up @ down
    error = (found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"] - matrix).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[4:].norm(), rtol=1e-4, atol=1e-4)
