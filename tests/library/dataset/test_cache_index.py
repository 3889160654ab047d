"""The index of cache files: what it spares, and that nothing that changed escapes notice because of it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from library.dataset import cache_index
from library.dataset.cache_index import FILE_NAME, CacheIndex
from library.dataset.fill_caches import fill_latent_cache, fill_text_cache
from library.dataset.image_headers import ImageFileError, look_at_noted_image
from library.dataset.npz_file import read_arrays, write_arrays
from tests.library.dataset.images import FLUX, make_folder, make_group, make_image, make_item
from tests.library.dataset.small_family import (
    SmallLatentsCaching,
    SmallTextCaching,
    SmallTextEncoder,
    SmallVae,
    small_strategies,
)

OPENED: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and OPENED is not None and isinstance(arguments[0], (str, os.PathLike)):
        OPENED.append(os.path.basename(arguments[0]))


sys.addaudithook(_note_opened)  # cannot be taken away again; it does nothing while OPENED is None


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
    return OPENED


class OneProcess:
    rank, num_processes = 0, 1

    def barrier(self) -> None:
        pass


def start(folder: Path, *, caption: str = "a cat", subset=None, latents=None, text=None) -> tuple[int, int]:
    """A run's caching phases over the pictures of a folder, from scratch; how many images and captions it encoded."""
    items = [make_item(path, caption=caption, subset=subset) for path in sorted(folder.glob("*.png"))]
    group = make_group(items)
    strategies = small_strategies(latents or SmallLatentsCaching(FLUX, True), text or SmallTextCaching(True))
    index = CacheIndex()
    encoded = fill_latent_cache([group], strategies, lambda: SmallVae(FLUX), OneProcess(), index=index)
    return encoded, fill_text_cache(
        [group], strategies, lambda: [SmallTextEncoder(), SmallTextEncoder()], OneProcess(), index=index
    )


def age(folder: Path, seconds: int = 10) -> None:
    """Let the files be written a while ago."""
    for path in folder.glob("*.*"):
        then = path.stat().st_mtime_ns - seconds * 10**9
        os.utime(path, ns=(then, then))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures whose caches are finished and known."""
    make_folder(tmp_path, 3, sizes=((64, 64),))
    assert start(tmp_path) == (3, 1)  # one caption for all
    age(tmp_path)
    assert start(tmp_path) == (0, 0)
    return tmp_path


def cache_files(opened: list[str]) -> list[str]:
    return [name for name in opened if name.endswith(".npz")]


def test_what_was_found_right_is_not_read_again(folder, opened):
    assert start(folder) == (0, 0)
    assert not cache_files(opened) and not [name for name in opened if name.endswith(".png")]
    assert opened.count(FILE_NAME) == 1  # for latents and for text
    assert sorted(json.loads((folder / FILE_NAME).read_text())["files"]) == sorted(
        path.name for path in folder.glob("*.npz")
    )


def test_files_of_the_second_in_which_they_were_found_are_read(tmp_path, opened):
    make_folder(tmp_path, 1)
    now = time.time()
    assert start(tmp_path) == (1, 1)
    for path in tmp_path.glob("*.npz"):
        os.utime(path, (now + 100, now + 100))  # and so of any later one
    assert start(tmp_path) == (0, 0) and cache_files(opened)
    opened.clear()
    assert start(tmp_path) == (0, 0) and len(set(cache_files(opened))) == 2


def test_a_changed_picture_is_noticed(folder):
    time.sleep(0.01)
    make_image(folder / "01.png", seed=9)
    assert start(folder) == (1, 0)


def test_a_touched_picture_is_read_once(folder, opened):
    os.utime(folder / "01.png", (1, 1))
    assert start(folder) == (0, 0) and opened.count("01.png") == 1
    opened.clear()
    assert start(folder) == (0, 0) and "01.png" not in opened


def test_another_caption_model_or_setting_is_noticed(folder):
    import dataclasses

    assert start(folder, caption="a dog") == (0, 1)
    subset = dataclasses.replace(make_item(folder / "00.png").subset, flip_aug=True)
    assert start(folder, caption="a dog", subset=subset) == (3, 0)
    latents = SmallLatentsCaching(FLUX, True)
    latents.model_identity = "other"
    assert start(folder, caption="a dog", latents=latents, text=SmallTextCaching(True, mask=True)) == (0, 1)
    for path in folder.glob("*.npz"):
        if "latents_8x8" in (arrays := read_arrays(path)):
            record = json.loads(str(arrays["atelier_record_8x8"]))
            arrays["atelier_record_8x8"] = np.asarray(json.dumps({**record, "model": "one"}))
            write_arrays(path, arrays)
    assert start(folder, caption="a dog", latents=latents, text=SmallTextCaching(True, mask=True)) == (3, 0)


def test_a_file_without_a_condition_that_is_wanted_now_is_noticed(folder):
    """Two settings of one encoder may ask for other things beside the same latents."""

    class WithMore(SmallLatentsCaching):
        wanted = ("first",)

        def condition_shapes(self, bucket):
            return {name: (1,) for name in self.wanted}

        def encode_conditions(self, vae, parts, images, seeds, pictures):
            return {name: images.new_zeros(len(images), 1) for name in self.wanted}

    assert start(folder, latents=WithMore(FLUX, True))[0] == 3
    age(folder)
    assert start(folder, latents=WithMore(FLUX, True))[0] == 0
    WithMore.wanted = ("first", "last")
    assert start(folder, latents=WithMore(FLUX, True))[0] == 3


@pytest.mark.parametrize("damage", ["cut", "inside", "gone", "swapped"])
def test_a_changed_cache_file_is_noticed(folder, damage, caplog):
    """Also when size and time are as before."""
    path, other = sorted(folder.glob("*_flux.npz"))[:2]
    status, content = path.stat(), path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "swapped":
        other.replace(path)
    else:
        path.write_bytes(content[:-30] if damage == "cut" else b"x" * len(content))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert start(folder) == ({"cut": 1, "inside": 1, "gone": 1, "swapped": 2}[damage], 0)


@pytest.mark.parametrize("content", [
    "", "not json", "[]", '{"version": 2}', '{"version": 2, "files": []}', '{"version": 1, "files": {}}', "[" * 100000,
    '{"version": 2, "files": {"00_0064x0064_flux.npz": 3, "01_0064x0064_flux.npz": {"stamp": 1}, "01_flux_te.npz": "1,2,3|"}}',
])  # fmt: skip
def test_an_index_that_is_none_of_ours_counts_for_nothing(folder, content, opened):
    (folder / FILE_NAME).write_text(content)
    assert start(folder) == (0, 0) and len(set(cache_files(opened))) == 6
    opened.clear()
    assert start(folder) == (0, 0) and not cache_files(opened)


def test_a_folder_that_cannot_be_written_keeps_its_index_in_memory(folder, opened, monkeypatch):
    (folder / FILE_NAME).unlink()

    def refuse(path, text):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cache_index, "write_text_atomically", refuse)
    for _ in range(2):
        assert start(folder) == (0, 0) and len(set(cache_files(opened))) == 6
        opened.clear()


def test_two_processes_that_write_one_index_keep_what_both_found(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1, 1))
    first, second = CacheIndex(), CacheIndex()
    for index, name in ((first, "a"), (second, "b")):
        assert index.find(str(tmp_path / name), "right?", lambda: ("yes", "")) == ("yes", "")
    assert first.find(str(tmp_path / "c"), "right?", lambda: (None, "no")) == (None, "no")  # only good answers are kept
    first.save()
    second.save()
    fresh = CacheIndex()
    for name in ("a", "b"):
        assert fresh.find(str(tmp_path / name), "right?", lambda: pytest.fail("read")) == ("yes", "")
    assert fresh.find(str(tmp_path / "a"), "another?", lambda: (None, "no")) == (None, "no")
    assert fresh.find(str(tmp_path / "c"), "right?", lambda: ("now", "")) == ("now", "")
    (tmp_path / "a").unlink()
    fresh.save()
    assert sorted(json.loads((tmp_path / FILE_NAME).read_text())["files"]) == ["b", "c"]


def look(folder: Path, *, save: bool = True) -> dict[str, tuple]:
    """The headers of the pictures of a folder, as the start of a run looks at them."""
    index = CacheIndex()
    found = {path.name: look_at_noted_image(str(path), index) for path in sorted(folder.glob("*.png"))}
    if save:
        index.save()
    return found


def test_headers_of_pictures_that_did_not_change_are_not_read_again(tmp_path, opened):
    make_folder(tmp_path, 2, sizes=((40, 24),))
    make_image(tmp_path / "99.png", (16, 8), alpha=100)
    age(tmp_path)
    first = look(tmp_path)
    assert opened and {check.size for check in first.values()} == {(40, 24), (16, 8)} and first["99.png"].transparent
    opened.clear()
    assert look(tmp_path) == first and not [name for name in opened if name.endswith(".png")]


def test_a_picture_that_changed_is_looked_at_again(tmp_path, opened):
    make_folder(tmp_path, 2, sizes=((40, 24),))
    age(tmp_path)
    look(tmp_path)
    first = sorted(tmp_path.glob("*.png"))[0]
    make_image(first, (24, 40))
    opened.clear()
    assert look(tmp_path)[first.name].size == (24, 40) and [name for name in opened if name.endswith(".png")] == [
        first.name
    ]


def test_a_damaged_picture_is_told_each_time(tmp_path):
    make_folder(tmp_path, 1)
    (path,) = tmp_path.glob("*.png")
    path.write_bytes(path.read_bytes()[:50])
    age(tmp_path)
    for _ in range(2):
        with pytest.raises(ImageFileError):
            look(tmp_path)
