"""Short cuts for folders with many files give what the plain ways give."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import threading
import time

import numpy as np
import pytest

from library.core.file_limits import stem_of
from library.core.garbage import records_stay
from library.core.text_files import read_bytes
from library.dataset import captions
from library.dataset.background import map_in_threads
from library.dataset.cache_checks import crowded_names
from library.dataset.captions import read_caption
from library.dataset.datasources import AbsolutePaths
from library.dataset.folders import has_extension
from library.dataset.items import SubsetParams
from library.dataset.npz_file import UNREADABLE, read_arrays, read_headers, write_arrays
from tests.library.dataset.images import make_folder, make_group, make_item

NAMES = (
    "a.png", "a.b.png", ".png", "..png", "...png", "a", "a.", "", "a.b/c", "a.b/c.png", "a/.png", "a/..png", "a\\b.png",
    "a.b\\c", "/a.png", "é.PNG",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_stems_and_extensions_are_those_of_the_standard_library(name):
    stem, extension = os.path.splitext(name)
    assert stem_of(name) == stem
    for wanted in (frozenset({".png"}), frozenset({".b"})):
        assert has_extension(os.path.basename(name), wanted) == (
            os.path.splitext(os.path.basename(name))[1].lower() in wanted
        )


@pytest.mark.parametrize(
    "path",
    ["a.png", "./a.png", "x/../a.png", "x//a.png", "x/./a.png", "/a.png", "//a.png", "/x/y/a.png", "x/..", "x/", "."],
)
def test_absolute_paths_are_those_of_the_standard_library(path):
    absolute = AbsolutePaths()
    assert absolute.of(path) == absolute.of(path) == os.path.abspath(path)


@pytest.mark.parametrize("text, caption", [
    (b"a cat\nsecond", "a cat"), (b"a cat\r\nsecond", "a cat"), (b"a cat\rsecond", "a cat"),
    (b"\xef\xbb\xbfa cat", "a cat"), (b"", ""),
    (b" a\x0ccat \n", "a\x0ccat"), ("ä cat".encode(), "ä cat"), (b"x" * 100000 + b"\n", "x" * 100000),
])  # fmt: skip
def test_captions_of_every_line_ending(tmp_path, text, caption):
    (tmp_path / "a.txt").write_bytes(text)
    assert read_caption(str(tmp_path / "a.png"), SubsetParams(caption_extension=".txt")) == caption


def test_what_is_no_file_is_not_waited_for(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "missing")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="pipe"):
            read_bytes(tmp_path / "pipe")


def test_names_are_crowded_in_one_of_many(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"")
    images = [str(tmp_path / name) for name in ("a.png", "b.png", "a.jpg", "b.png")]
    assert crowded_names([stem_of(image) for image in images], images) == {str(tmp_path / "a"): [images[0], images[2]]}
    assert crowded_names([stem_of(image) for image in images[:2]], images[:2]) == crowded_names([], []) == {}


def test_tags_are_counted_once_and_anew_after_a_change(tmp_path, monkeypatch):
    group = make_group(make_folder(tmp_path, 3))
    counted, whole = [], captions.tag_frequency
    monkeypatch.setattr(captions, "tag_frequency", lambda texts: counted.append(1) or whole(texts))
    assert group.metadata()[0]["tag_frequency"] == group.tag_frequency and len(counted) == 1
    assert group.tag_frequency[tmp_path.name]["red"] == 3
    group.drop(group.items[:1])
    assert group.tag_frequency[tmp_path.name]["red"] == 2


def test_only_tasks_that_wait_are_given_to_threads():
    """A busy machine makes a few tasks late, a slow disk nearly all."""
    names = set()

    def task(number: int) -> int:
        if number % 100 == 50 or number < 0:
            time.sleep(0.005 if number < 0 else 0.1)
        names.add(threading.current_thread().name)
        return number

    assert map_in_threads(task, range(300), num_threads=4) == list(range(300))
    assert names == {threading.current_thread().name}
    waiting = list(range(-300, 0))
    assert map_in_threads(task, waiting, num_threads=4) == waiting
    assert len(names) > 1


def test_the_collector_works_again_after_an_error():
    assert gc.isenabled()
    with pytest.raises(ValueError), records_stay():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_names_of_files_beside_an_image_take_no_room_of_their_own(tmp_path):
    """An item is small: it keeps endings, in whichever way the names are given, and plug-ins set and read whole ones."""
    path, elsewhere = str(tmp_path / "a.b.png"), str(tmp_path / "caches" / "a_flux.npz")
    item = make_item(tmp_path / "a.b.png", latents_npz=str(tmp_path / "a.b_0064x0064_flux.npz"))
    assert item.latents_npz == str(tmp_path / "a.b_0064x0064_flux.npz") and item.text_encoder_outputs_npz is None
    item.text_encoder_outputs_npz = elsewhere
    other = dataclasses.replace(item, absolute_path=str(tmp_path / "c.png"))
    for kept in (item, other, copy.copy(item), pickle.loads(pickle.dumps(item))):
        assert kept.text_encoder_outputs_npz == elsewhere
        assert kept.latents_npz == str(tmp_path / "a.b_0064x0064_flux.npz")
    item.latents_npz = f"{path}_0064x0064_flux.npz"
    assert item.latents_npz == f"{path}_0064x0064_flux.npz" and item != other
    items = [make_item(tmp_path / f"{k}.png", latents_npz=str(tmp_path / f"{k}_x.npz")) for k in range(2)]
    assert items[0]._latents_npz is items[1]._latents_npz and items[0].captions_extra is items[1].captions_extra


def test_arrays_are_read_as_numpy_reads_them(tmp_path, monkeypatch):
    """Without numpy and its copies, unless they are packed or lie otherwise; a file that changed or broke is noticed."""
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4, 5)).astype(np.float32), "sizes": np.array([7, 8]), "none": np.zeros((0, 4)),
        "record": np.asarray("é and more"), "half": rng.normal(size=(2, 2)).astype(np.float16), "yes": np.array([True]),
    }  # fmt: skip
    path, packed = tmp_path / "a.npz", tmp_path / "b.npz"
    write_arrays(path, arrays)
    np.savez_compressed(packed, **arrays, columns=np.asfortranarray(arrays["a"][0]))
    for file in (path, packed):
        with np.load(file) as archive:
            found = read_arrays(file)
            assert found.keys() == set(archive.files)
            for key, array in found.items():
                assert array.dtype == archive[key].dtype and array.flags.writeable and np.array_equal(array, archive[key])
    monkeypatch.setattr(np, "load", None)
    assert list(read_arrays(path, ["sizes", "absent"])) == ["sizes"]
    monkeypatch.undo()
    headers = read_headers(path)
    write_arrays(path, {"first": np.zeros(99), **arrays, "a": arrays["a"] + 1})
    assert np.array_equal(read_arrays(path, ["a"], headers)["a"], arrays["a"] + 1)
    content = bytearray(path.read_bytes())
    place = content.index((arrays["a"] + 1).tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UNREADABLE):
        read_arrays(path, ["a"])
