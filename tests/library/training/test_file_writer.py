"""Files that are written while training goes on: what they hold, their order, their number, errors, what is waited
for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from library.components.device_transfers import Transfers
from library.core import memory_room
from library.core.atomic_file import atomic_folder, scratch_path
from library.core.errors import TrainingError
from library.core.postponed_writes import postponing
from library.core.write_errors import WriteError
from library.safetensors_utils import save_file_atomic, save_pickled_atomic
from library.training import file_writer, state
from library.training.file_writer import FileWriter, Occasion
from library.training.hooks.base import Hook
from library.training.hooks.checkpoint import CheckpointHook
from library.training.hooks.finite import NonFiniteGuard
from library.training.loop import fit
from library.training.run import Run
from library.training.state import save_state
from tests.library.training.hooks.small_run import small_run
from tests.waiting import PATIENCE


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 8, generator=generator)
    return {"a": values, "turned": values.t(), "half": values[:, 1].half(), "one": torch.ones(())}


def write_all(folder: Path, given: dict[str, torch.Tensor]) -> None:
    save_file_atomic(given, folder / "a.safetensors", {"known": "yes"})
    save_pickled_atomic({"weights": given}, folder / "a.ckpt")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_hold_what_the_tensors_held_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "now").mkdir()
    write_all(tmp_path / "now", tensors())
    occasion, given = Occasion(), tensors()
    with postponing(occasion):
        write_all(tmp_path / "later", given)
    given["a"].zero_()
    assert not (tmp_path / "later").exists()
    occasion.write_now()
    assert contents(tmp_path / "later") == contents(tmp_path / "now")


class Behind(Transfers):
    """A device whose copies are done when somebody waits for them."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.waited, self.finished = [], []

    def copy(self, pairs, after):
        return [(target, source.clone()) for target, source in pairs]

    def wait(self, event) -> None:
        self.waited.append(event)

    def finish(self, event) -> None:
        self.finished.append(event)
        for target, source in event:
            target.copy_(source)


def test_copies_from_a_device_are_waited_for_by_the_write_alone(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "now").mkdir()
    save_file_atomic(tensors(), tmp_path / "now" / "a.safetensors")
    device, occasion = Behind(), Occasion()
    monkeypatch.setattr(file_writer, "transfers_to", lambda of: device)
    with postponing(occasion):
        save_file_atomic(tensors(), tmp_path / "later" / "a.safetensors")
    assert len(device.waited) == 1 and not device.finished  # the computation is told to, the host is not
    occasion.write_now()
    assert device.finished and contents(tmp_path / "later") == contents(tmp_path / "now")


def test_without_room_all_is_written_at_once_and_in_order(tmp_path: Path, monkeypatch) -> None:
    occasion, order = Occasion(), []
    room = [10**9]
    monkeypatch.setattr(file_writer, "available_memory", lambda: room[0])
    with postponing(occasion):
        write_all(tmp_path / "first", tensors())
        occasion.add(lambda: order.append(len(contents(tmp_path / "first"))))
        assert not (tmp_path / "first").exists()
        room[0] = 2 * sum(tensor.nbytes for tensor in tensors().values()) - 1
        save_file_atomic(tensors(), tmp_path / "second.safetensors")
    assert order == [2] and (tmp_path / "second.safetensors").exists()


def test_what_is_read_again_is_not_postponed(tmp_path: Path) -> None:
    """Files that a conversion reads back, and those of folders, which take their name as a whole."""
    occasion = Occasion()
    with postponing(occasion):
        with scratch_path(tmp_path / "a") as scratch:
            save_file_atomic(tensors(), scratch)
            assert scratch.exists()
        with atomic_folder(tmp_path / "model") as folder:
            save_file_atomic(tensors(), folder / "a.safetensors")
        assert (tmp_path / "model" / "a.safetensors").exists()


def test_an_error_ends_the_occasion_and_comes_out_of_the_next_call() -> None:
    writer, occasion, done = FileWriter(), Occasion(), []

    def fails() -> None:
        raise WriteError("a full disk")

    occasion.add(fails)
    occasion.add(lambda: done.append("removed"))
    writer.start(occasion)
    with pytest.raises(WriteError, match="a full disk"):
        writer.settle()
    writer.settle()
    assert not writer.has_ended
    assert not done


def test_the_room_of_a_container_counts(tmp_path: Path, monkeypatch) -> None:
    whole = memory_room.available_memory()
    monkeypatch.setattr(memory_room, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("900\n")
    (tmp_path / "memory.current").write_text("500\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    assert memory_room.available_memory() == 500 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_room.available_memory() > 500


# -- in a run ----------------------------------------------------------------------------------------------------------


class Gate:
    """Holds up files of the run before they are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.writes, known = threading.Event(), [], state.write_sums

        def gated(folder: Path) -> None:
            assert self.opened.wait(PATIENCE)
            self.writes.append(folder)
            known(folder)

        monkeypatch.setattr(state, "write_sums", gated)


class Noting(Hook):
    """What is in the output folder at the end of each step."""

    reads_saved_files = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.at_step = folder, {}, {}

    def on_step_end(self, run, output) -> None:
        step = run.progress.global_step
        self.seen[step] = sorted(name for name in os.listdir(self.folder) if not name.startswith("."))
        self.at_step.get(step, lambda: None)()


def run_of(folder: Path, *hooks: Hook, **options) -> Run:
    folder.mkdir(exist_ok=True)
    files = CheckpointHook(lambda run: {"step": str(run.progress.global_step)})
    given = {"output_dir": str(folder), "output_name": "lora", "save_state": True, **options}
    run = small_run([NonFiniteGuard(), files, *hooks], steps=6, **given)
    layer = run.trainable.layer
    run.trainable.save = lambda path, dtype, metadata: save_file_atomic(layer.state_dict(), path, metadata)
    return run


def test_steps_go_on_while_files_are_written(tmp_path: Path, monkeypatch) -> None:
    rotating = {"save_every_n_steps": 2, "save_last_n_steps": 1, "save_last_n_steps_state": 1}
    with monkeypatch.context() as patches:
        patches.setattr(file_writer, "available_memory", lambda: 0)
        fit(run_of(tmp_path / "now", Noting(tmp_path / "now"), **rotating))
    gate, noting, before_fourth = Gate(monkeypatch), Noting(tmp_path / "later"), []
    noting.at_step = {3: gate.opened.set, 4: lambda: before_fourth.append(gate.writes[0].name)}
    fit(run_of(tmp_path / "later", noting, **rotating))
    assert not any("state" in name for step in (2, 3) for name in noting.seen[step])
    assert "step00000002" in before_fourth[0]  # two occasions are never on their way
    assert sorted(os.listdir(tmp_path / "later")) == sorted(os.listdir(tmp_path / "now"))
    for folder in sorted(path.name for path in (tmp_path / "now").iterdir() if path.is_dir()):
        pairs = [contents(tmp_path / name / folder) for name in ("later", "now")]
        differing = {name for name in pairs[0] if pairs[0][name] != pairs[1][name]}
        assert differing <= {"run_settings.json", "SHA256SUMS"}, folder  # which tell the output folder
    for file in (path.name for path in (tmp_path / "now").glob("*.safetensors")):
        assert (tmp_path / "later" / file).read_bytes() == (tmp_path / "now" / file).read_bytes()


def test_an_error_ends_the_run_at_the_next_step(tmp_path: Path, monkeypatch) -> None:
    """With what is kept; the state of the step before stays, though it is outdated."""
    known, noting = state.write_sums, Noting(tmp_path / "out")

    def fails(folder: Path) -> None:
        if "0004-state" in folder.name:
            raise OSError(28, "No space left on device")
        known(folder)

    monkeypatch.setattr(state, "write_sums", fails)
    run = run_of(tmp_path / "out", noting, save_every_n_steps=2, save_last_n_steps_state=1)
    noting.at_step[4] = lambda: run.hooks.find(CheckpointHook)._writer._thread.join()
    told = r"0004-state could not be written.*Kept: .*0004.safetensors. Go on with --resume .*0002-state"
    with pytest.raises(WriteError, match=told):
        fit(run)
    assert run.progress.global_step == 5
    assert [name for name in os.listdir(tmp_path / "out") if name.endswith("state")] == ["lora-step00000002-state"]


def test_a_run_that_fails_waits_for_its_files(tmp_path: Path, monkeypatch) -> None:
    gate, noting = Gate(monkeypatch), Noting(tmp_path / "out")

    def fail() -> None:
        threading.Timer(0.05, gate.opened.set).start()
        raise TrainingError("something else")

    noting.at_step[3] = fail
    with pytest.raises(TrainingError, match="something else"):
        fit(run_of(tmp_path / "out", noting, save_every_n_steps=2))
    assert (tmp_path / "out" / "lora-step00000002-state" / "SHA256SUMS").exists()


class Reading(Hook):
    """Reads the file when it is told of it, as hooks may that say nothing else."""

    def on_post_save(self, run, path, metadata) -> None:
        assert Path(path).stat().st_size > 0


def test_hooks_that_read_files_find_them(tmp_path: Path) -> None:
    fit(run_of(tmp_path / "out", Reading(), save_every_n_steps=2))


def test_a_state_is_what_the_run_held(tmp_path: Path) -> None:
    run = run_of(tmp_path / "out")
    fit(run)
    occasion, counters = Occasion(), {"current_epoch": 1, "current_step": 6}
    save_state(run, tmp_path / "now-state", counters)
    save_state(run, tmp_path / "later-state", counters, occasion)
    run.trainable.layer.weight.data.zero_()
    for values in run.optimizer.state.values():
        for value in values.values():
            value.zero_()
    occasion.write_now()
    assert contents(tmp_path / "later-state") == contents(tmp_path / "now-state")
