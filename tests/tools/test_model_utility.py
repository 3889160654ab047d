"""Tensors chosen, cast and renamed by parts of their names."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.safetensors_utils import save_file_atomic
from tools import model_utility
from tools.model_tools import utility

TENSORS = {
    "model.block.0.attn.weight": torch.linspace(-3, 3, 12).reshape(3, 4), "model.block.0.norm.weight": torch.rand(4),
    "model.block.1.attn.weight": torch.rand(3, 4), "model.index": torch.arange(3), "vae.weight": torch.rand(2),
}  # fmt: skip


@pytest.fixture(params=["safetensors", "pth"])
def source(request, tmp_path) -> str:
    path = tmp_path / f"model.{request.param}"
    if request.param == "pth":
        torch.save({"state_dict": TENSORS}, path)
    else:
        save_file_atomic(TENSORS, path, {"format": "pt", "title": "日本"})
    return str(path)


def test_tensors_are_listed_and_written_by_their_names(source, tmp_path, capsys):
    words = ["--input", source, "--dtype", "fp16", "--dtype_exclude_keys", "norm", "--full_exclude_keys", "vae"]
    assert model_utility.main([*words, "--strip_prefix", "model."]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "block.0.attn.weight  float16  [3, 4]" in told and "block.0.norm.weight  float32  [4]" in told
    assert "index  int64  [3]" in told and told[-1] == "4 tensors, 31 numbers, 88 bytes"
    out = tmp_path / "out.safetensors"
    assert model_utility.main([*words, "--strip_prefix", "model.", "--output_path", str(out)]) == 0
    made = load_file(out)
    assert sorted(made) == ["block.0.attn.weight", "block.0.norm.weight", "block.1.attn.weight", "index"]
    assert torch.equal(made["block.0.attn.weight"], TENSORS["model.block.0.attn.weight"].half())
    assert torch.equal(made["block.0.norm.weight"], TENSORS["model.block.0.norm.weight"])
    assert torch.equal(made["index"], TENSORS["model.index"])
    with safe_open(out, "pt") as file:
        assert (file.metadata() or {}).get("title") == ("日本" if source.endswith("safetensors") else None)
    assert model_utility.main([*words, "--output_path", str(out)]) != 0, "it is there"
    assert model_utility.main(["--input", source, "--full_target_keys", "norm", "vae", "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 tensors")


def test_what_cannot_be_done_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file_atomic({"a.b": torch.ones(1), "b": torch.ones(1)}, path)
    with pytest.raises(ConfigError) as caught:
        utility.run(["--input", str(tmp_path / "none"), "--dtype", "int7", "--dtype_target_keys", "x"])
    assert "--dtype is 'int7'" in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such file"):
        utility.run(["--input", str(tmp_path / "none"), "--output_path", "x.pth"])
    with pytest.raises(ConfigError, match="--dtype_target_keys says which tensors become --dtype"):
        utility.run(["--input", str(path), "--dtype_target_keys", "x"])
    with pytest.raises(ConfigError, match="no name fits"):
        utility.run(["--input", str(path), "--full_target_keys", "zzz"])
    with pytest.raises(ConfigError, match="makes the name 'b' twice"):
        utility.run(["--input", str(path), "--strip_prefix", "a."])
