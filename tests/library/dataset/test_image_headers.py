"""What a header tells is what decoding shows, over formats, modes and orientations; and nothing is decoded for it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from library.dataset.image_headers import look_at_image
from library.dataset.media_utils import ImageFileError, decode_image, verify_image

SIZE = (37, 23)


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(3).integers(1, 255, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
CASES: dict[str, tuple[str, str, dict]] = {
    **{f"png-{mode}": (mode, "PNG", {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")},
    "png-key-colour": ("RGB", "PNG", {"transparency": (1, 2, 3)}),
    "png-palette-alpha": ("P", "PNG", {"transparency": 3}),
    "png-turned": ("RGB", "PNG", {"exif": turned(6)}),
    "png-animated": ("RGB", "PNG", {"save_all": True, "append_images": [picture()]}),
    **{f"jpeg-{mode}": (mode, "JPEG", {}) for mode in ("L", "RGB", "CMYK")},
    "jpeg-progressive": ("RGB", "JPEG", {"progressive": True}),
    **{f"jpeg-turned-{n}": ("RGB", "JPEG", {"exif": turned(n)}) for n in range(1, 9)},
    "jpeg-xmp": ("RGB", "JPEG", {"xmp": XMP}),
    "jpeg-icc": ("RGB", "JPEG", {"icc_profile": b"\xff\xda\xff\xe1" * 20000, "exif": turned(8)}),
    "webp-lossy": ("RGB", "WEBP", {}), "webp-lossless": ("RGB", "WEBP", {"lossless": True}),
    "webp-alpha": ("RGBA", "WEBP", {}),
    "webp-turned": ("RGB", "WEBP", {"exif": turned(6)}),
    "webp-animated": ("RGB", "WEBP", {"save_all": True, "append_images": [picture()]}),
    "bmp": ("RGB", "BMP", {}), "bmp-palette": ("P", "BMP", {}),
}  # fmt: skip
if ".avif" in Image.registered_extensions():
    CASES |= {"avif": ("RGB", "AVIF", {}), "avif-turned": ("RGB", "AVIF", {"exif": turned(6)})}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files of which pixels are read."""
    names: list[str] = []
    whole = ImageFile.ImageFile.load

    def load(self):
        if self.tile:
            names.append(Path(self.filename).name)
        return whole(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return names


@pytest.mark.parametrize("case", CASES)
def test_a_header_tells_what_decoding_shows(tmp_path, case, decoded):
    mode, name, options = CASES[case]
    path = tmp_path / "a.png"  # what a file is decides, not what it is called
    picture(mode).save(path, name, **options)
    found = look_at_image(path)
    assert not decoded
    whole = verify_image(path)
    assert (found.size, found.deep, found.transparent) == (whole.size, whole.deep, whole.transparent)
    assert found.size == decode_image(path).shape[1::-1]


@pytest.mark.parametrize("name", ["TIFF", "GIF"])
def test_formats_under_a_wrong_name_are_read_in_full(tmp_path, name, decoded):
    picture().save(tmp_path / "a.png", name)
    assert look_at_image(tmp_path / "a.png") == verify_image(tmp_path / "a.png") and decoded == ["a.png"] * 2


def test_exif_after_the_pixels_turns_a_png(tmp_path):
    picture().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk = b"eXIf" + turned(6).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk + content[-12:])
    assert look_at_image(tmp_path / "a.png").size == SIZE[::-1] == decode_image(tmp_path / "a.png").shape[1::-1]


@pytest.mark.parametrize(
    "case", ["png-RGB", "png-turned", "jpeg-RGB", "jpeg-turned-6", "webp-lossy", "webp-alpha", "bmp"]
)
def test_a_picture_that_broke_off_is_named_as_decoding_names_it(tmp_path, case):
    mode, name, options = CASES[case]
    path = tmp_path / "a.png"
    picture(mode, (200, 120)).save(path, name, **options)
    content = path.read_bytes()
    for part in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ImageFileError) as full:
            verify_image(path)
        with pytest.raises(ImageFileError) as quick:
            look_at_image(path)
        assert str(quick.value) == str(full.value)


def test_a_good_picture_with_bytes_behind_its_end_is_good(tmp_path):
    for name in ("PNG", "JPEG", "WEBP", "BMP"):
        picture().save(tmp_path / "a.png", name)
        with open(tmp_path / "a.png", "ab") as file:
            file.write(b"more")
        assert look_at_image(tmp_path / "a.png").size == SIZE


def test_a_damaged_first_chunk_is_named(tmp_path):
    picture().save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[19] ^= 1  # another width
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageFileError, match="a.png"):
        look_at_image(tmp_path / "a.png")
    with pytest.raises(ImageFileError, match="does not exist"):
        look_at_image(tmp_path / "b.png")
