"""Cache files with other numbers than they should hold, damaged ones, and things that are no files: made anew or one
message."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from library.core.errors import CheckpointError, ConfigError
from library.dataset import cache_io, npz_file, text_cache_io
from library.dataset.architectures import ARCHITECTURES
from library.dataset.caching import plan_latents
from library.dataset.items import ImageItem
from library.dataset.npz_file import UNREADABLE, read_arrays, read_headers
from library.dataset.text_cache_io import TEXT_LAYOUTS, TextRecord, caption_hash
from tests.library.dataset.images import FLUX, make_image, make_item
from tests.library.dataset.small_family import SmallLatentsCaching
from tests.library.dataset.test_caching import bucketed, fill, reason


@pytest.fixture
def item(tmp_path) -> ImageItem:
    item = bucketed([make_item(make_image(tmp_path / "a.png"))])[0]
    fill([item])
    return item


def rewrite(path: str, **changes: np.ndarray | None) -> None:
    """Other arrays in a cache file, as another program may have put them there."""
    arrays = {**read_arrays(path), **changes}
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})


def other_numbers(array: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "whole numbers": array.astype(np.int32), "the other byte order": array.astype(array.dtype.newbyteorder()),
        "complex numbers": array.astype(np.complex64), "texts": array.astype("U8"), "truths": array > 0,
        "records": np.zeros(array.shape, [("a", "f4")]),
    }  # fmt: skip


@pytest.mark.parametrize("key", ["latents_8x8", "original_size", "crop_ltrb"])
@pytest.mark.parametrize("kind", other_numbers(np.zeros(1, np.float32)))
def test_other_numbers_are_made_anew(item, key: str, kind: str):
    key = key if key in read_headers(item.latents_npz) else f"{key}_8x8"
    rewrite(item.latents_npz, **{key: other_numbers(read_arrays(item.latents_npz)[key])[kind]})
    if kind == "whole numbers" and "latents" not in key:
        return  # sizes are whole numbers
    assert reason(item) is not None
    with pytest.raises((ValueError, CheckpointError)):
        SmallLatentsCaching(FLUX, True).load_latents_from_disk(item.latents_npz, item.bucket_reso)
    assert fill([item]) == 1 and reason(item) is None


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_of_known_trainers_are_read(item, dtype):
    rewrite(
        item.latents_npz,
        latents_8x8=read_arrays(item.latents_npz)["latents_8x8"].astype(dtype),
        atelier_record_8x8=None,
    )
    assert reason(item) is None
    latents = SmallLatentsCaching(FLUX, True).load_latents_from_disk(item.latents_npz, item.bucket_reso)[0]
    assert latents.dtype == dtype


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[",
        "[]",
        "null",
        "{}",
        '{"checksums": 3}',
        '{"version": 1, "resized": 3}',
        '{"image": {"x": 1}}',
        "[" * 100_000,
        '{"image": 3}',
    ],
)
def test_a_damaged_record_fits_nothing(item, record: str):
    rewrite(item.latents_npz, atelier_record_8x8=np.asarray(record))
    assert reason(item) is not None and fill([item]) == 1


def spoiled_files(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    places = {f"cut at {share}": whole[: int(len(whole) * share)] for share in (0, 0.1, 0.5, 0.99)}
    texts = {"a page": b"<html>", "zeros": bytes(2000), "a pickle": b"\x80\x04N."}
    return {**places, **texts, **{f"member: {name}": member for name, member in odd_members().items()}}


def npy(header: bytes, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return b"\x93NUMPY" + version + length + header + data


def odd_members() -> dict[str, bytes]:
    good = b"{'descr': '<f4', 'fortran_order': False, 'shape': (16, 8, 8), }\n"
    members = {
        "more than it says": npy(good, bytes(4 * 16 * 64 + 4)),
        "less than it says": npy(good, bytes(4)),
        "negative sides": npy(good.replace(b"16, 8", b"-16, -8"), bytes(4 * 16 * 64)),
        "a long header": npy(good + b" " * 60_000, bytes(4)),
        "a header of gigabytes": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + good,
        "deep brackets": npy(b"(" * 5000, b""),
        "version 3": npy(good, bytes(4 * 16 * 64), b"\x03\x00"),
        "an object": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (), }\n", b"\x80\x04N."),
        "no type": npy(b"{'descr': 'nope', 'fortran_order': False, 'shape': (), }\n", b""),
        "no header": b"",
    }
    files = {}
    for name, member in members.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("latents_8x8.npy", member)
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("latents_8x8.npy", npy(good.replace(b"(16, 8, 8)", b"(%d,)" % (1 << 19)), bytes(1 << 21)))
    return {**files, "a bomb": buffer.getvalue()}


def test_damaged_files_are_made_anew(item, monkeypatch):
    monkeypatch.setattr(npz_file, "MOST_UNPACKED", 1 << 20)
    path = Path(item.latents_npz)
    for name, content in spoiled_files(path).items():
        path.write_bytes(content)
        assert reason(item) is not None, name
        with pytest.raises((ValueError, CheckpointError)):
            cache_io.load_latents(str(path), FLUX, item.bucket_reso)
        try:
            read_headers(path)
        except UNREADABLE:
            pass
        assert text_cache_io.find_text(str(path), TEXT_LAYOUTS["flux"], flux_record(), needed=("l_pooled",))[0] is None
        assert cache_io.existing_arrays(str(path)).keys() <= {"latents_8x8"}, name
    assert fill([item]) == 1 and reason(item) is None


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_no_file_where_a_cache_belongs(item, kind: str):
    os.remove(item.latents_npz)
    if kind == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with a name")
    (os.mkdir if kind == "folder" else os.mkfifo)(item.latents_npz)
    with pytest.raises(
        ConfigError, match=f"{os.path.basename(item.latents_npz)} is where a cache file belongs, and is a {kind}"
    ):
        plan_latents([item], SmallLatentsCaching(FLUX, True))


# ---- text ------------------------------------------------------------------------------------------------------------


def flux_record() -> TextRecord:
    return TextRecord(caption=caption_hash("a"), model="", max_token_length=4, flags={"apply_t5_attn_mask": False})


def flux_outputs() -> dict[str, np.ndarray]:
    return {
        "l_pooled": np.zeros(8, np.float32), "t5_out": np.zeros((4, 8), np.float32),
        "txt_ids": np.zeros((4, 3), np.float32),
        "t5_attn_mask": np.ones(4, np.int64),
    }  # fmt: skip


@pytest.mark.parametrize("key", ["l_pooled", "t5_out", "t5_attn_mask", "apply_t5_attn_mask"])
@pytest.mark.parametrize("kind", other_numbers(np.zeros(1, np.float32)))
def test_other_numbers_in_text_outputs(tmp_path, key: str, kind: str):
    path, layout, record = str(tmp_path / "a.npz"), TEXT_LAYOUTS["flux"], flux_record()
    text_cache_io.save_text(path, layout, flux_outputs(), record)
    needed = tuple(flux_outputs())
    assert text_cache_io.find_text(path, layout, record, needed=needed) == ("", "")
    rewrite(path, **{key: other_numbers(read_arrays(path)[key])[kind], "atelier_record": None})
    if key.endswith("mask") and kind in ("whole numbers", "truths") or key.startswith("apply") and "order" in kind:
        return  # other spellings of the same
    assert text_cache_io.find_text(path, layout, record, needed=needed)[0] is None
    if key != "apply_t5_attn_mask":
        with pytest.raises(CheckpointError, match="a.npz cannot be read"):
            text_cache_io.load_text(path, layout)


# ---- long names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["x" * 245, "ä" * 122, "😀" * 61])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_images_with_long_names_are_cached(tmp_path, stem: str, family: str):
    architecture = ARCHITECTURES[family]
    path = make_image(tmp_path / f"{stem}.png")
    latents, text = (
        cache_io.latents_npz_path(architecture, str(path), (64, 64)),
        cache_io.text_npz_path(architecture, str(path)),
    )
    for name in map(os.path.basename, (latents, text)):
        assert len(os.fsencode(name)) <= 255 and "~" in name
    other = cache_io.latents_npz_path(architecture, f"{tmp_path}/{stem[:-1]}y.png", (64, 64))
    assert other != latents and cache_io.image_size_from_latents_path(architecture, str(path), latents) == (64, 64)
    assert cache_io.image_size_from_latents_path(architecture, str(path), other) is None
    item = bucketed([make_item(path)])[0]
    assert fill([item], SmallLatentsCaching(architecture, True)) == 1 and os.path.isfile(latents)
    assert fill([item], SmallLatentsCaching(architecture, True)) == 0


def test_short_names_stay():
    assert cache_io.latents_npz_path(FLUX, "/d/ü.b.png", (64, 1000)) == f"/d/ü.b_0064x1000{FLUX.latents_suffix}"
