"""What a start reads, by counting: pictures are decoded when they are encoded, and files that are known are not read
again."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import ImageFile

from tests.runs.families import SLOTS, FamilyWork, Tinies

READ: Counter | None = None


def _note_read(event: str, arguments: tuple) -> None:
    if (
        event == "open"
        and READ is not None
        and isinstance(arguments[0], (str, os.PathLike))
        and "w" not in (arguments[1] or "r")
    ):
        READ[os.path.basename(arguments[0])] += 1


sys.addaudithook(_note_read)  # cannot be taken away again; it does nothing while READ is None


@pytest.fixture(scope="session")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture
def decoded(monkeypatch) -> Counter:
    """Name of a picture -> how often its pixels are read."""
    names: Counter = Counter()
    whole = ImageFile.ImageFile.load

    def load(self):
        if self.tile:
            names[os.path.basename(self.filename)] += 1
        return whole(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return names


def age(folder: Path) -> None:
    """Let all files be a minute older."""
    for path in folder.iterdir():
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns - 60 * 10**9, status.st_mtime_ns - 60 * 10**9))


@pytest.mark.parametrize("name", SLOTS)
def test_the_second_start_opens_no_picture_and_reads_captions(
    name: str, tmp_path: Path, tinies: Tinies, decoded: Counter, monkeypatch
) -> None:
    work: FamilyWork = tinies.work(name, tmp_path)
    argv = [*work.case.caches(on_disk=True), "--max_train_steps=1"]
    endings = (work.case.architecture.latents_suffix, work.case.architecture.text_suffix or ".npz")
    pictures = sorted(path.name for path in work.images.glob("*.png"))
    work.train("first", *argv)
    assert decoded == dict.fromkeys(pictures, 1)  # for the encoder, and for nothing else
    age(work.images)
    monkeypatch.setattr(sys.modules[__name__], "READ", Counter())
    work.train("second", *argv)  # the pictures' times are others: compared by content, once
    assert all(READ[picture] for picture in pictures)
    decoded.clear()
    READ.clear()
    work.train("third", *argv)
    assert not decoded and not any(READ[picture] for picture in pictures)  # what their headers tell is noted
    caches = {cache: count for cache, count in READ.items() if cache.endswith(endings)}
    assert len({cache.split("_")[0] for cache in caches}) == 2  # those of the step's two pictures
