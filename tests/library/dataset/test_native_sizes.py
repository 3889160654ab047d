"""Pictures that keep their own size: on the grid, within the budget, and each once however many datasets name it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.bucket import BucketSelector, assign_buckets
from library.dataset.datasources import load_datasets
from library.dataset.items import DatasetParams, ImageItem, SubsetParams
from library.dataset.native_sizes import NativeSizes

FLUX = ARCHITECTURES["flux"]
SIZES = NativeSizes(latents=FLUX.latents, step=16, token_budget=16384)


def params_of(sizes: NativeSizes) -> DatasetParams:
    return DatasetParams(
        resolution=(512, 512), enable_bucket=True, bucket_rule="native", bucket_reso_steps=sizes.step, native=sizes
    )


@pytest.mark.parametrize(("size", "expected"), [
    ((1000, 700), (992, 688)), ((2048, 2048), (2048, 2048)), ((16, 31), (16, 16)), ((15, 300), None),
    ((4000, 3000), (2352, 1760)),  # tokens 250 * 187: sides by sqrt(16384 / 46750) = 0.592, 2367.9 and 1775.9
    ((30000, 20), (30000, 16)),
])  # fmt: skip
def test_sides_are_floored_and_scaled_into_the_budget(size: tuple[int, int], expected: tuple[int, int] | None) -> None:
    assert SIZES.size_of(size) == expected


def test_the_longer_side_is_within_the_limit() -> None:
    limited = dataclasses.replace(SIZES, side_limit=3072)
    assert limited.size_of((8000, 1000)) == (3072, 384)
    assert limited.size_of((3000, 1000)) == (2992, 992)


def test_frames_count_against_the_budget() -> None:
    latents = ARCHITECTURES["wan"].latents
    sizes = NativeSizes(latents=latents, step=16, token_budget=1024)
    assert sizes.size_of((512, 512), 1) == (512, 512)
    width, height = sizes.size_of((512, 512), 81)  # 21 latent frames
    assert 21 * (width // 16) * (height // 16) <= 1024 and width == height == 96


def test_every_size_fits_and_none_is_enlarged() -> None:
    draws = random.Random(3)
    for _ in range(2000):
        budget, limit = draws.choice((1, 7, 64, 900, 16384)), draws.choice((None, 512))
        sizes = dataclasses.replace(SIZES, token_budget=budget, side_limit=limit)
        size = draws.randint(16, 6000), draws.randint(16, 6000)
        width, height = sizes.size_of(size)
        assert sizes.fits((width, height)) and 16 <= width <= size[0] and 16 <= height <= size[1]
        assert width % 16 == height % 16 == 0
        choice = BucketSelector.of(params_of(sizes)).select(size)
        assert choice.bucket_reso == (width, height)
        assert choice.resized_size[0] >= width and choice.resized_size[1] >= height


def test_pictures_are_cut_and_not_scaled() -> None:
    files = enumerate(((70, 55), (70, 50), (9, 99)))
    items = [ImageItem(str(i), f"{i}.png", "", SubsetParams(), size) for i, size in files]
    result = assign_buckets(items, params_of(SIZES))
    assert [item.bucket_reso for item in items] == [(64, 48), (64, 48), None]
    assert [item.resized_size for item in items[:2]] == [(70, 55), (70, 50)]
    assert [bucket.samples for bucket in result.buckets] == [(0, 1)]
    assert result.too_small == (2,) and "2.png (9x99)" in result.warnings[0] and result.bucket_info is None


def picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)
    path.with_suffix(".caption").write_text("a cat")


def load(config: Path, sizes: NativeSizes):
    return load_datasets(DatasetOptions(dataset_config=config), architecture=FLUX, native=sizes)


def configuration(folder: Path, *tables: str) -> Path:
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    path = folder.parent / "data.toml"
    path.write_text("".join(f"[[datasets]]\n{table}\n{subset}" for table in tables))
    return path


def test_datasets_of_several_resolutions_are_one(tmp_path: Path) -> None:
    for name, size in (("a", (70, 50)), ("b", (40, 90))):
        picture(tmp_path / "i" / f"{name}.png", size)
    twice = configuration(tmp_path / "i", "resolution = 64\nmin_bucket_reso = 128", "resolution = 32")
    blueprint, scan = load(twice, SIZES)
    assert [len(items) for items in scan.train] == [2, 0]
    assert any("2 samples are those of a dataset before" in line for line in scan.warnings)
    assert any("min_bucket_reso has no effect with --navit_native_resolution" in line for line in scan.warnings)
    sliders = configuration(
        tmp_path / "i", "resolution = 64\nnetwork_multiplier = 1.0", "resolution = 64\nnetwork_multiplier = -1.0"
    )
    assert [len(items) for items in load(sliders, SIZES)[1].train] == [2, 2]


def test_what_is_over_the_budget_is_refused_by_name(tmp_path: Path) -> None:
    for name, size in (("large", (128, 128)), ("fits", (64, 64))):
        picture(tmp_path / "i" / f"{name}.png", size)
    config = configuration(tmp_path / "i", "resolution = 64")
    with pytest.raises(ConfigError) as told:
        load(config, dataclasses.replace(SIZES, token_budget=32, scales=False))
    (message,) = told.value.problems
    assert "1 of the samples" in message and "large.png (128x128, 64 tokens)" in message and "fits" not in message


def test_a_dataset_of_small_pictures_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "i" / "a.png", (12, 90))
    with pytest.raises(ConfigError, match="one side is shorter than 16 px"):
        load(configuration(tmp_path / "i", "resolution = 64"), SIZES)
