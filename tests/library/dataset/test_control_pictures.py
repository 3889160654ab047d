"""Conditioning images that are control pictures: they stay aligned with their images, and need no mask of theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.config_util import SCRIPT_RULES, load_blueprint
from library.core.errors import ConfigError
from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.build import build_dataset_groups
from library.dataset.dataset import DatasetGroup
from library.dataset.datasources import load_datasets
from tests.library.dataset.images import epoch_requests
from tests.library.dataset.small_family import small_strategies

FLUX = ARCHITECTURES["flux"]
SIZES = ((150, 70), (70, 150), (64, 64), (97, 83))
RANDOM = "random_crop = true\nflip_aug = true"


def draw(folder: Path, alpha: int | None = None) -> None:
    """Images with marks, and control pictures that are their negatives."""
    for name in ("images", "control"):
        (folder / name).mkdir()
    random = np.random.default_rng(3)
    for number, (width, height) in enumerate(SIZES):
        pixels = random.integers(90, 110, (height, width, 3), dtype=np.uint8)
        for _ in range(12):
            left, top = random.integers(0, width - 6), random.integers(0, height - 6)
            pixels[top : top + 6, left : left + 6] = random.integers(0, 256, 3)
        picture = Image.fromarray(pixels)
        if alpha is not None:
            picture.putalpha(alpha)
        picture.save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a cat", encoding="utf-8")
        Image.fromarray(255 - pixels).save(folder / "control" / f"{number}.png")


def toml(folder: Path, keys: str = "", head: str = "") -> Path:
    path = folder / "data.toml"
    path.write_text(
        "[[datasets]]\nresolution = 64\nbatch_size = 1\nenable_bucket = true\nmin_bucket_reso = 32\n"
        f"bucket_reso_steps = 16\n{head}\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\nconditioning_data_dir = '{folder / 'control'}'\n"
        f"caption_extension = '.txt'\nnum_repeats = 8\n{keys}\n",
        encoding="utf-8",
    )
    return path


def groups(folder: Path, keys: str = "", head: str = "") -> tuple[DatasetGroup, DatasetGroup | None]:
    options = DatasetOptions(dataset_config=str(toml(folder, keys, head)))
    blueprint, scanned = load_datasets(options, architecture=FLUX, script="train_control_net")
    train, validation = build_dataset_groups(blueprint, options, architecture=FLUX, seed=7, scan=scanned)
    for group in (train, validation):
        if group is not None:
            group.set_strategies(small_strategies())
    return train, validation


def assert_negative(picture: torch.Tensor, control: torch.Tensor) -> None:
    """Up to the rounding of two resized pictures to 8 bits."""
    assert picture.shape == control.shape and float(picture.std()) > 0.1
    assert float((picture + control).abs().max()) <= 1.01 * 2 / 127.5


@pytest.mark.parametrize("keys", [RANDOM, "flip_aug = true", "resize_interpolation = 'lanczos'"])
def test_marks_stay_aligned_in_crops_flips_and_buckets(tmp_path, keys):
    draw(tmp_path)
    group, _ = groups(tmp_path, keys)
    batches = [group.load(request) for request in epoch_requests(group)]
    for batch in batches:
        assert_negative(batch.images[0], batch.conditioning_images[0])
    assert len({batch.images.shape for batch in batches}) == 3
    assert {flip for batch in batches for flip in batch.flippeds} == ({True, False} if "flip" in keys else {False})
    places = {tuple(batch.crop_top_lefts[0].tolist()) for batch in batches if not batch.flippeds[0]}
    assert (len(places) > 4) == ("random" in keys)


def test_a_held_out_part_has_its_control_pictures(tmp_path):
    draw(tmp_path)
    train, validation = groups(tmp_path, RANDOM, "validation_split = 0.25")
    names = [{Path(item.absolute_path).name for item in group.items} for group in (train, validation)]
    assert len(names[0]) == 3 and len(names[1]) == 1 and not names[0] & names[1]
    (request,) = epoch_requests(validation)
    batch = validation.load(request)
    assert_negative(batch.images[0], batch.conditioning_images[0])


def test_masks_come_from_the_alpha_channel(tmp_path, caplog):
    """A black control picture is no mask, and is not told as one."""
    draw(tmp_path, alpha=128)
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(tmp_path / "control" / f"{number}.png")
    options = DatasetOptions(dataset_config=str(toml(tmp_path, "alpha_mask = true")))
    _, scanned = load_datasets(options, architecture=FLUX, script="train_control_net", check_images=True)
    assert not [line for line in scanned.warnings if "black" in line]
    group, _ = groups(tmp_path, "alpha_mask = true")
    batch = group.load(epoch_requests(group)[0])
    assert torch.equal(batch.alpha_masks, torch.full_like(batch.alpha_masks, 128 / 255))
    assert float(batch.conditioning_images.max()) == -1 and "zero everywhere" not in caplog.text


def test_keys_of_control_pictures_and_of_masks(tmp_path):
    """What a folder of control pictures takes, one of masks does not."""
    path = toml(tmp_path, RANDOM + "\nalpha_mask = true")
    for script in (name for name, rules in SCRIPT_RULES.items() if "CN" in rules.kinds):
        (dataset,) = load_blueprint(DatasetOptions(dataset_config=str(path)), architecture=FLUX, script=script).datasets
        assert dataset.holds_control and dataset.subsets[0].random_crop and dataset.subsets[0].alpha_mask
    options = DatasetOptions(dataset_config=str(path), masked_loss=True)
    with pytest.raises(ConfigError) as caught:
        load_blueprint(options, architecture=FLUX, script="train_network")
    assert [problem.rpartition(".")[2].split(":")[0].split()[0] for problem in caught.value.problems] == [
        "alpha_mask",
        "random_crop",
    ]


def test_missing_control_pictures_are_all_named(tmp_path):
    draw(tmp_path)
    for number in (0, 2):
        (tmp_path / "control" / f"{number}.png").unlink()
    options = {"architecture": FLUX, "script": "train_control_net"}
    with pytest.raises(ConfigError) as caught:
        load_datasets(DatasetOptions(dataset_config=str(toml(tmp_path))), **options)
    for number in (0, 2):
        assert any(f"{number}.png has no image named {number}" in problem for problem in caught.value.problems)
    kept = DatasetOptions(dataset_config=str(toml(tmp_path)), skip_bad_images=True)
    _, scanned = load_datasets(kept, **options)
    assert [Path(item.absolute_path).name for item in scanned.train[0]] == ["1.png", "3.png"]


@pytest.mark.parametrize("script, masked", [("train_control_net", False), ("train_network", True)])
def test_a_control_picture_that_shares_its_name_is_told(tmp_path, script, masked):
    """Of masks too: otherwise an earlier file format is silently the one that counts."""
    draw(tmp_path)
    Image.new("RGB", SIZES[1], 80).save(tmp_path / "control" / "1.jpg")
    options = DatasetOptions(dataset_config=str(toml(tmp_path)), masked_loss=masked)
    _, scanned = load_datasets(options, architecture=FLUX, script=script)
    assert [Path(item.cond_path).name for item in scanned.train[0]] == ["0.png", "1.jpg", "2.png", "3.png"]
    (told,) = [line for line in scanned.warnings if "have the name of another" in line]
    assert f"{tmp_path / 'control' / '1.png'} (1.jpg is taken)" in told


def test_a_folder_that_is_not_given_is_the_only_problem(tmp_path):
    draw(tmp_path)
    given = {"train_data_dir": str(tmp_path / "images"), "conditioning_data_dir": str(tmp_path / "control")}
    for lacking in ([*given], ["train_data_dir"], ["conditioning_data_dir"]):
        folders = {name: folder for name, folder in given.items() if name not in lacking}
        with pytest.raises(ConfigError) as caught:
            load_datasets(DatasetOptions(**folders, resolution=(64, 64)), architecture=FLUX, script="train_control_net")
        told = [f"{name}: --{name} is needed (or a --dataset_config)" for name in lacking]
        assert list(caught.value.problems) == told


def test_folders_on_the_command_line(tmp_path):
    draw(tmp_path)
    options = DatasetOptions(
        train_data_dir=str(tmp_path / "images"),
        conditioning_data_dir=str(tmp_path / "control"),
        resolution=(64, 64),
        caption_extension=".txt",
    )
    blueprint, scanned = load_datasets(options, architecture=FLUX, script="train_control_net")
    assert blueprint.datasets[0].holds_control and len(scanned.train[0]) == 4
    assert all(item.cond_path and item.caption == "a cat" for item in scanned.train[0])
