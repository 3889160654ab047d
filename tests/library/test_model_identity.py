"""The cheap identity of model files."""

from __future__ import annotations

import json
import os

import torch
from safetensors.torch import save_file

from library.checkpoints.identity import BLOCK_BYTES, combined_identity, model_identity


def test_a_copy_has_the_same_identity_and_a_changed_file_another(tmp_path):
    weights = {"a": torch.zeros(300_000), "b": torch.ones(300_000)}
    save_file(weights, tmp_path / "one.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    os.utime(tmp_path / "copy.safetensors", (1, 1))
    first = model_identity(tmp_path / "one.safetensors")
    assert first == model_identity(str(tmp_path / "copy.safetensors")) and len(first) == 32
    weights["b"] = weights["b"] * 2
    save_file(weights, tmp_path / "one.safetensors")
    assert model_identity(tmp_path / "one.safetensors") != first


def test_names_in_the_header_count(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    assert model_identity(tmp_path / "one.safetensors") != model_identity(tmp_path / "two.safetensors")


def test_every_file_of_a_split_model_counts(tmp_path):
    names = [f"m-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.zeros(4)}, tmp_path / name)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{number}": name for number, name in enumerate(names)}}))
    first = [model_identity(tmp_path / name) for name in (names[0], index.name)]
    save_file({"t1": torch.ones(4)}, tmp_path / names[1])
    assert all(model_identity(tmp_path / name) != before for name, before in zip((names[0], index.name), first))
    (tmp_path / names[1]).unlink()
    assert model_identity(tmp_path / names[0]) not in first  # what is missing is told when the model is read


def test_both_ends_of_a_large_file_are_read(tmp_path):
    path = tmp_path / "model.bin"
    content = bytearray(40 * BLOCK_BYTES)
    path.write_bytes(content)
    first = model_identity(path)
    for place in (0, len(content) - 1):
        changed = bytearray(content)
        changed[place] = 1
        path.write_bytes(changed)
        assert model_identity(path) != first


def test_folders_and_missing_files(tmp_path):
    assert model_identity(None) == model_identity("some/hub-id") == ""
    save_file({"a": torch.zeros(4)}, tmp_path / "x.safetensors")
    one = model_identity(tmp_path)
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    assert one != model_identity(tmp_path) != ""
    assert combined_identity(["a", "b"]) != combined_identity(["b", "a"])
