"""Damaged state folders, with their checksums and without (as older versions wrote them): a message or success before
models."""

from __future__ import annotations

import json
import shutil

import pytest

from library.training import cli
from library.training.state_files import SUMS_FILE
from library.training.trainer_base import Trainer
from tests.fuzz.mutations import as_json, changed_bytes, changed_safetensors, changed_value
from tests.fuzz.running import generator
from tests.runs.conftest import Work, draw_pictures
from tests.tiny import build_tiny_flux


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    folder = tmp_path_factory.mktemp("states")
    work = Work(folder, build_tiny_flux(folder / "tiny"), draw_pictures(folder / "images", 2))
    work.train("out", "--max_train_steps=1", "--save_state")
    return work


def test_states(work: Work, cases, finds, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "run", lambda self: self.check())
    whole, folder = work.folder / "out" / "lora-state", work.folder / "again" / "lora-state"
    names = sorted(path.name for path in whole.iterdir())
    argv = work.argv("again", f"--resume={folder}", "--console_log_level=CRITICAL")
    for number in cases(40):
        draw = generator("states", number)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = draw.choice(names)
        path, content, kind = folder / name, (whole / name).read_bytes(), draw.random()
        if name.endswith(".json") and kind < 0.6:
            path.write_bytes(as_json(changed_value(json.loads(content), draw)))
        elif kind < 0.1:
            path.unlink()
        elif kind < 0.15:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(
                changed_safetensors(content, draw) if name.endswith(".safetensors") else changed_bytes(content, draw)
            )
        if number % 2 and name != SUMS_FILE:
            (folder / SUMS_FILE).unlink(missing_ok=True)
        finds.run(f"case {number} ({name})", lambda: cli.exit_code(lambda: cli.run("flux", "network", argv)))
    capsys.readouterr()
    finds.assert_none()
