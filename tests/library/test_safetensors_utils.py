"""Files of tensors: read in parts, written whole or not at all, and named for what they are when they are something
else."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import CheckpointError
from library.safetensors_utils import (
    MemoryEfficientSafeOpen,
    find_key,
    get_split_weight_filenames,
    load_safetensors,
    load_split_weights,
    mem_eff_save_file,
    read_header,
    save_file_atomic,
)


def tensors() -> dict[str, torch.Tensor]:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    found = {f"x.{str(kind)[6:]}": torch.randn(3, 5).to(kind) for kind in kinds}
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    found |= {f"n.{str(kind)[6:]}": torch.arange(7).to(kind) for kind in whole}
    return {**found, "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "turned": torch.randn(4, 6).t()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


@pytest.mark.parametrize("write", [save_file_atomic, mem_eff_save_file])
@pytest.mark.parametrize("disable_mmap", [False, True])
def test_what_is_written_is_read_again(tmp_path, write, disable_mmap: bool) -> None:
    expected, path = tensors(), tmp_path / "sub" / "x.safetensors"
    write(expected, path, {"b": "2", "a": "ü"})
    theirs = load_file(path)
    ours = load_safetensors(path, disable_mmap=disable_mmap)
    assert ours.keys() == theirs.keys() == expected.keys()
    assert all(same(expected[key], ours[key]) and same(expected[key], theirs[key]) for key in expected)
    infos, metadata = read_header(path)
    assert metadata == {"a": "ü", "b": "2"}
    assert all(infos[key].shape == expected[key].shape and infos[key].dtype == expected[key].dtype for key in expected)
    assert [entry.name for entry in path.parent.iterdir()] == ["x.safetensors"]


def test_equal_content_gives_equal_bytes(tmp_path) -> None:
    state = tensors()
    save_file_atomic(state, tmp_path / "a", {"x": "1", "y": "2"})
    save_file_atomic(dict(reversed(state.items())), tmp_path / "b", {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_of_the_other_library_are_read(tmp_path) -> None:
    expected = {key: tensor.contiguous() for key, tensor in tensors().items()}
    save_file(expected, tmp_path / "x.safetensors", {"a": "1"})
    with MemoryEfficientSafeOpen(tmp_path / "x.safetensors") as file:
        assert set(file.keys()) == set(expected) and file.metadata() == {"a": "1"}
        assert all(same(file.get_tensor(key), expected[key]) for key in expected)
        assert file.get_tensor("x.float16", dtype=torch.float32).dtype == torch.float32


def test_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    save_file_atomic({"a": torch.zeros(2)}, path)
    old = path.read_bytes()
    with pytest.raises(KeyError):
        save_file_atomic({"a": torch.zeros(2, dtype=torch.complex128)}, path)
    with pytest.raises(NotImplementedError):
        save_file_atomic({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["x.safetensors"]


def pickled(path) -> None:
    torch.save({"a": torch.zeros(2)}, path)


def cut(path) -> None:
    save_file_atomic({"a": torch.zeros(1000)}, path)
    os.truncate(path, os.path.getsize(path) - 10)


def cut_in_the_header(path) -> None:
    save_file_atomic({f"long.name.{number}": torch.zeros(1) for number in range(50)}, path)
    os.truncate(path, 100)


def damaged_header(path) -> None:
    path.write_bytes((16).to_bytes(8, "little") + b'{"a": nonsense }')


def zipped(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b" * 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("<!DOCTYPE html><html>" + " " * 100), "web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git-lfs"),
        (lambda path: path.write_bytes(b"GGUF" + b"\0" * 100), "GGUF"),
        (lambda path: path.write_bytes(b"\x80\x02}q\x00." + b"\0" * 100), "pickle"),
        (lambda path: path.write_bytes(b"abc"), "no known model file"),
        (lambda path: path.mkdir(), "folder"),
        (pickled, "pickle"),
        (zipped, "pickle"),
        (cut, "truncated"),
        (cut_in_the_header, "truncated"),
        (damaged_header, "damaged"),
    ],
)
def test_other_files_are_named(tmp_path, make, message: str) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    for disable_mmap in (False, True):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_safetensors(path, disable_mmap=disable_mmap)
        assert str(path) in str(caught.value)


def test_pickles_give_tensors_and_run_nothing(tmp_path) -> None:
    pickled(tmp_path / "x.bin")
    assert load_safetensors(tmp_path / "x.bin")["a"].shape == (2,)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"a": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match="evil.bin"):
        load_safetensors(tmp_path / "evil.bin")
    assert not (tmp_path / "executed").exists()


def test_split_sets(tmp_path) -> None:
    for number in (1, 2, 3):
        save_file_atomic(
            {f"k{number}": torch.full((2,), float(number))}, tmp_path / f"m-0000{number}-of-00003.safetensors"
        )
    path = tmp_path / "m-00002-of-00003.safetensors"
    assert len(get_split_weight_filenames(path)) == 3
    assert set(load_split_weights(path, dtype=torch.bfloat16)) == {"k1", "k2", "k3"}
    save_file_atomic({"only": torch.zeros(1)}, tmp_path / "one.safetensors")
    assert get_split_weight_filenames(tmp_path / "one.safetensors") is None
    assert set(load_split_weights(tmp_path / "one.safetensors")) == {"only"}
    (tmp_path / "m-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00003-of-00003"):
        load_split_weights(path)


def test_find_key(tmp_path) -> None:
    save_file_atomic({"a.b.weight": torch.zeros(1), "c.d.bias": torch.zeros(1)}, tmp_path / "x")
    assert find_key(tmp_path / "x", "a.", ".weight") == "a.b.weight"
    assert find_key(tmp_path / "x", ends_with=".bias") == "c.d.bias"
    assert find_key(tmp_path / "x", "z") is None
