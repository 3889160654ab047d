"""Of every image and video script: what its files tell makes them again, byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def check_made_again(run: Callable[[Sequence[str]], list[Path]], made: Sequence[Path], folder_option: str) -> None:
    """Each of the files `made` is the one that its script makes of `--from_metadata` alone."""
    assert made
    for number, path in enumerate(made):
        (again,) = run([f"--from_metadata={path}", f"--{folder_option}={path.parent / f'again{number}'}"])
        assert again != path and again.read_bytes() == path.read_bytes(), path


def lines_file(folder: Path, *lines: str) -> str:
    """The option that names a file of prompt lines."""
    path = folder / "lines_to_make_again.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return f"--from_file={path}"
