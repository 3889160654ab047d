"""--weighted_captions: marks in captions weigh tokens, and cached text encoder outputs are the weighted ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from tests.runs.conftest import losses_of
from tests.runs.families import FamilyWork, Tinies
from tests.tiny import KINDS


@pytest.fixture(scope="session")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


def losses(work: FamilyWork, name: str, *more: str, caption: str | None = None) -> list[float]:
    """The losses of two steps; `caption` is written for every picture first."""
    for path in work.images.glob("*.txt") if caption is not None else ():
        path.write_text(caption, encoding="utf-8")
    return losses_of(work.train(name, "--max_train_steps=2", "--network_train_unet_only", *more))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_change_the_conditioning_and_brackets_are_no_text(tinies: Tinies, tmp_path: Path, kind: str) -> None:
    work = tinies.work(kind, tmp_path)
    plain = losses(work, "plain", "--weighted_captions", caption="a red cat")
    unweighted = losses(work, "off", caption="a red cat")
    one = losses(work, "one", "--weighted_captions", caption="a (red:1.0) cat")
    strong = losses(work, "strong", "--weighted_captions", caption="a (red:1.9) cat")
    text = losses(work, "text", caption="a (red:1.9) cat")
    assert plain == unweighted == one
    assert strong != plain and text != plain and text != strong


def test_caches_of_weighted_captions_equal_live_encoding_and_are_not_mixed_up(tinies: Tinies, tmp_path: Path) -> None:
    sdxl, caption = tinies.work("sdxl", tmp_path), "a (red:1.9) [cat]"
    live = losses(sdxl, "live", "--weighted_captions", caption=caption)
    memory = losses(sdxl, "memory", "--weighted_captions", "--cache_text_encoder_outputs")
    on_disk = [
        losses(sdxl, f"disk{n}", "--weighted_captions", "--cache_text_encoder_outputs_to_disk") for n in range(2)
    ]
    assert memory == pytest.approx(live, rel=1e-5) and on_disk[0] == on_disk[1] == pytest.approx(live, rel=1e-5)
    without = losses(sdxl, "without", "--cache_text_encoder_outputs_to_disk")  # the same files, other outputs
    assert without == pytest.approx(losses(sdxl, "plain"), rel=1e-5) and without != pytest.approx(live, rel=1e-5)


def test_stable_diffusion_has_no_cache_of_text(tinies: Tinies, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cache_text_encoder_outputs is True"):
        losses(tinies.work("sd1", tmp_path), "out", "--cache_text_encoder_outputs", caption="a cat")
