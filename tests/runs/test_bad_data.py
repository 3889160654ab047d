"""Bad pictures, captions, settings and places, for every family: one message that names all of them, and nothing is
replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.dataset.architectures import ARCHITECTURES
from tests.runs.conftest import losses_of
from tests.runs.families import SLOTS, FamilyWork, Tinies, case_of, refused_run, without

CACHE = "--cache_latents_to_disk"


@pytest.fixture(scope="session")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture(params=SLOTS)
def work(request, tmp_path: Path, tinies: Tinies) -> FamilyWork:
    return tinies.work(request.param, tmp_path)


def test_everything_at_once(work: FamilyWork, monkeypatch, capsys) -> None:
    """Options, configuration, pictures and captions are all looked at before the first message."""
    whole = (work.images / "00.png").read_bytes()
    (work.images / "zero.png").write_bytes(b"")
    (work.images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (work.images / "text.jpg").write_text("not a picture")
    (work.images / "01.txt").write_bytes("caf\xe9".encode("latin-1"))
    data = work.dataset(subset_keys="num_repeats = 'many'\nfilp_aug = true", dataset_keys="bucket_no_upscal = true")
    argv = [
        *work.argv("out", dataset=data),
        "--network_args",
        "conv_dimm=3",
        "--learing_rate=1",
        "--save_every_n_steps=-1",
    ]
    message = refused_run(work.family, argv, monkeypatch, capsys)
    for word in (
        "zero.png", "cut.png", "text.jpg", "01.txt is not UTF-8", "num_repeats", "filp_aug", "did you mean 'flip_aug'",
        "bucket_no_upscal",
        "did you mean 'bucket_no_upscale'", "'conv_dimm'", "did you mean 'conv_dim'", "--learing_rate",
        "--save_every_n_steps is -1",
    ):  # fmt: skip
        assert word in message, message


@pytest.mark.parametrize("more", [[], ["--cache_latents"]], ids=["live", "cached"])
def test_a_picture_of_numbers_that_are_none(work: FamilyWork, more: list[str], monkeypatch, capsys) -> None:
    """A picture in floating point, under a usual name."""
    values = np.full((64, 64), 0.5, dtype=np.float32)
    values[3, 5] = np.nan
    Image.fromarray(values).save(work.images / "nan.tiff")
    (work.images / "nan.tiff").rename(work.images / "nan.png")
    message = refused_run(work.family, work.argv("out", *more), monkeypatch, capsys)
    assert "nan.png holds pixels that are no finite numbers" in message and "--skip_bad_images" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("conv_dimm=3", ["'conv_dimm'", "did you mean 'conv_dim'"]), ("rank_dropout=2", ["rank_dropout"]),
        ("conv_dim=a", ["conv_dim", "a"]),
        ("loraplus_lr_ratio=x", ["loraplus_lr_ratio"]), ("=3", ["key=value"]),
    ],
)  # fmt: skip
def test_network_arguments(work: FamilyWork, arguments: str, words: list[str], monkeypatch, capsys) -> None:
    message = refused_run(work.family, [*work.argv("out"), "--network_args", arguments], monkeypatch, capsys)
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("place", ["file", "below a file", "no file system"])
def test_an_output_folder_that_cannot_be_written(work: FamilyWork, place: str, monkeypatch, capsys) -> None:
    (work.folder / "out").write_text("mine")
    path = {
        "file": work.folder / "out",
        "below a file": work.folder / "out" / "x",
        "no file system": Path("/proc/nowhere"),
    }[place]
    argv = [*without(work.argv("out"), "output_dir"), f"--output_dir={path}"]
    message = refused_run(work.family, argv, monkeypatch, capsys)
    assert f"--output_dir is {path}; files cannot be written there" in message
    assert (work.folder / "out").read_text() == "mine"


def test_files_of_an_earlier_run_stay(work: FamilyWork, monkeypatch, capsys) -> None:
    (work.folder / "out").mkdir()
    (work.folder / "out" / "lora.safetensors").write_bytes(b"mine")
    message = refused_run(work.family, work.argv("out", "--on_existing=refuse"), monkeypatch, capsys)
    assert "of an earlier run would be replaced" in message and "--overwrite" in message
    assert (work.folder / "out" / "lora.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("text, words", [
    ("", ["has no [[datasets]]"]), ("[[datasets]\n", ["is not valid TOML", "line 1"]),
    ("[[datasets]]\nresolution = 64\n", ["subsets"]),
    ("[[datasets]]\nresolution = 64\nbatch_size = 0\n[[datasets.subsets]]\nimage_dir = '/nope'\nnum_repeats = -1\n",
     ["batch_size", "num_repeats", "the folder /nope does not exist"]),
])  # fmt: skip
def test_dataset_files(work: FamilyWork, text: str, words: list[str], monkeypatch, capsys) -> None:
    (work.folder / "d.toml").write_text(text, encoding="utf-8")
    message = refused_run(work.family, work.argv("out", dataset=work.folder / "d.toml"), monkeypatch, capsys)
    for word in words:
        assert word in message, message


def test_sizes_that_do_not_fit_the_model(work: FamilyWork, monkeypatch, capsys) -> None:
    data = work.dataset()
    data.write_text(data.read_text().replace("bucket_reso_steps = ", "bucket_reso_steps = 1"), encoding="utf-8")
    message = refused_run(work.family, work.argv("out", dataset=data), monkeypatch, capsys)
    assert "bucket_reso_steps" in message and "multiple of" in message


def test_caches_of_another_family_are_never_used(work: FamilyWork, tinies: Tinies, tmp_path: Path) -> None:
    """Files of another family lie beside the pictures, also under the names of this one: the run encodes anew, and
    leaves those of the other one as they are."""
    clean = losses_of(work.train("clean", "--max_train_steps=2", "--network_train_unet_only"))
    suffix = ARCHITECTURES[work.family].latents_suffix
    name = "anima" if suffix == ARCHITECTURES["flux"].latents_suffix else "flux"
    other = FamilyWork(work.folder, tinies[name], work.images, case=case_of(name))
    other.train("other", "--max_train_steps=1", CACHE, "--network_train_unet_only")
    theirs = {path: path.read_bytes() for path in work.images.glob("*.npz")}
    foreign = ARCHITECTURES[other.family]
    assert theirs and all(path.name.endswith(foreign.latents_suffix) for path in theirs)
    for path in theirs:
        shutil.copy(path, path.with_name(path.name.replace(foreign.latents_suffix, suffix)))
    cached = losses_of(work.train("cached", "--max_train_steps=2", CACHE, "--network_train_unet_only"))
    assert cached == pytest.approx(clean, rel=1e-5)
    assert theirs == {path: path.read_bytes() for path in theirs}
