"""Sizes and latents of the images of a metadata file, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune import prepare_buckets_latents
from tests.library.dataset.images import make_image
from tests.tiny import build_tiny_sd

SIZES = ["--max_resolution=128,128", "--min_bucket_reso=64", "--max_bucket_reso=256", "--bucket_reso_steps=64"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def tiny(request, tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    make_image(folder / "wide.png", (128, 32), seed=1)
    make_image(folder / "square.png", (100, 100), seed=2)
    make_image(folder / "unnamed.png", (64, 64), seed=3)
    make_image(folder / "deeper" / "tall.png", (130, 300), seed=4, alpha=128)
    (folder / "broken.png").write_bytes(b"no")
    return folder


def content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_sizes_and_latents(tiny, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    source, out = tmp_path / "meta.json", tmp_path / "sizes.json"
    source.write_text(json.dumps({"wide": {"tags": "a"}, "square": {"caption": "b"}, "broken": {"tags": "c"}}))
    command = [str(pictures), str(source), str(out), str(tiny.model), *SIZES]
    assert prepare_buckets_latents.main([*command, "--flip_aug", "--batch_size=2", "--skip_existing"]) == 0
    assert content(out) == {
        "wide": {"tags": "a", "train_resolution": [256, 64]},
        "square": {"caption": "b", "train_resolution": [128, 128]}, "broken": {"tags": "c"},
    }  # fmt: skip
    ending = "sdxl" if tiny.kind == "sdxl" else "sd"
    assert sorted(path.name for path in pictures.glob("*.npz")) == [
        f"square_0100x0100_{ending}.npz",
        f"wide_0128x0032_{ending}.npz",
    ]
    with np.load(pictures / f"wide_0128x0032_{ending}.npz") as file:
        assert file["latents_8x32"].shape == (4, 8, 32) and "latents_flipped_8x32" in file.files
    assert "2 done, 2 skipped" in caplog.text and "256x64: 1 images" in caplog.text and "mean error" in caplog.text
    assert prepare_buckets_latents.main(command) == 2


def test_full_paths_and_masks(pictures, tmp_path):
    tiny = build_tiny_sd(tmp_path / "model", "sd1")
    key = str(pictures / "deeper" / "tall.png")
    source, out = tmp_path / "meta.json", tmp_path / "sizes.json"
    source.write_text(json.dumps({key: {"tags": "a"}}))
    options = ["--full_path", "--recursive", "--alpha_mask", "--bucket_no_upscale"]
    assert prepare_buckets_latents.main([*options, str(pictures), str(source), str(out), str(tiny.model), *SIZES]) == 0
    width, height = content(out)[key]["train_resolution"]
    assert width % 8 == height % 8 == 0 and width * height <= 128 * 128
    [cache] = (pictures / "deeper").glob("*.npz")
    with np.load(cache) as file:
        assert any(name.startswith("alpha_mask") for name in file.files)


def test_wrong_commands(pictures, tmp_path, capsys):
    wrong = [
        str(tmp_path / "none"),
        str(tmp_path / "none.json"),
        str(tmp_path / "out.json"),
        str(pictures / "wide.png"),
    ]
    assert prepare_buckets_latents.main([*wrong, "--recursive", "--batch_size=0", "--max_resolution=64"]) == 2
    told = capsys.readouterr().err
    assert all(
        text in told
        for text in (
            "train_data_dir",
            "none.json",
            "--recursive needs",
            "--batch_size is 0",
            "--max_resolution is '64'",
            "wide.png",
        )
    )
    assert not (tmp_path / "out.json").exists()
