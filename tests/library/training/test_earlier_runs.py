"""What becomes of the files of an earlier run of the same name: kept under a numbered name, replaced or a reason to
stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.core.file_owners import owned_name
from library.core.options import Config
from library.training import earlier_runs
from library.training.parser_common import script

CLASSES = script("flux", "network").classes
OF_A_RUN = [
    "mine.safetensors", "mine-ema.safetensors", "mine-000002.safetensors", "mine-000002-ema.safetensors",
    "mine-step00000010.safetensors",
    "mine-loss.csv", "mine-loss.png", "mine-metrics.jsonl", "sample/mine_e000002_00_20250101120000_42.png",
    "sample/mine_000010_00_20250101120000.png",
    "sample/mine_e000002_grid.png", "sample/mine_sheet.png",
]  # fmt: skip
STATES = ["mine-state", "mine-000002-state", "mine-step00000010-state"]
OF_OTHERS = [
    "other.safetensors", "mine.txt", "mine-2.safetensors", "mine-000002.ckpt", "mine_v2.safetensors",
    "mine-backup1.safetensors",
    "sample/mine_v2_e000002_00_20250101120000_42.png", "sample/mine_photo.png", "sample/e000002_00_20250101120000.png",
]  # fmt: skip


def config_of(folder: Path, **values) -> Config:
    return Config.read({"output_dir": str(folder), "output_name": "mine", **values}, CLASSES)


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in STATES:
            path.mkdir()
            path = path / "train_state.json"
            path.write_text('{"current_epoch": 1, "current_step": 5}')
        else:
            path.write_text(name)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [*(name for name in OF_A_RUN if "/" not in name), *STATES])
def test_refuse_names_what_would_be_replaced(tmp_path: Path, name: str) -> None:
    fill(tmp_path, [name])
    problems = earlier_runs.existing_problems(config_of(tmp_path, on_existing="refuse"))
    assert (
        len(problems) == 1 and name in problems[0] and "--overwrite" in problems[0] and "--on_existing" in problems[0]
    )
    for choice in ({}, {"on_existing": "backup"}, {"on_existing": "overwrite"}, {"overwrite": True}):
        assert earlier_runs.existing_problems(config_of(tmp_path, **choice)) == []


def test_a_folder_in_the_place_of_the_file_is_told_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").mkdir()
    problems = earlier_runs.existing_problems(config_of(tmp_path, overwrite=True))
    assert len(problems) == 1 and "mine.safetensors is a folder" in problems[0]
    assert earlier_runs.existing_problems(config_of(tmp_path)) == []  # it is renamed then
    state = tmp_path / "mine-step00000005-state"
    state.mkdir()
    for name in ("model.safetensors", "optimizer.bin"):
        (state / name).touch()
    (state / "train_state.json").write_text('{"current_epoch": 1, "current_step": 5}')
    assert len(earlier_runs.existing_problems(config_of(tmp_path, resume="latest"))) == 1


def test_the_newest_state_of_a_hidden_name(tmp_path: Path) -> None:
    """What begins with a dot may be a run's name; only names that processes make for a while are passed over."""
    for folder in (".mine-step00000005-state", owned_name(tmp_path / ".mine-step00000009-state", "tmp").name):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train_state.json").write_text('{"current_epoch": 1, "current_step": 5}')
    config = config_of(tmp_path, output_name=".mine", resume="latest")
    assert earlier_runs.resumed_state(config) == tmp_path / ".mine-step00000005-state"
    assert (
        earlier_runs.resumed_state(config_of(tmp_path, resume=str(tmp_path))) == tmp_path / ".mine-step00000005-state"
    )


def test_all_files_of_an_earlier_run_move_to_a_numbered_name(tmp_path: Path) -> None:
    fill(tmp_path, [*OF_A_RUN, *STATES, *OF_OTHERS])
    earlier_runs.keep_earlier_files(config_of(tmp_path))
    moved = {name.replace("mine", "mine-backup2", 1) for name in OF_A_RUN}
    states = {f"{name.replace('mine', 'mine-backup2', 1)}/train_state.json" for name in STATES}
    assert files_of(tmp_path) == moved | states | set(OF_OTHERS)
    fill(tmp_path, OF_A_RUN[:1])
    earlier_runs.keep_earlier_files(config_of(tmp_path))
    assert (tmp_path / "mine-backup3.safetensors").exists()


def test_a_kept_run_can_be_gone_on_with_by_its_new_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, [*OF_A_RUN, *STATES])
    earlier_runs.keep_earlier_files(config_of(tmp_path))
    assert "mine-backup1" in caplog.text and "--output_name mine-backup1 --resume" in caplog.text
    kept = config_of(tmp_path, output_name="mine-backup1", resume=str(tmp_path / "mine-backup1-state"))
    assert earlier_runs.goes_on(kept) and earlier_runs.earlier_files(kept) == []


def test_files_without_a_name_move_from_their_default_names(tmp_path: Path) -> None:
    fill(
        tmp_path,
        [
            "last.safetensors",
            "epoch-000002.safetensors",
            "at-step00000010.safetensors",
            "sample/e000002_00_20250101120000.png",
            "sample/sheet.png",
        ],
    )
    earlier_runs.keep_earlier_files(config_of(tmp_path, output_name=None))
    assert files_of(tmp_path) == {
        "last-backup1.safetensors", "last-backup1-000002.safetensors", "last-backup1-step00000010.safetensors",
        "sample/last-backup1_e000002_00_20250101120000.png", "sample/last-backup1_sheet.png",
    }  # fmt: skip
    assert earlier_runs.earlier_files(config_of(tmp_path, output_name="last-backup1"))


@pytest.mark.parametrize("choice", [{"overwrite": True}, {"on_existing": "overwrite"}])
def test_overwriting_puts_states_aside(tmp_path: Path, choice: dict) -> None:
    """A later `--resume latest` would go on with them."""
    fill(tmp_path, [*OF_A_RUN, *STATES])
    earlier_runs.keep_earlier_files(config_of(tmp_path, **choice))
    moved = {f"{name.replace('mine', 'mine-backup1', 1)}/train_state.json" for name in STATES}
    assert files_of(tmp_path) == set(OF_A_RUN) | moved
    assert earlier_runs.resumed_state(config_of(tmp_path, resume="latest")) is None


@pytest.mark.parametrize("choice", [{"on_existing": "refuse"}, {"debug_dataset": True}])
def test_nothing_moves_when_it_is_not_asked_for(tmp_path: Path, choice: dict) -> None:
    fill(tmp_path, [*OF_A_RUN, *STATES])
    before = files_of(tmp_path)
    earlier_runs.keep_earlier_files(config_of(tmp_path, **choice))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("resume", ["mine-state", "mine-step00000010-state", "latest", "."])
def test_nothing_moves_when_the_run_goes_on_in_its_folder(tmp_path: Path, resume: str) -> None:
    fill(tmp_path, [*OF_A_RUN, *STATES])
    before = files_of(tmp_path)
    config = config_of(tmp_path, resume=resume if resume == "latest" else str(tmp_path / resume))
    earlier_runs.keep_earlier_files(config)
    assert files_of(tmp_path) == before and earlier_runs.goes_on(config)


def test_a_state_from_elsewhere_does_not_let_a_run_replace_others(tmp_path: Path) -> None:
    fill(tmp_path / "old", STATES[:1])
    fill(tmp_path / "new", OF_A_RUN)
    earlier_runs.keep_earlier_files(config_of(tmp_path / "new", resume=str(tmp_path / "old" / "mine-state")))
    assert (tmp_path / "new" / "mine-backup1.safetensors").exists()


def test_overwrite_and_another_choice_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--overwrite is set with --on_existing backup"):
        config_of(tmp_path, overwrite=True, on_existing="backup")


@pytest.mark.parametrize("choice", [{}, {"overwrite": True}])
def test_names_of_kept_files_that_would_be_too_long_are_told_before_the_training(tmp_path: Path, choice: dict) -> None:
    limit = earlier_runs.name_limit(tmp_path)
    for length, is_told in ((limit - len("-backup1-step00000005-state"), False), (limit - len("-step00000005-state"), True)):
        folder, name = tmp_path / str(length), "x" * length
        (folder / f"{name}-step00000005-state").mkdir(parents=True)
        problems = earlier_runs.existing_problems(config_of(folder, output_name=name, **choice))
        assert len(problems) == is_told
        if is_told:
            assert "8 too long" in problems[0] and "another --output_name" in problems[0]
