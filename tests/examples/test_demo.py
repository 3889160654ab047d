"""The demo's pictures are what their script draws, and its helper functions read what the trainer writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_those_of_the_script(tmp_path):
    load("draw_images").main(["--output_dir", str(tmp_path)])
    drawn = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    kept = sorted(
        path.relative_to(DEMO) for folder in ("images", "regularization") for path in (DEMO / folder).glob("*.*")
    )
    assert drawn == [path for path in kept if path.suffix in (".png", ".txt")] and len(drawn) > 80
    for path in drawn:
        if path.suffix == ".txt":
            assert (tmp_path / path).read_text() == (DEMO / path).read_text()
        else:
            difference = np.asarray(Image.open(tmp_path / path)).astype(int) - np.asarray(Image.open(DEMO / path))
            assert np.abs(difference).max() <= 2, path


def test_the_concept_is_unknown_to_the_base():
    from tools.tiny_base.captions import vocabulary_words

    trigger = load("draw_images").TRIGGER
    assert trigger not in vocabulary_words()
    assert all(trigger not in path.read_text() for path in (DEMO / "regularization").glob("*.txt"))
    assert all(trigger in path.read_text() for path in (DEMO / "images").glob("*.txt"))


def test_validation_losses_are_the_first_and_the_last(tmp_path):
    demo, table = load("run_demo"), tmp_path / "loss.csv"
    table.write_text("step,loss,average,validation\n0,,,1.25\n1,0.5,0.5,\n2,0.4,0.45,0.5\n")
    assert demo.validation_losses(table) == (1.25, 0.5)
    table.write_text("step,loss,average,validation\n1,0.5,0.5,\n")
    with pytest.raises(demo.DemoError, match="0 validation losses"):
        demo.validation_losses(table)


def test_samples_before_and_after_are_told_apart(tmp_path):
    demo = load("run_demo")
    for name in ("zorbit_e000000_00_20260101000000_1.png", "zorbit_e000016_00_20260101000100_1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before, after = demo.sample_files(tmp_path, 1)
    assert [before[0].name[:14], after[0].name[:14]] == ["zorbit_e000000", "zorbit_e000016"]
    with pytest.raises(demo.DemoError, match="prompt 0"):
        demo.sample_files(tmp_path / "none", 1)
