"""Several pictures on one sheet."""

import pytest
from PIL import Image

from library.generation.image_grid import BACKGROUND, GridCell, image_grid


def test_every_picture_is_on_the_sheet_in_order():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    sheet = image_grid(
        [GridCell(Image.new("RGB", (64, 64), c), f"picture {i}") for i, c in enumerate(colours)], columns=2
    )
    found = {colour: None for colour in colours}
    for y in range(sheet.height):
        for x in range(sheet.width):
            pixel = sheet.getpixel((x, y))
            if pixel in found and found[pixel] is None:
                found[pixel] = (x, y)
    red, green, blue = (found[c] for c in colours)
    assert red[1] == green[1] < blue[1] and red[0] == blue[0] < green[0]
    assert sheet.getpixel((1, 1)) == BACKGROUND


def test_small_pictures_are_enlarged_and_captions_and_title_take_room():
    plain = image_grid([GridCell(Image.new("RGB", (64, 64)))])
    assert plain.width > 192
    with_words = image_grid([GridCell(Image.new("RGB", (64, 64)), "a caption " * 40)], title="samples")
    assert with_words.width == plain.width and with_words.height > plain.height + 40


def test_a_grid_needs_a_picture():
    with pytest.raises(ValueError):
        image_grid([])
