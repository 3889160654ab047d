"""Consoles and names that are not UTF-8: nothing raises."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.checkpoints.hashes import adapter_hashes
from library.core.atomic_file import write_text_atomically
from library.core.console import make_console_safe, storable
from library.safetensors_utils import read_header, save_file_atomic
from library.training.sampling_prompts import parse_line
from tests.waiting import PATIENCE
from tools import show_metadata

ROOT = Path(__file__).resolve().parents[2]
LATIN = os.fsdecode(b"caf\xe9")
"""a name that is not UTF-8, as Python carries it"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_letters_that_the_console_lacks(encoding: str, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    make_console_safe()
    print("a", "😀", LATIN, flush=True)
    assert stream.buffer.getvalue().split() == [b"a", b"\\U0001f600", b"caf\\udce9"]


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
@pytest.mark.parametrize(
    "script", ["flux_train_network.py", "tools/show_metadata.py", "tools/cache_latents.py", "gen_img.py"]
)
def test_help_on_narrow_consoles(settings: dict[str, str], script: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"--" in done.stdout


def test_metadata_with_letters_that_the_console_lacks(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file_atomic({"a": torch.zeros(1)}, path, {"ss_training_comment": f"😀 {LATIN}"})
    assert read_header(path)[1] == {"ss_training_comment": "😀 caf\\udce9"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert show_metadata.main([str(path)]) == 0 or show_metadata.main(["--model", str(path)]) == 0
    stream.flush()
    assert b"\\U0001f600" in stream.buffer.getvalue()


def test_names_that_are_not_utf8_in_what_is_written(tmp_path):
    write_text_atomically(tmp_path / "a.json", json.dumps({LATIN: 1}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {LATIN: 1}
    assert adapter_hashes({"a": torch.zeros(1)}, {"ss_dataset_dirs": LATIN})
    assert storable("ü😀") == "ü😀" and storable(LATIN) == "caf\\udce9"
    assert parse_line(f"{LATIN} --n {LATIN}").prompt == "caf\\udce9"
