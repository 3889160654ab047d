"""A damaged state is one message before any model is loaded; older ones without checksums go on; the newest one is
found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from library.core.errors import AtelierError
from library.training import checks, parser_common
from library.training.state_files import LATEST, SUMS_FILE
from tests.runs.conftest import Work, fingerprint, read_parts
from tests.runs.families import refused_run

BRIEF = "--t5xxl_max_token_length=32"
"""most of the time of such a small model goes into padding"""
LONGER = "--max_train_steps=8"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny):
    """A finished run with states at steps 3 and 7; and what a run of nine steps gives."""
    from tests.runs.conftest import draw_pictures

    folder = tmp_path_factory.mktemp("trained")
    made = Work(folder, tiny, draw_pictures(folder / "images", -9))
    made.train("out", BRIEF, "--save_state", "--save_every_n_steps=3")
    return made


@pytest.fixture
def copied(trained: Work, tmp_path: Path) -> Path:
    return shutil.copytree(trained.folder / "out", tmp_path / "out")


def without_sums(state: Path) -> None:
    """As an older version wrote it."""
    (state / SUMS_FILE).unlink()


def weights_of(file: Path) -> bytes:
    """Metadata tell that --max_train_steps changed."""
    return read_parts(file)[1]


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x40
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_object(path: Path) -> None:
    path.write_text("[1, 2, 3]")


def told(trained: Work, state: Path, monkeypatch, capsys, whole: bool) -> str:
    """The one message about a state: of a `whole` start that must load no model, or of its check alone."""
    argv = trained.argv("more", BRIEF, LONGER, f"--resume={state}")
    if whole:
        return refused_run("flux", argv, monkeypatch, capsys)
    problems = checks.resume_problems(parser_common.parse(argv, "flux", "network"))
    assert len(problems) == 1
    return problems[0]


FILES = ["model.safetensors", "optimizer.bin", "scheduler.bin", "hooks.bin", "train_state.json"]


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [*FILES, SUMS_FILE])
def test_every_damage_is_one_message_before_models_are_loaded(
    trained, copied, name, damage, monkeypatch, capsys
) -> None:
    if name == SUMS_FILE and damage is Path.unlink:
        pytest.skip("a state of an older version")
    state = copied / "lora-state"
    damage(state / name)
    message = told(trained, state, monkeypatch, capsys, whole=name == "optimizer.bin")
    assert name in message and str(state) in message
    assert ("missing" in message) == (damage is Path.unlink) or name == SUMS_FILE


@pytest.mark.parametrize("damage", [cut, empty, no_object], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_older_states_are_read_before_models_are_loaded(trained, copied, name, damage, monkeypatch, capsys) -> None:
    state = copied / "lora-state"
    without_sums(state)
    damage(state / name)
    assert name in told(trained, state, monkeypatch, capsys, whole=name == "hooks.bin")


def test_optimizer_of_another_form_in_an_older_state(trained: Work, copied: Path) -> None:
    import torch

    state = copied / "lora-state"
    without_sums(state)
    for content in ([1, 2], {"state": 3, "param_groups": 4}, {"state": {}, "param_groups": [{}]}):
        torch.save(content, state / "optimizer.bin")
        with pytest.raises(AtelierError, match="optimizer"):
            trained.train("more", BRIEF, LONGER, f"--resume={state}")


def test_states_with_and_without_checksums_go_on(trained: Work, copied: Path) -> None:
    whole = weights_of(trained.train("whole", BRIEF, LONGER, "--overwrite"))
    assert weights_of(trained.train("with", BRIEF, LONGER, f"--resume={copied / 'lora-state'}")) == whole
    without_sums(copied / "lora-state")
    assert weights_of(trained.train("without", BRIEF, LONGER, f"--resume={copied / 'lora-state'}")) == whole


def test_the_newest_state_is_found(trained: Work, copied: Path, tmp_path: Path, caplog) -> None:
    """By its word in --output_dir, or by the folder of states; a run without a state begins."""
    whole = weights_of(trained.train("whole", BRIEF, LONGER, "--overwrite"))
    shutil.rmtree(copied / "lora-state")  # the newest is that of step 6
    shutil.copytree(copied / "lora-step00000003-state", copied / "other-step00000009-state")
    fresh = trained.folder / "latest"
    shutil.copytree(copied, fresh)
    caplog.set_level("INFO")
    with caplog.at_level("INFO"):
        assert (
            weights_of(trained.train("latest", BRIEF, LONGER, f"--resume={LATEST}", "--console_log_level=INFO"))
            == whole
        )
    assert "going on after step 6" in caplog.text and not list(fresh.glob("*backup*"))
    assert weights_of(trained.train("parent", BRIEF, LONGER, f"--resume={copied}")) == whole
    assert weights_of(trained.train("none_yet", BRIEF, LONGER, f"--resume={LATEST}")) == whole


def test_a_finished_state_without_its_file_writes_it(
    trained: Work, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A kill between the last state and the final file."""
    whole = copied / "lora.safetensors"
    known = fingerprint(whole)
    shutil.copytree(copied, trained.folder / "killed")
    (trained.folder / "killed" / "lora.safetensors").unlink()
    assert fingerprint(trained.train("killed", BRIEF, f"--resume={trained.folder / 'killed' / 'lora-state'}")) == known
    message = refused_run("flux", trained.argv("killed", BRIEF, f"--resume={LATEST}"), monkeypatch, capsys)
    assert "no step is left" in message
