"""What a killed run left half written is gone after the next start, in the output and in the folders of caches."""

from __future__ import annotations

from pathlib import Path

from library.core.file_owners import owned_name, this_process
from tests.runs.conftest import Work


def left_by_a_dead_process(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = owned_name(path, "tmp")
    left = mine.with_name(mine.name.replace(f"-{this_process().pid}-", "-999999999-"))
    left.write_text("half")
    return left


def test_the_next_start_removes_them(work: Work) -> None:
    out = work.folder / "out"
    left = [
        left_by_a_dead_process(path)
        for path in (out / "lora.safetensors", out / "sample" / "a.png", work.images / "00_0064x0064_flux.npz")
    ]
    work.train("out", "--t5xxl_max_token_length=32", "--max_train_steps=1", "--cache_latents_to_disk")
    assert not any(path.exists() for path in left)
