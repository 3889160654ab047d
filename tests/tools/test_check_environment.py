"""What check_environment tells of devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.waiting import PATIENCE
from tools import check_environment

ROOT = Path(__file__).resolve().parents[2]
LISTING = "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-11111111-2222-3333-4444-555555555555)"


@pytest.fixture
def with_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's program that lists a card, as on a machine with an NVIDIA GPU."""
    if os.name == "nt":
        (tmp_path / "nvidia-smi.bat").write_text(f"@echo {LISTING}\r\n", encoding="utf-8")
    else:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{LISTING}'\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used here")
@pytest.mark.parametrize(
    ("built_for", "told"), [(None, ("built without CUDA", "--index-url")), ("13.0", ("driver", "CUDA 13.0"))]
)
def test_a_gpu_that_torch_cannot_use_is_told(with_gpu, monkeypatch, capsys, built_for, told) -> None:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    with pytest.raises(SystemExit):
        check_environment.main([])
    out, err = capsys.readouterr()
    assert "device: the CPU" in out or "device: " in out
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "NVIDIA GeForce RTX 4090" in line and all(part in line for part in told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used here")
def test_the_device_is_told(monkeypatch) -> None:
    monkeypatch.setattr(check_environment.shutil, "which", lambda name: None)
    result = subprocess.run(
        [sys.executable, "tools/check_environment.py"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "PATH": os.fspath(Path(sys.executable).parent)},
    )  # fmt: skip
    assert "device: " in result.stdout and "warning" not in result.stderr
