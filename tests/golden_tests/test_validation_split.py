"""The split into training and validation images, by number and through a scan of real folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.datasources import load_datasets, split_validation
from library.dataset.items import SubsetParams
from tests.golden_dir import behaviour_cases
from tests.library.dataset.images import epoch_requests, make_folder, make_group
from tests.library.dataset.small_family import small_strategies


def make_images(folder: Path, count: int, caption: bool = True) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (i % 256, 2 * i % 256, 9)).save(folder / f"{i:03d}.png")
        if caption:
            (folder / f"{i:03d}.caption").write_text(f"cap {i}")


def scan(tmp_path: Path, text: str, seed: int | None = None, **options):
    config = tmp_path / "dataset.toml"
    config.write_text(text)
    given = DatasetOptions(dataset_config=config, **options)
    return load_datasets(given, architecture=ARCHITECTURES["flux"], seed=seed)[1]


def names(items) -> list[str]:
    return [Path(item.absolute_path).name for item in items]


@pytest.mark.parametrize("case", behaviour_cases("validation_split.json"))
def test_counts_and_sets(case):
    images = case["input"]["images"]
    files = [images["pattern"] % i for i in range(images["count"])]
    train, validation = split_validation(files, case["input"]["validation_split"], case["input"]["validation_seed"])
    assert (len(train), len(validation)) == (case["expected"]["num_train"], case["expected"]["num_validation"])
    assert {files[i] for i in validation} == set(case["expected"]["validation"])
    assert sorted(train + validation) == list(range(len(files)))
    shuffled = files[::-1]
    again = split_validation(shuffled, case["input"]["validation_split"], case["input"]["validation_seed"])[1]
    assert {shuffled[i] for i in again} == set(case["expected"]["validation"])


def statements(*others: str):
    """The statements of the file, but for those with their own test."""
    return behaviour_cases(
        "validation_split.json", "properties", where=lambda case: "holds" in case and case["id"] not in others
    )


def counts(*, kind: bool = False, subsets: bool = False):
    """Recorded counts, by the form of their input."""
    return behaviour_cases(
        "validation_split.json", "properties",
        where=lambda case: "input" in case and ("kind" in case["input"], "subsets" in case["input"]) == (kind, subsets),
    )


@pytest.mark.parametrize("case", statements("stable", "captions_follow", "seed_fallback", "frozen"))
def test_disjoint_for_every_count(case):
    assert case["holds"]
    for count in range(0, 60):
        for fraction in (0.0, 0.1, 0.15, 0.25, 0.33, 0.5, 0.9, 1.0):
            files = [str(i) for i in range(count)]
            train, validation = split_validation(files, fraction, count)
            assert len(validation) == round(count * fraction)
            assert sorted(train + validation) == list(range(count))


@pytest.mark.parametrize("case", counts())
def test_counts_of_a_folder(case, tmp_path):
    given, expected = case["input"], case["expected"]
    make_images(tmp_path / "a", given["images"])
    make_images(tmp_path / "other", 1)
    result = scan(tmp_path, f"""
        [[datasets]]
        resolution = 64
        validation_split = {given['validation_split']}
        [[datasets.subsets]]
        image_dir = '{tmp_path / 'a'}'
        num_repeats = {given.get('num_repeats', 1)}
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = '{tmp_path / 'other'}'
    """)
    if "train_samples" in expected:
        assert sum(item.num_repeats for item in result.train[0]) == expected["train_samples"]
        assert sum(item.num_repeats for item in result.validation[0]) == expected["validation_samples"]
        return
    assert len(result.train[0]) == expected["train_images"]
    if expected["validation_images"] is None:
        assert not result.has_validation
    else:
        assert result.has_validation
        assert len(result.validation[0]) == expected["validation_images"]
        assert any("validation" in line for line in result.warnings) == (expected["validation_images"] == 0)


@pytest.mark.parametrize("case", counts(subsets=True))
def test_regularisation_images_stay(case, tmp_path):
    text = f"[[datasets]]\nresolution = 64\nvalidation_split = {case['input']['validation_split']}\n"
    for i, subset in enumerate(case["input"]["subsets"]):
        make_images(tmp_path / str(i), subset["images"])
        text += (
            f"[[datasets.subsets]]\nimage_dir = '{tmp_path / str(i)}'\nnum_repeats = {subset.get('num_repeats', 1)}\n"
        )
        text += f"is_reg = {str(subset.get('is_reg', False)).lower()}\n"
    result = scan(tmp_path, text)
    assert sum(not item.is_reg for item in result.train[0]) == case["expected"]["train_images"]
    assert sum(item.is_reg for item in result.train[0]) == case["expected"]["reg_images"]
    assert len(result.validation[0]) == case["expected"]["validation_images"]
    assert not any(item.is_reg for item in result.validation[0])


@pytest.mark.parametrize("case", counts(kind=True))
def test_metadata_and_masks_are_split_too(case, tmp_path):
    given, expected = case["input"], case["expected"]
    make_images(tmp_path / "a", given["images"])
    make_images(tmp_path / "masks", given["images"], caption=False)
    make_images(tmp_path / "other", 1)
    (tmp_path / "m.json").write_text(json.dumps({f"{i:03d}": {"caption": f"cap {i}"} for i in range(given["images"])}))
    sources = {
        "FT": f"metadata_file = '{tmp_path / 'm.json'}'",
        "CN": f"conditioning_data_dir = '{tmp_path / 'masks'}'",
    }
    result = scan(tmp_path, f"""
        [[datasets]]
        resolution = 64
        validation_split = {given['validation_split']}
        validation_seed = {given.get('validation_seed', 0)}
        [[datasets.subsets]]
        image_dir = '{tmp_path / 'a'}'
        {sources.get(given['kind'], '')}
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = '{tmp_path / 'other'}'
    """, masked_loss=given["kind"] == "CN")
    train, validation = names(result.train[0]), names(result.validation[0])
    assert (len(train), len(validation)) == (expected["train_images"], expected["validation_images"])
    assert not set(train) & set(validation)
    for item in (*result.train[0], *result.validation[0]):
        if given["kind"] == "CN":
            assert Path(item.cond_path).stem == Path(item.absolute_path).stem


@pytest.mark.parametrize("case", behaviour_cases(
    "validation_split.json", "properties",
    where=lambda case: case["id"] in ("stable", "captions_follow", "seed_fallback")
))
def test_stable_with_and_without_cached_info(case, tmp_path):
    assert case["holds"]
    make_images(tmp_path / "a", 20)
    text = (
        f"[[datasets]]\nresolution = 64\nvalidation_split = 0.3\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
    )
    plain = scan(tmp_path, text, seed=7)
    for _ in range(2):
        cached = scan(tmp_path, text, seed=7, cache_info=True)
        assert names(cached.validation[0]) == names(plain.validation[0])
        for item in (*cached.train[0], *cached.validation[0]):
            assert item.caption == f"cap {int(Path(item.absolute_path).stem)}"
    explicit = scan(tmp_path, text, seed=99, validation_seed=7)
    assert names(explicit.validation[0]) == names(plain.validation[0])
    assert names(scan(tmp_path, text).validation[0]) == names(scan(tmp_path, text).validation[0])
    assert names(scan(tmp_path, text, seed=8).validation[0]) != names(plain.validation[0])


@pytest.mark.parametrize(
    "case", behaviour_cases("validation_split.json", "properties", where=lambda case: case["id"] == "frozen")
)
def test_nothing_changes_from_epoch_to_epoch(case, tmp_path):
    assert case["holds"]
    subset = SubsetParams(
        image_dir="x", flip_aug=True, color_aug=True, random_crop=True, shuffle_caption=True, caption_dropout_rate=0.3,
        caption_tag_dropout_rate=0.3, enable_wildcard=True, token_warmup_step=100,
    )
    group = make_group(make_folder(tmp_path, 6, subset), is_training=False)
    group.set_strategies(small_strategies())
    passes = [[group.load(request) for request in epoch_requests(group, epoch)] for epoch in (1, 2, 3)]
    for later in passes[1:]:
        for first, again in zip(passes[0], later, strict=True):
            assert torch.equal(first.images, again.images) and torch.equal(first.crop_top_lefts, again.crop_top_lefts)
            assert (first.captions, first.flippeds) == (again.captions, again.flippeds)
