"""Headers of safetensors files: what the format's own library accepts is accepted, everything else is one message."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from library.core.errors import CheckpointError
from library.safetensors_utils import MemoryEfficientSafeOpen, load_safetensors, read_header

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F16", "shape": [3, 1], "data_offsets": [8, 14]}


def write(path: Path, header: object, data: int = 14, text: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(**changes: object) -> dict:
    return {"a": {**A, **changes}, "b": B}


VALID = {
    "two tensors": ({"a": A, "b": B}, 14, None),
    "another order": ({"b": B, "__metadata__": {"x": "y"}, "a": A}, 14, None),
    "no tensors": ({}, 0, None),
    "only metadata": ({"__metadata__": {"format": "pt"}}, 0, None),
    "metadata null": ({"__metadata__": None, "a": A, "b": B}, 14, None),
    "surplus key in an entry": (entry(note="x"), 14, None),
    "padded with spaces": (None, 14, json.dumps({"a": A, "b": B}).encode() + b" " * 9),
    "space before": (None, 14, b" \n" + json.dumps({"a": A, "b": B}).encode()),
    "padded with line ends": (None, 14, json.dumps({"a": A, "b": B}, indent=3).encode() + b"\n\t\r "),
    "empty tensors between": ({"a": A, "e": {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]}, "b": B}, 14, None),
    "scalar": ({"a": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}}, 8, None),
    "letters of the world": ({"ä😀": A, "b": B, "__metadata__": {"名": "ü\u2028"}}, 14, None),
    "escaped pair": (None, 14, b'{"\\ud83d\\ude00": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":' + json.dumps(B).encode() + b"}"),
    "u16": ({"a": {"dtype": "U16", "shape": [4], "data_offsets": [0, 8]}}, 8, None),
    "u64": ({"a": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}, 8, None),
    "e8m0": ({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, 8, None),
    "complex": ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, 8, None),
}  # fmt: skip

DAMAGED = {
    "shape of texts": (entry(shape=["2"]), 14, None, "shape of 'a'"),
    "shape of fractions": (entry(shape=[2.0]), 14, None, "shape of 'a'"),
    "shape of truths": (entry(shape=[True, 2]), 14, None, "shape of 'a'"),
    "negative shape": (entry(shape=[-1, -2]), 14, None, "shape of 'a'"),
    "shape is a number": (entry(shape=2), 14, None, "shape of 'a'"),
    "shape is null": (entry(shape=None), 14, None, "shape of 'a'"),
    "huge shape": (entry(shape=[2**62, 2**62]), 14, None, "more than any file holds"),
    "huge empty shape": (entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), 14, None, "more than any file holds"),
    "beyond 64 bits": (entry(shape=[2**64]), 14, None, "shape of 'a'"),
    "shape and place differ": (entry(shape=[3]), 14, None, "'a' has 8 bytes"),
    "three places": (entry(data_offsets=[0, 8, 9]), 14, None, "place of 'a'"),
    "one place": (entry(data_offsets=[0]), 14, None, "place of 'a'"),
    "places are texts": (entry(data_offsets=["0", "8"]), 14, None, "place of 'a'"),
    "places turned round": (entry(data_offsets=[8, 0]), 14, None, "'a' has -8 bytes"),
    "negative place": (entry(data_offsets=[-8, 0]), 14, None, "place of 'a'"),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [4, 10]}}, 14, None, "'b' overlaps"),
    "same place": ({"a": A, "b": A}, 8, None, "overlaps"),
    "hole": ({"a": A, "b": {**B, "data_offsets": [10, 16]}}, 16, None, "'b' leaves 2 bytes"),
    "hole at the start": ({"b": B}, 14, None, "'b' leaves 8 bytes"),
    "bytes behind": ({"a": A, "b": B}, 15, None, "1 bytes follow"),
    "cut": ({"a": A, "b": B}, 13, None, "truncated: 13 of 14 bytes"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8, None, "has no dtype"),
    "dtype is a list": (entry(dtype=["F32"]), 14, None, "['F32'], which cannot be read"),
    "dtype unknown": (entry(dtype="F128"), 14, None, "F128"),
    "dtype in small letters": (entry(dtype="f32"), 14, None, "f32"),
    "entry is a list": ({"a": [1]}, 0, None, "entry of 'a' is [1]"),
    "entry is null": ({"a": None}, 0, None, "entry of 'a' is None"),
    "metadata is a list": ({"__metadata__": ["x"]}, 0, None, "__metadata__ is ['x']"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, 0, None, "has 1 under 'x'"),
    "half a surrogate pair": (None, 0, b'{"__metadata__":{"x":"\\ud800"}}', "damaged"),
    "half a pair in a name": (None, 8, b'{"\\udc00":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "damaged"),
    "no JSON": (None, 14, b'{"a": nope}', "damaged"),
    "cut JSON": (None, 14, b'{"a": {"dtype"', "damaged"),
    "not UTF-8": (None, 14, b'{"\xff\xfe": 1}', "damaged"),
    "UTF-16": (None, 14, "{}".encode("utf-16-le"), "damaged"),
    "deep": (None, 0, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "number of 5000 digits": (None, 8, b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', "damaged"),
}  # fmt: skip
READERS = {
    "read_header": read_header, "load": load_safetensors,
    "load without a map": lambda path: load_safetensors(path, disable_mmap=True),
    "one by one": MemoryEfficientSafeOpen,
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_what_the_library_accepts_is_read(tmp_path, name: str):
    header, data, text = VALID[name]
    path = write(tmp_path / "x.safetensors", header, data, text)
    with safe_open(path, "pt") as theirs:
        names, metadata = set(theirs.keys()), theirs.metadata() or {}
    assert read_header(path)[1] == metadata
    for without_map in (False, True):
        tensors = load_safetensors(path, disable_mmap=without_map)
        assert tensors.keys() == names and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_one_message(tmp_path, name: str, reader: str):
    header, data, text, told = DAMAGED[name]
    path = write(tmp_path / "x.safetensors", header, data, text)
    with pytest.raises(CheckpointError) as caught:
        READERS[reader](path)
    assert "x.safetensors" in str(caught.value) and told in str(caught.value) and len(str(caught.value)) < 700


def test_deep_values_that_nobody_reads(tmp_path):
    """The library limits the depth of these too; its refusal is a message of ours."""
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":' + b"[" * 500 + b"]" * 500 + b"}}"
    path = write(tmp_path / "x.safetensors", None, 8, text)
    assert load_safetensors(path, disable_mmap=True).keys() == {"a"}
    with pytest.raises(CheckpointError, match="x.safetensors cannot be read"):
        load_safetensors(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "zero byte"])
def test_what_is_no_file(tmp_path, kind: str):
    path = str(tmp_path / "x.safetensors")
    if kind == "folder":
        os.mkdir(path)
    elif kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("this system has no pipes with a name")
        os.mkfifo(path)
    elif kind == "zero byte":
        path = "x\0.safetensors"
    for reader in READERS.values():
        with pytest.raises(CheckpointError):
            reader(path)


def mutated(text: str, draw: random.Random) -> bytes:
    """A header with a few of its pieces put elsewhere, doubled, lost or exchanged."""
    pieces = [piece for piece in re.split(r"(\W)", text) if piece]
    for _ in range(draw.randint(1, 3)):
        i, j = draw.randrange(len(pieces)), draw.randrange(len(pieces))
        change = draw.randrange(4)
        if change == 0:
            pieces[i], pieces[j] = pieces[j], pieces[i]
        elif change == 1:
            pieces.insert(i, pieces[j])
        elif change == 2 and len(pieces) > 2:
            del pieces[i]
        else:
            pieces[i] = draw.choice(
                [
                    "0",
                    "8",
                    "-1",
                    "1e3",
                    "2.0",
                    "null",
                    "true",
                    '"x"',
                    "[]",
                    "{}",
                    "18446744073709551616",
                    "F32",
                    "é",
                    "\\u0041",
                ]
            )
    return "".join(pieces).encode()


def test_the_verdict_is_that_of_the_library(tmp_path):
    """3000 headers with random changes: the same ones pass, and what they say is the same."""
    draw, path, passed = random.Random(0), tmp_path / "x.safetensors", 0
    whole = json.dumps(
        {"__metadata__": {"k": "v"}, "a": A, "e": {"dtype": "U8", "shape": [0], "data_offsets": [8, 8]}, "b": B}
    )
    for number in range(3000):
        text = mutated(whole, draw)
        write(path, None, draw.choice([14, 14, 14, 8, 16]), text)
        try:
            with safe_open(path, "pt") as theirs:
                wanted = {key: theirs.get_slice(key).get_shape() for key in theirs.keys()}
        except SafetensorError:
            wanted = None
        try:
            infos, _ = read_header(path)
            found = {key: list(info.shape) for key, info in infos.items()}
        except CheckpointError:
            found = None
        assert found == wanted, (number, text)
        passed += found is not None
    assert 100 < passed < 2900


def test_a_changed_file_is_read_anew_and_what_a_caller_changes_is_its_own(tmp_path: Path) -> None:
    """Headers are remembered by their content; here size and times of the file stay as they were."""
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"x": "1"}, "a": A, "b": B})
    times = os.stat(path)
    infos, metadata = read_header(path)
    infos.clear(), metadata.clear()
    infos, metadata = read_header(path)
    assert list(infos) == ["a", "b"] and metadata == {"x": "1"}
    write(path, {"__metadata__": {"x": "2"}, "c": A, "b": B})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(path).st_size == times.st_size
    infos, metadata = read_header(path)
    assert list(infos) == ["c", "b"] and metadata == {"x": "2"}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        read_header(path)
