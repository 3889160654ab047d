"""A family that learns from control pictures gets their latents: from caches in memory and on the disk, and live."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.core.registry import import_target
from library.dataset.npz_file import read_headers
from library.training import cli, parser_common
from library.training.trainer_base import Trainer
from tests.planted import plant
from tests.runs.conftest import largest_difference
from tests.runs.test_video import CACHES, VideoWork
from tests.toy_video import control

TRAINABLE = "tests.toy_video.control:ControlTrainable"


@pytest.fixture
def work(tmp_path, monkeypatch) -> VideoWork:
    plant(monkeypatch, control.RECORD)
    work = VideoWork(tmp_path, [5, 1, 1, 5])
    for i in range(4):
        draw(work, i)
    return work


def draw(work: VideoWork, i: int, shade: int = 0) -> None:
    (work.folder / "control").mkdir(exist_ok=True)
    pixels = np.random.RandomState(i + shade).randint(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(work.folder / "control" / f"{i:02d}.png")


def argv(work: VideoWork, out: str, *more: str, keys: str = "flip_aug = true") -> list[str]:
    folder = f"conditioning_data_dir = '{work.folder / 'control'}'"
    words = ["--network_train_unet_only", "--max_train_steps=3"]
    return work.argv(out, *words, *more, subset_keys=f"{folder}\n{keys}")


def train(work: VideoWork, out: str, *more: str):
    cli.run("toy_video", TRAINABLE, argv(work, out, *more))
    return work.folder / out / "lora.safetensors"


def test_cached_and_live_learn_the_same_from_the_picture(work):
    made = {name: train(work, name, *words) for name, words in CACHES.items()}
    for name in ("memory", "disk"):
        assert largest_difference(made["live"], made[name]) == 0, name
    caches = sorted(work.clips.glob("*_toy.npz"))
    assert len(caches) == 4
    assert {key.split("_")[0] for key in read_headers(caches[0])} >= {"control", "latents", "first"}
    before = [os.stat(path).st_mtime_ns for path in caches]
    train(work, "again", *CACHES["disk"])
    assert [os.stat(path).st_mtime_ns for path in caches] == before, "they serve again"
    draw(work, 2, shade=9)
    other = train(work, "other", *CACHES["disk"])
    now = [os.stat(path).st_mtime_ns for path in caches]
    assert [a == b for a, b in zip(before, now, strict=True)] == [True, True, False, True]
    assert largest_difference(other, train(work, "live2")) == 0
    assert largest_difference(other, made["disk"]) > 1e-7


def test_a_picture_that_is_cached_is_not_read_again(work, monkeypatch):
    words = argv(work, "out", *CACHES["memory"])
    config = parser_common.parse_command(words, "toy_video", TRAINABLE).config
    run = Trainer(config, import_target(control.RECORD.family)(config), control.ControlTrainable(config)).prepare()
    monkeypatch.setattr("library.dataset.samples.decode_image", lambda *_: pytest.fail("it is read"))
    batch = next(iter(run.data.batches(1)))
    assert batch.conditions.keys() == {"first_frame", "control"} and batch.conditioning_images is None


def test_data_without_them_are_refused_before_models_are_loaded(work, monkeypatch):
    monkeypatch.setattr(control.ControlFamily, "load_vae", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError, match="learns from conditioning_images beside the images, which .*00.png"):
        cli.run("toy_video", "tests.toy_video.control:PlainTrainable", work.argv("out", "--network_train_unet_only"))
