"""Cache files against recorded names, layouts, files of another trainer, and decisions about their validity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset import cache_io, text_cache_io
from library.dataset.architectures import ARCHITECTURES
from library.dataset.bucket import cover_size
from library.dataset.caching import encode_latents, plan_latents
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.npz_file import read_arrays, read_headers, write_arrays
from library.dataset.text_caching import encode_text, plan_text
from library.strategy_base import StrategySet, TextEncoderOutputsCachingStrategy, TextEncodingStrategy
from tests.golden_dir import BEHAVIOUR_DIR, behaviour_cases
from tests.library.dataset.small_family import SmallLatentsCaching, SmallTokenize, SmallVae

FILE = "caches.json"


def assert_keys(path: Path, expected: dict) -> None:
    """Exactly the expected keys, dtypes and shapes, beside our own reserved records."""
    found = {key: header for key, header in read_headers(path).items() if not key.startswith(cache_io.RECORD_KEY)}
    assert set(found) == set(expected)
    for key, layout in expected.items():
        dtypes = ("int64", "float64") if key.startswith("crop_ltrb") else (layout["dtype"],)
        assert str(found[key].dtype) in dtypes, key
        assert list(found[key].shape) == layout["shape"], key


@pytest.mark.parametrize("case", behaviour_cases(FILE, "names"))
def test_name_of_the_cache_file(case):
    given = case["input"]
    architecture = ARCHITECTURES[given["family"]]
    if given["what"] == "latents":
        path = cache_io.latents_npz_path(architecture, given["image"], tuple(given["image_size"]))
        assert cache_io.image_size_from_latents_path(architecture, given["image"], path) == tuple(given["image_size"])
    else:
        path = cache_io.text_npz_path(architecture, given["image"])
    assert path == case["expected"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "layouts"))
def test_latents_file_that_is_written(case, tmp_path):
    given, architecture = case["input"], ARCHITECTURES[case["input"]["family"]]
    size, bucket = tuple(given["image_size"]), tuple(given["bucket"])
    Image.new("RGBA", size, (200, 100, 50, 128)).save(tmp_path / given["image"])
    item = ImageItem(
        image_key=given["image"], absolute_path=str(tmp_path / given["image"]), caption="", image_size=size,
        bucket_reso=bucket,
        resized_size=cover_size(size, bucket),
        subset=SubsetParams(flip_aug=given["flip_aug"], alpha_mask=given["alpha_mask"]),
    )
    strategy = SmallLatentsCaching(architecture, cache_to_disk=True)
    encode_latents(plan_latents([item], strategy), strategy, SmallVae(architecture), show_progress=False)
    assert_keys(tmp_path / case["expected"]["file"], case["expected"]["keys"])
    assert strategy.is_disk_cached_latents_expected(bucket, item.latents_npz, given["flip_aug"], given["alpha_mask"])
    assert plan_latents([item], strategy) == []


@pytest.mark.parametrize("case", behaviour_cases(FILE, "layouts", where=lambda case: "peer_keys" in case))
def test_latents_file_of_another_trainer_is_usable(case, tmp_path):
    given, architecture = case["input"], ARCHITECTURES[case["input"]["family"]]
    path = str(tmp_path / case["expected"]["file"])
    write_arrays(path, {key: np.zeros(layout["shape"], layout["dtype"]) for key, layout in case["peer_keys"].items()})
    needs = {"flip_aug": given["flip_aug"], "alpha_mask": given["alpha_mask"]}
    assert cache_io.latents_problem(path, architecture, tuple(given["bucket"]), **needs) is None
    assert cache_io.load_latents(path, architecture, tuple(given["bucket"])).latents.shape == tuple(
        case["peer_keys"]["latents"]["shape"]
    )


class FixedOutputs(TextEncodingStrategy):
    """Hands out prepared outputs, one row per caption."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        self.outputs = outputs

    def encode_tokens(self, tokenize_strategy, models, tokens):
        return [output.unsqueeze(0).expand(len(tokens[0]), *output.shape) for output in self.outputs]


class FamilyTextCaching(TextEncoderOutputsCachingStrategy):
    def __init__(self, family: str, flags: dict[str, bool]) -> None:
        super().__init__(True, 1, False)
        self.architecture = ARCHITECTURES[family]
        self.flag_values = flags

    @property
    def flags(self):
        return self.flag_values


@pytest.mark.parametrize("case", behaviour_cases(FILE, "text_layouts"))
def test_text_file_that_is_written(case, tmp_path):
    given, expected = case["input"], case["expected"]
    layout = text_cache_io.TEXT_LAYOUTS[given["family"]]
    dtype = getattr(torch, given["encoder_dtype"])
    outputs = [
        torch.ones(expected["keys"][key.name]["shape"]).to(dtype if key.dtype == "float" else torch.int64)
        for key in layout.keys
    ]
    strategy = FamilyTextCaching(given["family"], {name: given[name] for name in layout.flags})
    Image.new("RGB", (8, 8)).save(tmp_path / given["image"])
    item = ImageItem(
        image_key="a", absolute_path=str(tmp_path / given["image"]), caption="a cat", subset=SubsetParams(),
        image_size=(8, 8)
    )
    strategies = StrategySet(SmallTokenize(), FixedOutputs(outputs), None, strategy)
    encode_text(plan_text([item], strategy), strategies, [], show_progress=False)
    assert_keys(tmp_path / expected["file"], expected["keys"])
    assert plan_text([item], strategy).jobs == []
    stored = read_arrays(tmp_path / expected["file"])
    assert all(bool(stored[name]) == given[name] for name in layout.flags)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "files", where=lambda case: case["input"]["what"] == "latents"))
def test_latents_file_of_another_trainer_is_read(case):
    given, architecture = case["input"], ARCHITECTURES[case["input"]["family"]]
    path = str(BEHAVIOUR_DIR / case["file"])
    assert_keys(Path(path), case["expected"]["layout"])
    strategy = SmallLatentsCaching(architecture, cache_to_disk=True)
    folder = str(Path(path).parent)
    assert strategy.get_latents_npz_path(f"{folder}/{given['image']}", tuple(given["image_size"])) == path
    for read in case["expected"]["reads"]:
        bucket = tuple(read["bucket"])
        assert strategy.is_disk_cached_latents_expected(bucket, path, given["flip_aug"], given["alpha_mask"])
        latents, original_size, crop, flipped, mask = strategy.load_latents_from_disk(path, bucket)
        for array, name in ((latents, "latents"), (flipped, "latents_flipped"), (mask, "alpha_mask")):
            if read[name] is None:
                assert array is None
            else:
                np.testing.assert_array_equal(array, np.asarray(read[name], array.dtype))
        assert original_size == read["original_size"]
        assert crop == read["crop_ltrb"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "files", where=lambda case: case["input"]["what"] == "text"))
def test_text_file_of_another_trainer_is_read(case):
    given, expected = case["input"], case["expected"]
    layout = text_cache_io.TEXT_LAYOUTS[given["family"]]
    path = BEHAVIOUR_DIR / case["file"]
    assert_keys(path, expected["layout"])
    strategy = FamilyTextCaching(given["family"], {name: given[name] for name in layout.flags})
    assert strategy.get_outputs_npz_path(str(path.parent / given["image"])) == str(path)
    assert strategy.is_disk_cached_outputs_expected(str(path))
    assert strategy.find(str(path), "any caption") == ("", "")
    outputs = strategy.load_outputs_npz(str(path))
    assert [key.name for key in layout.keys] == expected["order"]
    for name, array in zip(expected["order"], outputs):
        assert str(array.dtype) == expected["layout"][name]["dtype"]
        np.testing.assert_array_equal(array, np.asarray(expected["arrays"][name], array.dtype))
    other = FamilyTextCaching(given["family"], {name: not given[name] for name in layout.flags})
    assert other.is_disk_cached_outputs_expected(str(path)) is (not layout.flags)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "validity"))
def test_whether_a_file_may_be_used(case, tmp_path):
    given, architecture = case["input"], ARCHITECTURES[case["input"]["family"]]
    path = str(tmp_path / f"a_0064x0064{architecture.latents_suffix}")
    write_arrays(path, {key: np.zeros(shape, np.float32) for key, shape in given["keys"].items()})
    strategy = SmallLatentsCaching(architecture, cache_to_disk=True)
    usable = strategy.is_disk_cached_latents_expected(
        tuple(given["bucket"]), path, given["flip_aug"], given["alpha_mask"]
    )
    assert usable is case["expected"]
