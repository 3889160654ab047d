"""The curve is there as a picture and as a table, and goes on after a resume."""

import csv
import json

import pytest
from PIL import Image

from library.training.hooks.logging import LoggingHook
from library.training.hooks.loss_curve import LossCurveHook, trailing_mean
from library.training.hooks.losses import LossReader
from library.training.loop import fit
from tests.library.training.hooks.small_run import small_run


def test_picture_and_table_are_written_at_the_end(tmp_path, drawn_curves):
    curve = LossCurveHook()
    run = small_run(
        [LossReader(every=5), LoggingHook(show_progress=False), curve], output_dir=str(tmp_path), output_name="line"
    )
    curve.add_validation(0, 0.9)
    curve.add_validation(8, 0.1)
    fit(run)
    with Image.open(tmp_path / "line-loss.png") as picture:
        assert picture.size[0] > 400 and len(picture.convert("L").getcolors(256)) > 10
    rows = list(csv.DictReader(open(tmp_path / "line-loss.csv", encoding="utf-8")))
    assert [row["step"] for row in rows] == [str(n) for n in range(0, 9)]
    assert rows[0]["validation"] == "0.9" and rows[0]["loss"] == "" and rows[8]["validation"] == "0.1"
    assert [float(row["loss"]) for row in rows[1:]] == curve.losses
    assert sorted(p.name for p in tmp_path.iterdir()) == ["line-loss.csv", "line-loss.png"]


def test_losses_of_noise_levels_are_columns_that_a_state_keeps(tmp_path):
    curve, again = LossCurveHook(), LossCurveHook()
    curve.add_validation(2, 0.5, {"200": 0.25, "80": 0.75})
    curve.add_validation(9, 0.1, {"80": 0.1})
    again.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    assert again.levels == curve.levels
    run = small_run([LossReader(every=5), again], output_dir=str(tmp_path), output_name="line")
    run.progress.global_step = run.progress.step_in_epoch = 2
    fit(run)
    rows = list(csv.DictReader(open(tmp_path / "line-loss.csv", encoding="utf-8")))
    assert list(rows[0]) == ["step", "loss", "average", "validation", "validation_80", "validation_200"]
    first, second = rows[:2]
    assert (first["step"], first["validation_80"], first["validation_200"], second["validation_80"]) == (
        "2",
        "0.75",
        "0.25",
        "",
    )
    assert again.levels == {2: {"200": 0.25, "80": 0.75}}  # step 9 is after the one at which the run goes on


def test_nothing_is_written_without_an_output_folder_or_a_step(tmp_path):
    fit(small_run([LossReader(), LossCurveHook()]))
    LossCurveHook().write(small_run([], output_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_state_restores_the_history():
    curve, again = LossCurveHook(), LossCurveHook()
    fit(small_run([LossReader(), curve], steps=3))
    curve.add_validation(3, 0.25)
    again.load_state_dict(curve.state_dict())
    assert (again.steps, again.losses, again.validation) == (curve.steps, curve.losses, [(3, 0.25)])
    run = small_run([LossReader(), again], steps=4)
    run.progress.global_step = run.progress.step_in_epoch = 2  # --initial_step 2: step 3 comes again
    fit(run)
    assert again.steps == [1, 2, 3, 4] and again.validation == []


def test_trailing_mean():
    assert trailing_mean([1.0, 2.0, 3.0, 4.0], 2) == pytest.approx([1.0, 1.5, 2.5, 3.5])
    assert trailing_mean([], 3) == []
