"""The lines of JSON that another program reads while a run writes them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from library.training.hooks.logging import LoggingHook
from library.training.hooks.losses import LossReader
from library.training.hooks.trackers import MetricsFile, Point, length_up_to
from library.training.loop import fit
from library.training.progress_facts import Meter
from tests.library.training.hooks.small_run import small_run


def lines_of(path: Path) -> list[dict]:
    text = path.read_text(encoding="ascii")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def run_to(folder: Path, steps: int, done: int = 0, window: dict | None = None) -> list[dict]:
    """The lines of a run of two epochs that trains from step `done` to `steps`."""
    hook = LoggingHook(show_progress=False)
    run = small_run(
        [LossReader(every=3), hook], steps=steps, output_dir=str(folder), output_name="line", log_metrics=True
    )
    if done:
        hook.load_state_dict(window)
        run.progress.global_step, run.progress.epoch, run.progress.step_in_epoch = done, 1 + done // 4, done % 4
    assert hook.planned_files(run) == ["line-metrics.jsonl"]
    fit(run)
    assert hook.written_files() == [str(folder / "line-metrics.jsonl")]
    run_to.window = hook.state_dict()
    return lines_of(folder / "line-metrics.jsonl")


def places(lines: list[dict]) -> list[tuple]:
    return [(line["step"], line["axis"]) for line in lines]


EVERY_STEP = [(step, axis) for step in range(1, 9) for axis in (("step", "epoch") if step % 4 == 0 else ("step",))]


def test_every_step_and_epoch_has_a_line_with_its_values(tmp_path):
    lines = run_to(tmp_path, 8)
    assert places(lines) == EVERY_STEP
    first = lines[0]
    assert set(first) == {
        "step", "epoch", "axis", "time", "loss/current", "loss/average", "lr/weight", "lr/group1", "steps_per_second",
        "memory_bytes",
    }  # fmt: skip
    assert first["lr/weight"] == 0.1 and first["memory_bytes"] > 2**20 and first["steps_per_second"] > 0
    assert set(lines[4]) == {"step", "epoch", "axis", "time", "loss/epoch_average"} and lines[4]["epoch"] == 1


@pytest.mark.parametrize(
    "further, tail",
    [(6, b""), (5, b'{"step": 5}'), (7, b'{"step": 8, "ep'), (5, b"not JSON\n"), (6, b"[1]\n")],
)
def test_a_run_that_goes_on_doubles_no_line_and_keeps_no_broken_one(tmp_path, further, tail):
    """It was at a later step, and perhaps in the middle of a line, when it was killed after its state of step 5."""
    run_to(tmp_path, 5)
    window, path = run_to.window, tmp_path / "line-metrics.jsonl"
    kept = path.read_bytes()
    with open(path, "ab") as file:
        for step in range(6, further + 1):
            file.write(json.dumps({"step": step, "axis": "step"}).encode() + b"\n")
        file.write(tail)
    lines = run_to(tmp_path, 8, done=5, window=window)
    assert path.read_bytes().startswith(kept) and places(lines) == EVERY_STEP
    assert lines[-2]["loss/average"] is not None


def test_a_run_from_the_start_begins_the_file_anew(tmp_path):
    run_to(tmp_path, 8)
    assert places(run_to(tmp_path, 3)) == EVERY_STEP[:3]
    assert length_up_to(tmp_path / "none.jsonl", 3) == 0


def test_without_the_option_there_is_no_file(tmp_path):
    fit(small_run([LossReader(every=1), LoggingHook(False)], steps=2, output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_what_is_no_number_is_null(tmp_path):
    tracker = MetricsFile(tmp_path / "new" / "metrics.jsonl", 0, Meter("cpu", 0))
    tracker.log(Point({"a": math.nan, "b": math.inf, "c": 1.5}, "epoch", 1, 4, 1))
    tracker.close()
    line = lines_of(tmp_path / "new" / "metrics.jsonl")[0]
    assert line["a"] is None and line["b"] is None and line["c"] == 1.5


class FullDisk:
    """A file that takes `room` bytes more."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(bytes(content[: self.room]))
        self.room -= taken
        return taken

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_leaves_whole_lines_and_the_run(tmp_path, caplog):
    hook = LoggingHook(show_progress=False)
    run = small_run([LossReader(every=1), hook], steps=8, output_dir=str(tmp_path), log_metrics=True)
    start = hook.on_train_start

    def starting(run) -> None:
        start(run)
        hook._trackers[0]._file = FullDisk(hook._trackers[0]._file, room=1000)

    hook.on_train_start = starting
    with caplog.at_level(logging.WARNING):
        fit(run)
    lines = lines_of(tmp_path / "last-metrics.jsonl")
    assert 2 <= len(lines) < 8 and places(lines) == EVERY_STEP[: len(lines)]
    assert [r.getMessage() for r in caplog.records] == [
        f"the curves in {tmp_path / 'last-metrics.jsonl'} cannot be written (No space left on device); training goes"
        " on without them"
    ]
