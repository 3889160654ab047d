"""A kill before any change that saving makes to the disk: what has its name is whole, one state is always there, and
the next start leaves nothing half written."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.training.checkpoint import SaveRules
from library.training.earlier_runs import clean_up, keep_earlier_files
from library.training.hooks.checkpoint import CheckpointHook
from library.training.option_groups import SavingOptions
from library.training.run import Run
from library.training.state import save_state
from library.training.state_files import state_problems
from tests.faults.killing import killed_before
from tests.runs.conftest import Work, draw_pictures

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked for every kill")
ROTATING = [
    "--save_state",
    "--save_every_n_epochs=1",
    "--save_last_n_epochs=1",
    "--save_last_n_epochs_state=1",
    "--max_train_epochs=9",
    "--ema",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny) -> tuple[Work, Run]:
    """A run that is ready, with the file and the state of its first epoch, of which one is kept."""
    folder = tmp_path_factory.mktemp("kills")
    work = Work(folder, tiny, draw_pictures(folder / "images", 4))
    trainer = work.trainer("out", "--t5xxl_max_token_length=32", *ROTATING)
    run = trainer.prepare()
    run.hooks.on_train_start(run)
    epoch(run, 1)
    (folder / "out" / ".lora.lock").unlink()
    shutil.copytree(folder / "out", folder / "template")
    return work, run


def epoch(run: Run, number: int) -> None:
    """The files of a finished epoch."""
    run.progress.epoch, run.progress.global_step = number, number * run.progress.steps_per_epoch
    saving = SaveRules(run.config[SavingOptions], run.progress.num_epochs).after_epoch(number)
    hook = run.hooks.find(CheckpointHook)
    hook._write(run, saving)
    hook.settle()


def start_again(work: Work) -> Path:
    out = work.folder / "out"
    shutil.rmtree(out)
    return Path(shutil.copytree(work.folder / "template", out))


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def assert_whole(out: Path) -> list[Path]:
    """Every weight file can be read, every state is as written; the states."""
    for name in visible(out):
        if name.endswith(".safetensors"):
            load_file(out / name)
    states = [out / name for name in visible(out) if name.endswith("-state")]
    for state in states:
        assert state_problems(state) == []
    return states


def test_before_every_change_while_an_epoch_replaces_the_one_before(saved: tuple[Work, Run]) -> None:
    work, run = saved
    kills = 0
    for number in itertools.count():
        out = start_again(work)
        if not killed_before(number, out, lambda: epoch(run, 2)):
            break
        kills += 1
        assert assert_whole(out), f"no state after a kill before change {number}"
        assert {"lora-000001.safetensors", "lora-000002.safetensors"} & set(visible(out))
        clean_up(run.config)
        assert assert_whole(out)
        assert sorted(os.listdir(out)) == visible(out), f"left over after a kill before change {number}"
    assert kills > 20
    assert visible(out) == ["lora-000002-ema.safetensors", "lora-000002-state", "lora-000002.safetensors"]


def test_before_every_change_while_a_state_of_the_same_name_is_replaced(saved: tuple[Work, Run]) -> None:
    """Between two renamings the old one is out of the way: the next start puts it back."""
    work, run = saved
    put_back = 0
    for number in itertools.count():
        state = start_again(work) / "lora-000001-state"
        if not killed_before(
            number, state.parent, lambda: save_state(run, state, {"current_epoch": 1, "current_step": 77})
        ):
            break
        put_back += not state.exists()
        clean_up(run.config)
        assert state_problems(state) == []
        assert sorted(os.listdir(state.parent)) == visible(state.parent)
    assert put_back == 1
    assert '"current_step": 77' in (state / "train_state.json").read_text()


def test_before_every_change_while_earlier_files_are_kept(saved: tuple[Work, Run], tmp_path: Path) -> None:
    """None is lost, and the next start finishes it."""
    work, run = saved
    for number in itertools.count():
        out = start_again(work)
        files = len(visible(out))
        was_killed = killed_before(number, out, lambda: keep_earlier_files(run.config))
        assert len(visible(out)) == files
        keep_earlier_files(run.config)
        assert len(visible(out)) == files and all("-backup" in name for name in visible(out))
        assert_whole(out)
        if not was_killed:
            break
    assert number == files


def test_only_what_dead_processes_left_is_removed(saved: tuple[Work, Run]) -> None:
    from library.core.file_owners import Process, clean_leftovers, host_name, owned_name, this_process

    out = start_again(saved[0])
    mine = owned_name(out / "lora.safetensors", "tmp")
    mine.write_text("being written")
    own = this_process()
    dead = mine.with_name(mine.name.replace(f"-{own.pid}-", "-999999999-"))
    dead.write_text("left")
    reused = mine.with_name(mine.name.replace(f"-{own.started}-", f"-{own.started - 5000}-"))
    reused.write_text("left by a process whose number this one has")
    elsewhere = out / ".lora.00000000-999999999-1-0.tmp.safetensors"
    elsewhere.write_text("of another machine")
    theirs = out / ".lora.tmp.safetensors"
    theirs.write_text("of another program")
    assert sorted(clean_leftovers(out)) == sorted([dead, reused])
    assert mine.exists() and elsewhere.exists() and theirs.exists()
    assert own.is_alive and not Process(host_name(), 999999999, 1).is_alive
