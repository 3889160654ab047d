"""The metadata tool through its command line: what is asked goes or comes, tensors and everything else stay byte by
byte."""

import base64
import io
import json
import struct

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.hashes import adapter_hashes
from networks.files.network_files import write_adapter_file
from tools import edit_metadata

SECRET = "zorbit"
METADATA = {
    "ss_base_model_version": "flux1", "ss_network_module": "networks.lora", "ss_network_dim": "2",
    "ss_network_alpha": "1.0",
    "ss_learning_rate": "0.0001", "ss_output_name": "mine", "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.title": "mine",
    "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4}),
    "ss_tag_frequency": json.dumps({f"20_{SECRET}": {f"{SECRET} cat": 3}}),
    "ss_dataset_dirs": json.dumps({f"20_{SECRET}": {"n_repeats": 1}}),
    "ss_datasets": json.dumps([{
        "resolution": [64, 64], "tag_frequency": {f"20_{SECRET}": {f"{SECRET} cat": 3}},
        "subsets": [{"image_dir": f"20_{SECRET}", "class_tokens": SECRET, "caption_prefix": SECRET, "num_repeats": 20}],
    }]),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 300_000, generator=generator).half(),
        f"{name}.lora_up.weight": torch.randn(9, 2, generator=generator).bfloat16(),
        f"{name}.alpha": torch.tensor(1.0), "other": torch.arange(3),
    }  # fmt: skip
    path = tmp_path / "lora.safetensors"
    write_adapter_file(str(path), tensors, None, METADATA)
    return path


def content(path):
    """(metadata, the header without them, the bytes of all tensors)."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    return header.pop("__metadata__", {}), header, data[8 + length :]


def run(file, *arguments, out=None):
    out = out or file.with_name("out.safetensors")
    assert edit_metadata.main([str(file), *arguments, "--save_to", str(out)]) == 0
    metadata, *rest = content(out)
    assert rest == list(content(file)[1:])
    with safe_open(str(out), "pt") as opened:  # as the library reads it
        assert (opened.metadata() or {}) == metadata
    if "sshs_model_hash" in metadata:
        assert adapter_hashes(load_file(out), metadata).items() <= metadata.items()
    return metadata


@pytest.mark.parametrize(("what", "gone", "kept"), [
    (["tags"], [f"{SECRET} cat", f'"{SECRET}"'], ["20_zorbit", "num_repeats", "ss_learning_rate"]),
    (["folders"], [f"20_{SECRET}", "ss_dataset_dirs"], [f"{SECRET} cat", "num_repeats", "folder 1"]),
    (["tags", "folders"], [SECRET], ["num_repeats", "ss_learning_rate"]),
    (["all"], [SECRET, "ss_learning_rate", "ss_output_name"], ["ss_network_dim", "modelspec.title", "transformer.lora_alpha", "sshs_model_hash"]),
])  # fmt: skip
def test_strip(file, what, gone, kept):
    before, after = content(file)[0], run(file, "--strip", *what)
    told = json.dumps(after)
    told += "".join(json.dumps(json.loads(after[key])) for key in ("ss_datasets", "ss_tag_frequency") if key in after)
    assert not [word for word in gone if word in told] and all(word in told for word in kept), told
    assert (
        after["sshs_model_hash"] == before["sshs_model_hash"]
        and after["sshs_legacy_hash"] != before["sshs_legacy_hash"]
    )


def test_set_and_remove(file):
    after = run(
        file, "--remove", "ss_l*", "ss_datasets", "--set", "modelspec.author=Ada = B", "modelspec.title=", "new=ü"
    )
    expected = {key: value for key, value in METADATA.items() if key not in ("ss_learning_rate", "ss_datasets")}
    expected |= {"modelspec.author": "Ada = B", "modelspec.title": "", "new": "ü"}
    assert {key: value for key, value in after.items() if not key.startswith("sshs_")} == expected


def test_a_thumbnail_and_in_place(file, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGBA", (700, 350), (250, 10, 10, 255)).save(picture)
    before = content(file)
    assert (
        edit_metadata.main(
            [str(file), "--thumbnail", str(picture), "--thumbnail_size", "128", "--in_place", "--dry_run"]
        )
        == 0
    )
    assert content(file) == before
    assert edit_metadata.main([str(file), "--thumbnail", str(picture), "--thumbnail_size", "128", "--in_place"]) == 0
    metadata, *rest = content(file)
    assert rest == list(before[1:]) and sorted(path.name for path in tmp_path.iterdir()) == [
        "lora.safetensors",
        "picture.png",
    ]
    start, _, data = metadata["modelspec.thumbnail"].partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert start == "data:image/jpeg;base64" and shown.size == (128, 64) and shown.getpixel((5, 5))[0] > 230


def test_files_of_others(tmp_path):
    """No metadata, types that torch may not have, a header with spaces before the data."""
    path = tmp_path / "model.safetensors"
    header = b'{"b":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[3],"data_offsets":[2,5]}}   '
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\1\2\3\4\5")
    assert edit_metadata.main([str(path), "--set", "x=1", "--in_place"]) == 0
    assert content(path) == ({"x": "1"}, json.loads(header), b"\1\2\3\4\5")
    assert edit_metadata.main([str(path), "--remove", "x", "--in_place"]) == 0
    assert content(path)[0] == {}


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "nothing to change"), (["--strip", "tags"], "--save_to and --in_place are missing"),
    (["--strip", "tags", "--in_place", "--save_to", "x.safetensors"], "both given"),
    (["--set", "sshs_model_hash=1", "--in_place"], "leave it out"),
    (["--remove", "lora_adapter_metadata", "--in_place"], "how the tensors are to be read"),
    (["--set", "abc", "--in_place"], "KEY=VALUE"),
    (["--remove", "nothing*", "--in_place"], "no key of"),
    (["--thumbnail", "{file}", "--in_place"], "no picture that can be read"),
    (["--strip", "tags", "--save_to", "{file}"], "is an input too"),
    (["--thumbnail", "none.png", "--in_place"], "no such file"),
])  # fmt: skip
def test_bad_input(file, arguments, told, capsys):
    before = file.read_bytes()
    capsys.readouterr()
    assert edit_metadata.main([str(file), *(word.format(file=file) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("error:") == 1 and file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["lora.safetensors"]


def test_a_pickle_is_refused(tmp_path, capsys):
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    assert edit_metadata.main([str(tmp_path / "x.pt"), "--set", "a=b", "--in_place"]) == 2
    assert "safetensors" in capsys.readouterr().err
    save_file({"x": torch.zeros(2)}, tmp_path / "y.safetensors")
    assert edit_metadata.main([str(tmp_path / "y.safetensors"), "--strip", "all", "--in_place"]) == 0
