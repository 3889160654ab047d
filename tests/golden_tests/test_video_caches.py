"""Cache files of clips against the recorded format: files of the known trainer, their batches, merges and names of
keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from library.core.errors import CheckpointError
from library.dataset import tensor_cache_io
from library.dataset.architectures import ARCHITECTURES
from library.dataset.cache_io import LatentArrays, LatentsRecord
from library.dataset.collate import Sample, collate
from library.dataset.plan import BatchRequest
from library.dataset.tensor_cache_io import TensorFile
from library.dataset.tensor_cache_keys import parse_key
from library.dataset.text_cache_io import TEXT_LAYOUTS, TextLayout, TextRecord, caption_hash
from library.families.latents import LatentSpec
from library.families.record import ClipFacts, DataArchitecture, TextKey
from library.safetensors_utils import save_file_atomic
from tests.golden_dir import BEHAVIOUR_DIR, behaviour_cases

FILE = "video_caches.json"
LONG_NAMES = {
    "hv": "hunyuan_video", "wan": "wan", "fp": "framepack", "f2d": "flux_2_dev", "f2k4b": "flux_2_klein_4b",
    "f2k9b": "flux_2_klein_9b", "qi": "qwen_image", "qie": "qwen_image", "qil": "qwen_image", "zi": "z_image",
    "fk": "flux_kontext",
}  # fmt: skip
"""what headers say, also of architectures that are no family here"""


OWN = {"hv": "hunyuan_video", "wan": "wan", "fp": "framepack"}
"""architectures that are families here"""


def architecture(short: str, channels: int = 16) -> DataArchitecture:
    return DataArchitecture(
        name=short, latents=LatentSpec(channels=channels, spatial_stride=8, temporal_stride=4, clips=True),
        bucket_step=16, latents_suffix=f"_{short}.safetensors", text_suffix=f"_{short}_te.safetensors",
        clips=ClipFacts(short=short, long=LONG_NAMES.get(short, short)),
    )


def layout_of(file: TensorFile) -> TextLayout:
    """That of the outputs in a file."""
    keys = []
    for name, key in file.keys.items():
        dtype = file.dtypes[name]
        number = "float" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
        keys.append(
            TextKey(name, rank=len(file.shapes[name]), dtype=number, varlen=parse_key(key).is_list, encoders=(0,))
        )
    return TextLayout(tuple(keys))


def filled(shape: list[int], c: int) -> torch.Tensor:
    """`fill` of the recorded files."""
    count = torch.Size(shape).numel()
    return (((7 * torch.arange(count) + c) % 97 - 48) / 8).reshape(shape)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "files"))
def test_file_of_the_known_trainer(case):
    file = TensorFile.of(str(BEHAVIOUR_DIR / case["file"]))
    assert file.metadata == case["metadata"]
    assert tensor_cache_io.architecture_problem(file, architecture(case["architecture"])) is None
    assert {name: key for name, key in file.keys.items()} == {n: b["key"] for n, b in case["batch"].items()}
    assert {n: not parse_key(b["key"]).is_list for n, b in case["batch"].items()} == {
        n: b["stacked"] for n, b in case["batch"].items()
    }
    tensors = file.read(list(file.keys))
    for name, tensor in tensors.items():
        wanted = case["keys"][file.keys[name]]
        assert str(tensor.dtype) == f"torch.{wanted['dtype']}" and list(tensor.shape) == wanted["shape"]
    names = {key: name for name, key in file.keys.items()}
    for key, c in case.get("recipe", {}).items():
        tensor = tensors[names[key]]
        assert torch.equal(tensor, filled(list(tensor.shape), c).to(tensor.dtype)), key


def bucket_of(case: dict) -> tuple[int, ...]:
    """The smallest sample whose latents have the recorded shape."""
    *_, frames, height, width = case["keys"][case["batch"]["latents"]["key"]]["shape"]
    return (width * 8, height * 8, 1 + (frames - 1) * 4) if frames > 1 else (width * 8, height * 8)


def is_of_families(case: dict) -> bool:
    return case["architecture"] in OWN


@pytest.mark.parametrize(
    "case", behaviour_cases(FILE, "files", where=lambda case: case["kind"] == "latents" and is_of_families(case))
)
def test_latents_are_judged_read_and_written_alike(case, tmp_path):
    """A file of the known trainer serves, and what is read from it makes the same file: keys, formats and header."""
    what, path, bucket = architecture(case["architecture"]), str(BEHAVIOUR_DIR / case["file"]), bucket_of(case)
    file = TensorFile.of(path)
    needed = {name: file.shapes[name] for name in case["batch"] if name != "latents"}
    frames = int(case["metadata"].get("frame_count", 0)) or None
    record = LatentsRecord(model="", latent_space="", resized=(1, 1), interpolation=None, frame_count=frames)
    needs = {"flip_aug": False, "alpha_mask": False, "conditions": needed, "expected": record}
    assert tensor_cache_io.latents_problem(path, what, bucket, **needs) is None
    later = {**needs, "expected": dataclasses.replace(record, frame_count=(frames or 1) + 4)}
    problem = tensor_cache_io.latents_problem(path, what, bucket, **later)
    assert problem == (f"made of {frames} frames, and now {frames + 4}" if frames else None)
    larger = (bucket[0] + 16, *bucket[1:])
    assert "latents of shape" in tensor_cache_io.latents_problem(path, what, larger, **needs)
    arrays = tensor_cache_io.load_latents(path, what, bucket)
    conditions = tensor_cache_io.load_conditions(path, what, bucket, needed, flipped=False)
    written = str(tmp_path / "again.safetensors")
    again = LatentArrays(
        latents=arrays.latents, original_size=arrays.original_size, crop_ltrb=arrays.crop_ltrb, conditions=conditions
    )
    tensor_cache_io.save_latents(written, what, bucket, again, record)
    stored, found = TensorFile.of(written), file.read(list(file.keys))
    own = {**stored.metadata}
    own.pop("atelier_record")
    assert own == case["metadata"]
    assert stored.keys.keys() == file.keys.keys() and stored.shapes == file.shapes and stored.dtypes == file.dtypes
    assert all(torch.equal(tensor, found[name]) for name, tensor in stored.read(list(stored.keys)).items())
    told = {name: str(file.dtypes[name]).replace("torch.", "_") for name in file.keys}
    assert all(stored.keys[name] == key for name, key in file.keys.items() if key.endswith(told[name]))


@pytest.mark.parametrize(
    "case", behaviour_cases(FILE, "files", where=lambda case: case["kind"] == "text" and is_of_families(case))
)
def test_text_serves_its_family(case):
    """By the record of the family: names, ranks and kinds of numbers; for the caption in the header and no other."""
    family, path = OWN[case["architecture"]], str(BEHAVIOUR_DIR / case["file"])
    what, layout = ARCHITECTURES[family], TEXT_LAYOUTS[family]
    assert what.clips.long == LONG_NAMES[case["architecture"]] and path.endswith(what.text_suffix)
    record = TextRecord(caption=caption_hash(case["metadata"]["caption1"]), model="x")
    needs = {"needed": layout.names, "accept_unrecorded": False}
    assert tensor_cache_io.find_text(path, what, layout, record, **needs) == ("", "")
    other = dataclasses.replace(record, caption=caption_hash("another"))
    assert tensor_cache_io.find_text(path, what, layout, other, **needs) == (None, "made with another caption")
    file, found = TensorFile.of(path), tensor_cache_io.load_text(path, layout)
    assert found.keys() == set(layout.names) == file.keys.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in file.read(list(file.keys)).items())
    assert layout.lists == {name for name, entry in case["batch"].items() if not entry["stacked"]}


@pytest.mark.parametrize("case", behaviour_cases(FILE, "batches"))
def test_batch_of_cached_samples(case):
    given = case["input"]
    latents = TensorFile.of(str(BEHAVIOUR_DIR / given["latents"]))
    text = TensorFile.of(str(BEHAVIOUR_DIR / given["text"]))
    layout = layout_of(text)
    conditions = latents.read(list(latents.keys))
    sample = Sample(
        image_key="a", caption="", text_outputs=tensor_cache_io.load_text(text.path, layout), loss_weight=1.0,
        original_size_hw=(1, 1), crop_top_left=(0, 0), target_size_hw=(1, 1), flipped=False,
        latents=conditions.pop("latents"), conditions=conditions,
    )
    places = tuple(range(given["items"]))
    request = BatchRequest(
        dataset=0, items=places, positions=places, step=0, epoch=1, index=0, group_size=len(places),
        is_last_of_group=True, is_last_of_epoch=True,
    )
    batch = collate(request, [sample] * given["items"], None, 1.0, layout.names, layout.lists)
    found = {"latents": batch.latents, **batch.conditions, **batch.conditioning}
    assert found.keys() == case["expected"].keys()
    for name, wanted in case["expected"].items():
        assert isinstance(found[name], list) == ("list" in wanted)
        if "list" in wanted:
            assert [list(tensor.shape) for tensor in found[name]] == [wanted["shape"]] * wanted["list"]
            assert [list(t.shape) for t in batch.rows([1]).conditioning[name]] == [wanted["shape"]]
        else:
            assert list(found[name].shape) == wanted["shape"], name


OUTPUTS = {
    "llm": (TextKey("llm", encoders=(0,)), TextKey("llm_mask", rank=1, dtype="int64")),
    "clipL": (TextKey("clipL", rank=1, encoders=(1,)),),
    "t5": (TextKey("t5", encoders=(0,), varlen=True),),
}
"""what the encoders of the recorded writes make"""


@pytest.mark.parametrize("case", behaviour_cases(FILE, "merges"))
def test_writes_in_order(case, tmp_path):
    path, expected = str(tmp_path / "a_te.safetensors"), case["expected"]

    def write(entry: dict) -> None:
        keys = OUTPUTS[entry["encoder"]]
        layout = TextLayout(tuple(key for group in OUTPUTS.values() for key in group))
        dtype = getattr(torch, entry["dtype"])
        outputs = {
            key.name: torch.ones([3] * key.rank, dtype=dtype if key.dtype == "float" else torch.int64) for key in keys
        }
        record = TextRecord(caption=caption_hash(entry["caption"]), model="")
        tensor_cache_io.save_text(
            path, architecture(entry["architecture"]), layout, outputs, record, caption=entry["caption"]
        )

    *first, last = case["input"]["writes"]
    for entry in first:
        write(entry)
    if expected == "error":
        with pytest.raises(CheckpointError, match="made for hunyuan_video"):
            write(last)
        return
    write(last)
    file = TensorFile.of(path)
    assert sorted(file.keys.values()) == sorted(expected["keys"])
    assert file.metadata["caption1"] == expected["caption1"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "nan"))
def test_numbers_that_are_none(case, tmp_path, caplog):
    """Counted where a file is written and where one of another program is read."""
    latents, places = filled([16, 3, 4, 6], 1), case["nan_positions"]
    latents.view(-1)[slice(None) if places is None else places] = float("nan")
    arrays = LatentArrays(latents=latents, original_size=torch.tensor([48, 32]), crop_ltrb=torch.zeros(4))
    path, what, bucket = str(tmp_path / "a.safetensors"), architecture("hv"), (48, 32, 9)
    other = str(tmp_path / "other.safetensors")
    save_file_atomic({"latents_3x4x6_float32": latents}, other)
    if places is None:
        with pytest.raises(CheckpointError, match=r"latents_3x4x6_float32 of .*a\.safetensors: 1152 of 1152 numbers"):
            tensor_cache_io.save_latents(path, what, bucket, arrays)
        with pytest.raises(CheckpointError, match="1152 of 1152"):
            tensor_cache_io.load_latents(other, what, bucket)
        problem = tensor_cache_io.latents_problem(other, what, bucket, flip_aug=False, alpha_mask=False)
        assert problem == "1152 of 1152 numbers are NaN in latents", "at the start, and not when it is loaded"
        return
    tensor_cache_io.save_latents(path, what, bucket, arrays)
    for file in (path, other):
        found = tensor_cache_io.load_latents(file, what, bucket).latents
        assert (found.view(-1)[places] == 0).all() and int((found != latents.nan_to_num(0)).sum()) == 0
        assert "latents_3x4x6_float32" in caplog.text and file in caplog.text


@pytest.mark.parametrize("case", behaviour_cases(FILE, "key_grammar"))
def test_name_of_a_key(case):
    name, is_list = parse_key(case["input"]["key"])
    assert {"name": name, "stacked": not is_list} == case["expected"]
