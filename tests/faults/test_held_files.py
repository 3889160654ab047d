"""Files that another program holds open, as Windows has it: tried again, then kept under another name, or left with a
warning."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from library.core import atomic_file
from library.core.atomic_file import atomic_folder, atomic_path, remove_file, remove_folder, write_text_atomically
from library.core.write_errors import HeldFileError
from tests.runs.conftest import Work, fingerprint

BRIEF = "--t5xxl_max_token_length=32"


class Holder:
    """Another program: what it holds can neither be renamed, replaced nor removed, `times` times or always."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[Path, int | None] = {}
        self.tries = 0
        monkeypatch.setattr(atomic_file, "HELD_SECONDS", 0.3)
        for module, name in ((os, "replace"), (os, "rename"), (os, "remove"), (os, "unlink"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self._checked(getattr(module, name)))

    def hold(self, path: Path, times: int | None = None) -> None:
        self.held[path] = times

    def _checked(self, original):
        def call(*paths, **options):
            for path in paths:
                self._check(Path(os.fspath(path)))
            return original(*paths, **options)

        return call

    def _check(self, path: Path) -> None:
        for held, times in self.held.items():
            if os.path.lexists(held) and (
                held == path or path in held.parents
            ):  # a folder in which a file is open can be moved no more than the file
                self.tries += 1
                if times is None or self.tries <= times:
                    raise PermissionError(13, "Permission denied", str(path))


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> Holder:
    return Holder(monkeypatch)


def test_what_is_held_for_a_moment_is_replaced(tmp_path: Path, holder: Holder) -> None:
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")
    holder.hold(path, times=2)
    write_text_atomically(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_a_file_whose_place_is_held_is_kept_and_named(tmp_path: Path, holder: Holder) -> None:
    path = tmp_path / "a.txt"
    write_text_atomically(path, "old")
    holder.hold(path)
    for number in (1, 2):
        with pytest.raises(HeldFileError) as caught:
            write_text_atomically(path, "new")
        kept = tmp_path / f"a-new{number}.txt"
        assert caught.value.kept == kept and str(kept) in str(caught.value) and kept.read_text() == "new"
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a-new1.txt", "a-new2.txt", "a.txt"]


def test_a_folder_whose_place_is_held_is_kept_and_the_old_one_whole(tmp_path: Path, holder: Holder) -> None:
    for content in ("old", "new"):
        held = content == "new"
        if held:
            holder.hold(tmp_path / "x.1-state" / "a")
        try:
            with atomic_folder(tmp_path / "x.1-state") as folder:
                (folder / "a").write_text(content)
        except HeldFileError as error:
            assert held and str(tmp_path / "x.1-state-new1") in str(error)
    assert (tmp_path / "x.1-state" / "a").read_text() == "old" and (
        tmp_path / "x.1-state-new1" / "a"
    ).read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["x.1-state", "x.1-state-new1"]


def test_what_cannot_be_removed_stays_whole_with_a_warning(tmp_path: Path, holder: Holder, caplog) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "state").mkdir()
    for name in ("b", "c"):
        (tmp_path / "state" / name).write_text("x")
    holder.hold(tmp_path / "a")
    holder.hold(tmp_path / "state" / "c")
    with caplog.at_level(logging.WARNING):
        assert not remove_file(tmp_path / "a") and not remove_folder(tmp_path / "state")
    assert caplog.text.count("it stays") == 2
    assert sorted(os.listdir(tmp_path / "state")) == ["b", "c"]
    holder.held.clear()
    assert (
        remove_file(tmp_path / "a")
        and remove_folder(tmp_path / "state")
        and not [p for p in os.listdir(tmp_path) if "old" not in p]
    )


def test_a_run_goes_on_when_an_outdated_file_and_state_are_held(work: Work, holder: Holder, caplog) -> None:
    out = work.folder / "out"
    holder.hold(out / "lora-step00000002.safetensors")
    holder.hold(out / "lora-step00000002-state" / "optimizer.bin")
    rotating = ["--save_every_n_steps=2", "--save_state", "--save_last_n_steps=1", "--save_last_n_steps_state=1"]
    assert work.train("out", BRIEF, *rotating).exists()
    names = os.listdir(out)
    assert "lora-step00000002-state" in names and "lora-step00000004-state" not in names
    assert len(os.listdir(out / "lora-step00000002-state")) == len(os.listdir(out / "lora-state"))


def test_a_run_keeps_its_weights_when_their_place_is_held(work: Work, holder: Holder) -> None:
    work.train("out", BRIEF)
    known = fingerprint(work.folder / "out" / "lora.safetensors")
    holder.hold(work.folder / "out" / "lora.safetensors")
    with pytest.raises(HeldFileError, match="lora-new1.safetensors"):
        work.train("out", BRIEF, "--overwrite", "--save_state")
    assert (
        fingerprint(work.folder / "out" / "lora-new1.safetensors") == known
        and (work.folder / "out" / "lora-state").is_dir()
    )


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="tells what is mapped")
@pytest.mark.parametrize("kind", ["base_weights", "network_weights", "dim_from_weights", "lycoris"])
def test_adapters_that_a_run_reads_are_let_go(work: Work, kind: str) -> None:
    """Windows replaces no file that is mapped, and the output may have the name of an input."""
    module = ["--network_module=lycoris.kohya", "--network_args", "algo=lora"] if kind == "lycoris" else []
    path = work.train("first", BRIEF, "--max_train_steps=1", *module)
    options = {
        "base_weights": [f"--base_weights={path}"],
        "dim_from_weights": [f"--network_weights={path}", "--dim_from_weights"],
    }.get(kind, [f"--network_weights={path}"])  # fmt: skip
    trainer = work.trainer("second", BRIEF, *options, *module)
    run = trainer.prepare()
    assert run is not None and str(path) not in mapped_files()


def test_a_run_starts_from_the_file_of_its_own_name(work: Work) -> None:
    """The earlier file moves out of the way after it was read."""
    first = fingerprint(work.train("out", BRIEF, "--max_train_steps=1"))
    path = work.folder / "out" / "lora.safetensors"
    again = work.train("out", BRIEF, "--max_train_steps=1", f"--network_weights={path}", f"--base_weights={path}")
    assert fingerprint(work.folder / "out" / "lora-backup1.safetensors") == first != fingerprint(again)
