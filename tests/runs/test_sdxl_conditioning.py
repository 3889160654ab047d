"""The sizes and crops that SDXL is told, from image files through the command line to the vector that the U-Net
gets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.sdxl_models import SdxlUNet2DConditionModel
from library.training import cli
from library.training.wiring.sdxl import SdxlFamily
from tests.tiny_sd import TinySd, build_tiny_sd

DATASET = """
[[datasets]]
resolution = 64
{dataset}
[[datasets.subsets]]
image_dir = '{images}'
{subset}
"""
BUCKETS = "enable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\nbucket_reso_steps = 32"
NO_BUCKETS = "enable_bucket = false"
FLIP = "flip_aug = true"
CACHES = {"live": [], "memory": ["--cache_latents"], "disk": ["--cache_latents_to_disk"]}


@dataclass(frozen=True)
class Told:
    """What a sample of one picture must report; (height, width) and (top, left). `mirrored_left` of a flipped
    sample."""

    original: tuple[int, int]
    top_left: tuple[int, int]
    mirrored_left: int
    target: tuple[int, int]

    def numbers(self, flipped: bool) -> list[int]:
        top, left = self.top_left
        return [*self.original, top, self.mirrored_left if flipped else left, *self.target]


# Pictures by (width, height). Buckets of 64 x 64 pixels in steps of 32: 32x96, 32x128, 64x64, 96x32, 128x32 (width x
# height).
WITH_BUCKETS = {
    (100, 60): Told((60, 100), (0, 21), 22, (64, 64)),  # scaled by 64/60 to 107x64; of 43 columns 21 are cut left
    (50, 200): Told((200, 50), (0, 0), 0, (128, 32)),  # scaled by 32/50 to 32x128 exactly
    (40, 30): Told((30, 40), (0, 10), 11, (64, 64)),  # enlarged by 64/30 to 85x64; 21 columns are cut
    (200, 75): Told((75, 200), (2, 0), 0, (32, 96)),  # scaled by 96/200 to 96x36; 4 rows are cut
}
# Never enlarged: scaled down to 64*64 pixels if larger, then cut to multiples of the step.
WITHOUT_UPSCALE = {
    (100, 60): Told(
        (60, 100), (3, 0), 0, (32, 64)
    ),  # sides 82.6 x 49.6; width 64 keeps the ratio better: 64x38 to 64x32
    (40, 50): Told((50, 40), (9, 4), 4, (32, 32)),  # stays 40x50, cut to 32x32
    (45, 37): Told((37, 45), (2, 6), 7, (32, 32)),  # 13 columns and 5 rows are cut
}
STEPS_OF_64 = {
    (100, 60): Told((60, 100), (0, 21), 22, (64, 64)),
    (50, 200): Told(
        (200, 50), (96, 0), 0, (64, 64)
    ),  # no bucket but 64x64: scaled by 64/50 to 64x256, 192 rows are cut
}
ONE_SIZE = {
    (100, 60): Told((60, 100), (0, 21), 22, (64, 64)),
    (60, 90): Told((90, 60), (16, 0), 0, (64, 64)),  # scaled by 64/60 to 64x96
    (64, 64): Told((64, 64), (0, 0), 0, (64, 64)),
}
SETTINGS = {
    "buckets": (BUCKETS, WITH_BUCKETS),
    "no upscale": (f"{BUCKETS}\nbucket_no_upscale = true", WITHOUT_UPSCALE),
    "steps of 64": (
        BUCKETS.replace("steps = 32", "steps = 64").replace("min_bucket_reso = 32", "min_bucket_reso = 64"),
        STEPS_OF_64,
    ),
    "no buckets": (NO_BUCKETS, ONE_SIZE),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinySd:
    return build_tiny_sd(tmp_path_factory.mktemp("sdxl"), "sdxl")


@dataclass
class Seen:
    """One sample that reached the model. `pixels` [3, H, W] -1..1, None with cached latents; `vector` its size part."""

    name: str
    flipped: bool
    numbers: list[int]
    latent_hw: tuple[int, int]
    pixels: torch.Tensor | None
    vector: torch.Tensor


def picture(path: Path, size: tuple[int, int]) -> None:
    """Red grows with the column, green with the row."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    Image.fromarray(pixels).save(path)


def train(tiny: TinySd, folder: Path, dataset: str, subset: str, *more: str, epochs: int = 4) -> list[Seen]:
    """Every sample that the U-Net saw in a run over `folder/images`."""
    data = folder / "data.toml"
    data.write_text(DATASET.format(dataset=dataset, images=folder / "images", subset=subset), encoding="utf-8")
    seen: list[Seen] = []
    vectors: list[torch.Tensor] = []
    predict, forward = SdxlFamily.predict, SdxlUNet2DConditionModel.forward

    def noting_forward(self, sample, timesteps, context, y, **inputs):
        vectors.append(y.detach())
        return forward(self, sample, timesteps, context, y, **inputs)

    def noting_predict(self, models, sample, conditioning, batch, **inputs):
        output = predict(self, models, sample, conditioning, batch, **inputs)
        numbers = torch.cat((batch.original_sizes_hw, batch.crop_top_lefts, batch.target_sizes_hw), dim=1)
        for i, key in enumerate(batch.image_keys):
            pixels = None if batch.images is None else batch.images[i]
            vector = vectors[-1][i, conditioning["pool2"].shape[1] :]
            seen.append(
                Seen(
                    Path(key).stem,
                    batch.flippeds[i],
                    numbers[i].tolist(),
                    tuple(sample.noisy_latents.shape[2:]),
                    pixels,
                    vector,
                )
            )
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SdxlFamily, "predict", noting_predict)
        patch.setattr(SdxlUNet2DConditionModel, "forward", noting_forward)
        cli.run("sdxl", "network", [
            *tiny.arguments(), f"--dataset_config={data}", f"--output_dir={folder / 'out'}",
            "--network_module=networks.lora",
            "--network_dim=1", f"--max_train_epochs={epochs}", "--seed=3", "--network_train_unet_only",
            "--train_batch_size=2",
            "--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more,
        ])  # fmt: skip
    return seen


def sinusoids(numbers: list[int], width: int) -> list[float]:
    """cos and sin of number / 10000^(i / half) for i < half, side by side."""
    half = width // 2
    parts = []
    for number in numbers:
        angles = [number / 10000 ** (i / half) for i in range(half)]
        parts += [*map(math.cos, angles), *map(math.sin, angles)]
    return parts


CELLS = [
    pytest.param(setting, cache, marks=pytest.mark.full if cache == "memory" and setting != "buckets" else ())
    for setting in SETTINGS for cache in CACHES
]  # fmt: skip
"""A cache in memory holds what a cache on disk does."""


@pytest.mark.parametrize(("setting", "cache"), CELLS)
def test_numbers_of_a_run(tiny: TinySd, tmp_path: Path, setting: str, cache: str) -> None:
    dataset, expected = SETTINGS[setting]
    (tmp_path / "images").mkdir()
    for width, height in expected:
        picture(tmp_path / "images" / f"{width}x{height}.png", (width, height))
    seen = train(tiny, tmp_path, dataset, f"{FLIP}\nnum_repeats = 2", *CACHES[cache])
    kinds = set()
    for sample in seen:
        told = expected[tuple(map(int, sample.name.split("x")))]
        assert sample.numbers == told.numbers(sample.flipped), (sample.name, sample.flipped)
        assert sample.latent_hw == (told.target[0] // 8, told.target[1] // 8)
        assert sample.vector.tolist() == pytest.approx(sinusoids(sample.numbers, 8), abs=1e-4)
        assert (sample.pixels is None) == (cache != "live")
        kinds.add((sample.name, sample.flipped))
    assert len(seen) == 8 * len(expected)
    assert len(kinds) > 1.5 * len(expected)  # of both kinds, mirrored and not


def test_a_second_run_reads_the_same_numbers_from_the_caches_of_the_first(tiny: TinySd, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for size in WITH_BUCKETS:
        picture(tmp_path / "images" / f"{size[0]}x{size[1]}.png", size)
    runs = [train(tiny, tmp_path, BUCKETS, FLIP, "--cache_latents_to_disk", "--overwrite", epochs=2) for _ in range(2)]
    notes = [[(sample.name, sample.flipped, sample.numbers) for sample in run] for run in runs]
    assert notes[0] == notes[1]


@pytest.mark.parametrize("dataset", [BUCKETS, NO_BUCKETS])
def test_a_random_crop_is_told_where_it_was_cut(tiny: TinySd, tmp_path: Path, dataset: str) -> None:
    """A picture as high as its bucket is not scaled, so that the first column says what was cut."""
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images" / "ramp.png", (107, 64))
    seen = train(tiny, tmp_path, dataset, f"{FLIP}\nrandom_crop = true\nnum_repeats = 6")
    for sample in seen:
        height, width, top, left, *target = sample.numbers
        assert (height, width, top, target) == (64, 107, 0, [64, 64])
        first_column = round((sample.pixels[0, 0, 0].item() + 1) * 127.5)
        assert first_column == (106 - left if sample.flipped else left)
    assert {sample.flipped for sample in seen} == {True, False}
    assert len({sample.numbers[3] for sample in seen}) > 8


def test_a_crop_around_a_face_is_told(tiny: TinySd, tmp_path: Path) -> None:
    """Face at (50, 80), 40 pixels: 1.6 faces are 64 pixels, so the scale is 1 and the window begins at 50 - 32, 80 -
    32. Face at (190, 10): 3.2 faces are 128, the scale is 1/2; the window of 100 x 80 around (95, 5) is moved to the
    edge at 100 - 64, 0."""
    for name, share, expected in (
        ("a_50_80_40_40", 1.6, Told((160, 200), (48, 18), 200 - 64 - 18, (64, 64))),
        ("a_190_10_40_40", 3.2, Told((160, 200), (0, 36), 0, (64, 64))),
    ):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        picture(folder / "images" / f"{name}.png", (200, 160))
        seen = train(tiny, folder, NO_BUCKETS, f"{FLIP}\nface_crop_aug_range = [{share}, {share}]\nnum_repeats = 4")
        for sample in seen:
            assert sample.numbers == expected.numbers(sample.flipped), (name, sample.flipped)
        assert {sample.flipped for sample in seen} == {True, False}


@pytest.mark.parametrize("cache", CACHES)
def test_a_picture_that_lies_on_its_side_is_told_as_it_is_shown(tiny: TinySd, tmp_path: Path, cache: str) -> None:
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 100)).save(tmp_path / "images" / "turned.jpg", exif=exif)  # shown as 100x60
    seen = train(tiny, tmp_path, BUCKETS, FLIP, *CACHES[cache], epochs=3)
    assert {tuple(sample.numbers) for sample in seen} <= {(60, 100, 0, 21, 64, 64), (60, 100, 0, 22, 64, 64)}
