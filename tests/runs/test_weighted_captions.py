"""--weighted_captions: marks in captions weigh tokens, and cached text encoder outputs are the weighted ones."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from library.errors import ConfigError
from tests.runs.conftest import draw_pictures
from tests.runs.test_unet_families import train
from tests.tiny_sd import KINDS, TinySd, build_tiny_sd


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, TinySd]:
    return {kind: build_tiny_sd(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def losses(tiny: TinySd, folder: Path, name: str, *more: str, caption: str | None = None) -> list[float]:
    """The losses of two steps; `caption` is written for every picture first."""
    images = folder / "images"
    if not images.exists():
        draw_pictures(images, 5)
    for path in images.glob("*.txt") if caption is not None else ():
        path.write_text(caption, encoding="utf-8")
    file = train(tiny, folder, name, "--max_train_steps=2", "--network_train_unet_only", *more, keys="")
    with open(file.with_name("lora-loss.csv"), encoding="utf-8") as table:
        return [float(row["loss"]) for row in csv.DictReader(table) if row.get("loss")]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_change_the_conditioning_and_brackets_are_no_text(models, tmp_path: Path, kind: str) -> None:
    plain = losses(models[kind], tmp_path, "plain", "--weighted_captions", caption="a red cat")
    unweighted = losses(models[kind], tmp_path, "off", caption="a red cat")
    one = losses(models[kind], tmp_path, "one", "--weighted_captions", caption="a (red:1.0) cat")
    strong = losses(models[kind], tmp_path, "strong", "--weighted_captions", caption="a (red:1.9) cat")
    text = losses(models[kind], tmp_path, "text", caption="a (red:1.9) cat")
    assert plain == unweighted == one
    assert strong != plain and text != plain and text != strong


def test_caches_of_weighted_captions_equal_live_encoding_and_are_not_mixed_up(models, tmp_path: Path) -> None:
    sdxl, caption = models["sdxl"], "a (red:1.9) [cat]"
    live = losses(sdxl, tmp_path, "live", "--weighted_captions", caption=caption)
    memory = losses(sdxl, tmp_path, "memory", "--weighted_captions", "--cache_text_encoder_outputs")
    on_disk = [losses(sdxl, tmp_path, f"disk{n}", "--weighted_captions", "--cache_text_encoder_outputs_to_disk") for n in range(2)]
    assert memory == pytest.approx(live, rel=1e-5) and on_disk[0] == on_disk[1] == pytest.approx(live, rel=1e-5)
    without = losses(sdxl, tmp_path, "without", "--cache_text_encoder_outputs_to_disk")  # the same files, other outputs
    assert without == pytest.approx(losses(sdxl, tmp_path, "plain"), rel=1e-5) and without != pytest.approx(live, rel=1e-5)


def test_stable_diffusion_has_no_cache_of_text(models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cache_text_encoder_outputs is True"):
        losses(models["sd1"], tmp_path, "out", "--cache_text_encoder_outputs", caption="a cat")
