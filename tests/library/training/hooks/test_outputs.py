"""What a run says of its files, before and after."""

import logging

from library.training.hooks.checkpoint import CheckpointHook
from library.training.hooks.finish import FinishHook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.loss_curve import LossCurveHook
from library.training.hooks.losses import LossReader
from library.training.loop import fit
from library.training.start_page import unreached_intervals
from tests.library.training.hooks.small_run import small_run


def run_with_files(folder, **options):
    hooks = [LossReader(every=1), LoggingHook(False), LossCurveHook(), CheckpointHook(lambda run: {}), FinishHook()]
    return small_run(hooks, steps=12, output_dir=str(folder), output_name="lora", **options)


def test_planned_files_are_those_that_are_written(tmp_path, caplog):
    run = run_with_files(tmp_path, save_every_n_epochs=1, logging_dir=str(tmp_path / "logs"))
    lines = [line for lines in run.hooks.planned_files(run) for line in lines]
    assert lines == [
        f"curves of this run in {tmp_path / 'logs'}", "lora-loss.png and lora-loss.csv",
        "lora-000001.safetensors ... lora-000002.safetensors (2)", "lora.safetensors",
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, logger="library.training.hooks.finish"):
        fit(run)
    told = caplog.records[-1].getMessage().splitlines()[1:]
    files = {str(path) for path in tmp_path.iterdir() if path.is_file()}
    assert {line.strip() for line in told} - {line.strip() for line in told if "logs" in line} == files and len(
        files
    ) == 5


def test_removed_files_are_not_listed_at_the_end(tmp_path):
    run = run_with_files(tmp_path, save_every_n_steps=2, save_last_n_steps=2)
    planned = [line for lines in run.hooks.planned_files(run) for line in lines]
    assert "lora-step00000002.safetensors ... lora-step00000012.safetensors (6, 4 of them removed again)" in planned
    fit(run)
    listed = [path for paths in run.hooks.written_files() for path in paths]
    assert sorted(listed) == sorted(str(path) for path in tmp_path.iterdir())


def test_intervals_that_are_never_reached_are_said(tmp_path):
    run = run_with_files(tmp_path, save_every_n_epochs=4, save_every_n_steps=13)
    assert [line.split(":")[0] for line in unreached_intervals(run)] == [
        "--save_every_n_epochs is 4, longer than the run of 3 epochs",
        "--save_every_n_steps is 13, longer than the run of 12 steps",
    ]  # fmt: skip
    assert unreached_intervals(run_with_files(tmp_path, save_every_n_epochs=2, save_every_n_steps=12)) == []


def test_a_run_that_goes_on_lists_what_is_still_to_come(tmp_path):
    run = run_with_files(tmp_path, save_every_n_epochs=1)
    run.progress.global_step = 4
    planned = [line for lines in run.hooks.planned_files(run) for line in lines]
    assert planned[1:] == ["lora-000002.safetensors", "lora.safetensors"]


def test_the_state_of_a_stopped_run_is_removed_in_its_turn(tmp_path):
    run = run_with_files(tmp_path, save_every_n_steps=4, save_last_n_steps_state=2, save_state=True)
    for step in (3, 7):
        (tmp_path / f"lora-step{step:08d}-state").mkdir()
    fit(run)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"lora-step00000012-state", "lora-state"}
