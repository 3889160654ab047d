"""Reading images: orientation, modes, damage; resizing, cropping, augmentation."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.dataset import INTERPOLATIONS
from library.dataset.captions import face_numbers
from library.dataset.media_utils import (
    COLOR_PROBABILITY,
    ColorChange,
    ImageFileError,
    alpha_to_mask,
    change_color,
    check_conditioning_size,
    conditioning_to_mask,
    decode_image,
    draw_color_change,
    face_crop_geometry,
    image_size,
    random_offset,
    resize_and_crop,
    resize_image,
    verify_image,
)

PICTURE = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3  # 6 wide, 4 high


def save(path, array=PICTURE, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_size_and_pixels(tmp_path, suffix, orientation):
    path = save(tmp_path / f"a{suffix}", exif=exif(orientation), lossless=True)
    turned = {
        1: PICTURE, 2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1], 5: PICTURE.transpose(1, 0, 2),
        6: PICTURE[::-1].transpose(1, 0, 2), 7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: PICTURE.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert image_size(path) == verify_image(path).size == (turned.shape[1], turned.shape[0])
    assert np.array_equal(decode_image(path), turned)


def test_modes_become_rgb(tmp_path):
    grey = save(tmp_path / "grey.png", mode="L")
    assert decode_image(grey).shape == (4, 6, 3)
    cmyk = save(tmp_path / "cmyk.jpg", mode="CMYK")
    assert decode_image(cmyk).shape == (4, 6, 3)
    palette = save(tmp_path / "palette.png", mode="P")
    assert np.abs(decode_image(palette).astype(int) - PICTURE).max() < 60
    assert decode_image(palette, with_alpha=True).shape == (4, 6, 4)


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 256, 65535], [32768, 511, 512]], dtype=np.uint16)).save(path)
    assert decode_image(path)[..., 0].tolist() == [[0, 1, 255], [128, 1, 2]]
    assert verify_image(path).deep and not verify_image(save(tmp_path / "a.png")).deep


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(tmp_path / "a.webp")[0, 0].tolist() == [255, 0, 0]


def test_alpha_channel(tmp_path):
    array = np.dstack([PICTURE, np.full((4, 6), 51, np.uint8)])
    path = save(tmp_path / "a.png", array)
    assert verify_image(path).transparent and not verify_image(path).invisible
    assert decode_image(path).shape == (4, 6, 3)
    assert np.allclose(alpha_to_mask(decode_image(path, with_alpha=True)), 0.2)
    opaque = decode_image(save(tmp_path / "b.png"), with_alpha=True)
    assert np.array_equal(alpha_to_mask(opaque), np.ones((4, 6)))
    assert np.array_equal(alpha_to_mask(PICTURE), np.ones((4, 6)))
    array[..., 3] = 0
    assert verify_image(save(tmp_path / "c.png", array)).invisible


def test_black_masks_are_seen(tmp_path):
    for mode in ("RGB", "L", "P", "1"):
        path = save(tmp_path / f"{mode}.png", np.zeros((4, 6, 3), np.uint8), mode)
        assert verify_image(path).black, mode
    assert not verify_image(save(tmp_path / "a.png")).black
    assert conditioning_to_mask(PICTURE)[0, 1] == pytest.approx(9 / 255)


@pytest.mark.parametrize("damage", ["empty", "text", "header", "truncated"])
def test_damaged_files_are_named(tmp_path, damage):
    path = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"hello", "header": content[:20], "truncated": content[: len(content) // 2]}[damage]
    )
    with pytest.raises(ImageFileError, match=r"a\.png"):
        verify_image(path)
    with pytest.raises(ImageFileError, match=r"a\.png"):
        decode_image(path)
    with pytest.raises(ImageFileError, match="does not exist"):
        image_size(tmp_path / "none.png")


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_every_interpolation(name):
    flat = np.full((10, 20, 4), 90, np.uint8)
    for size in ((7, 5), (40, 30)):
        assert np.array_equal(resize_image(flat, size, name), np.full((size[1], size[0], 4), 90))


def test_default_interpolation():
    image = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(resize_image(image, (15, 20)), resize_image(image, (15, 20), "area"))
    assert np.array_equal(resize_image(image, (31, 10)), resize_image(image, (31, 10), "lanczos"))
    assert resize_image(image, (30, 20), "box") is image


def test_transparent_pixels_keep_their_colour():
    image = np.dstack([np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8), np.uint8)])
    assert (resize_image(image, (16, 16), "lanczos")[..., :3] == 200).all()


def test_crop():
    cut = resize_and_crop(PICTURE, (6, 4), (2, 3), (3, 1))
    assert np.array_equal(cut, PICTURE[1:4, 3:5])
    with pytest.raises(ValueError, match="inside"):
        resize_and_crop(PICTURE, (6, 4), (4, 4), (3, 0))
    offsets = {random_offset((8, 4), (6, 4), random.Random(seed)) for seed in range(50)}
    assert offsets == {(0, 0), (1, 0), (2, 0)}


def test_mask_of_another_size_is_refused(tmp_path):
    path = save(tmp_path / "mask.png")
    with pytest.raises(ImageFileError, match=r"mask\.png is 6x4, its image is 8x4"):
        check_conditioning_size(path, image_size(path), (8, 4))


def test_gamma_is_a_gamma():
    """White and black stay: the power is taken of values in 0..1."""
    image = np.array([[[0, 128, 255, 7]]], dtype=np.uint8)
    changed = change_color(image, ColorChange(gamma=1.05))
    assert changed[0, 0].tolist() == [0, round(255 * (128 / 255) ** 1.05), 255, 7]


def test_hue():
    red = np.array([[[255, 0, 0]]], dtype=np.uint8)
    assert change_color(red, ColorChange(hue=60.0))[0, 0].tolist() == [0, 255, 0]  # 60 steps of 2 degrees
    assert np.array_equal(change_color(PICTURE, ColorChange()), PICTURE)


def test_colour_changes_are_drawn_from_the_generator():
    drawn = [draw_color_change(random.Random(seed)) for seed in range(3000)]
    changes = [change for change in drawn if change]
    assert abs(len(changes) / len(drawn) - COLOR_PROBABILITY) < 0.03
    hues, gammas = [c.hue for c in changes if c.gamma == 1], [c.gamma for c in changes if c.gamma != 1]
    assert 0.4 < len(hues) / len(changes) < 0.6
    assert max(map(abs, hues)) <= 8 and 0.95 <= min(gammas) and max(gammas) <= 1.05


@pytest.mark.parametrize("random_crop", [False, True])
def test_face_crop_lies_inside_and_holds_the_face(random_crop):
    face = face_numbers("x_300_200_300_240.png")
    assert face == (300, 200, 300, 240) and face_numbers("a_b_c_d_e.png") is None
    scales = []
    for seed in range(200):
        crop = face_crop_geometry(
            (1000, 600), (256, 256), face, (1.5, 2.5), random.Random(seed), random_crop=random_crop
        )
        left, top = crop.offset
        assert 0 <= left <= crop.resized[0] - 256 and 0 <= top <= crop.resized[1] - 256
        scale = crop.resized[0] / 1000
        scales.append(scale)
        assert 1.49 <= 256 / (300 * scale) <= 2.51 and crop.resized[1] >= 256
        if not random_crop:
            assert left <= 300 * scale <= left + 256 and top <= 200 * scale <= top + 256
    assert max(scales) - min(scales) > 0.1
    small = face_crop_geometry((100, 50), (256, 256), face, (1.0, 3.0), random.Random(0), random_crop=random_crop)
    assert small.resized == (512, 256)  # covers the target, no larger


# ---- files of any kind -----------------------------------------------------------------------------------------------


def with_long_text(path, kind: str):
    """A picture with 3 MB of packed text, as programs that keep their whole workflow in it write."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if kind == "iTXt":
        info.add_itxt("workflow", "ab" * (3 << 19), zip=True)
    else:
        info.add_text("workflow", "ab" * (3 << 19), zip=True)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("kind", ["iTXt", "zTXt"])
def test_long_texts_in_a_picture(tmp_path, kind: str):
    from PIL import PngImagePlugin

    from library.generation.picture_files import read_texts
    from library.generation.gen_img.sources import lines_of_pictures, open_picture

    path = with_long_text(tmp_path / "a.png", kind)
    readers = {
        "size": lambda: image_size(path) == (8, 6), "check": lambda: verify_image(path).size == (8, 6),
        "pixels": lambda: decode_image(path).shape == (6, 8, 3),
        "texts": lambda: len(read_texts(path)["workflow"]) == 3 << 20,
        "source": lambda: open_picture(path, "RGB", "image_path").size == (8, 6),
    }  # fmt: skip
    for name, reads in readers.items():
        PngImagePlugin.MAX_TEXT_CHUNK = 1 << 20  # as at the start of a process
        assert reads(), name
    PngImagePlugin.MAX_TEXT_CHUNK = 1 << 20
    with pytest.raises(ConfigError, match="holds none either"):
        lines_of_pictures([path])


def test_what_is_no_file_in_the_place_of_a_picture(tmp_path):
    (tmp_path / "folder.png").mkdir()
    names = ["folder.png", "none.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        names.append("pipe.png")
    for name in names:
        for read in (image_size, verify_image, decode_image):
            with pytest.raises(ImageFileError, match=name):
                read(tmp_path / name)
