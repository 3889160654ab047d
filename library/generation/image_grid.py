"""Several pictures in one, with captions: what a user looks at first after a sampling occasion."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (250, 250, 248)
INK = (30, 30, 34)
MARGIN_PX = 12
MAX_CAPTION_LINES = 3


@dataclass(frozen=True)
class GridCell:
    """One picture and the text below it."""

    image: Image.Image
    caption: str = ""


def image_grid(
    cells: Sequence[GridCell], *, columns: int | None = None, title: str = "", row_titles: Sequence[str] = (),
    min_cell_px: int = 192
) -> Image.Image:
    """All cells on one sheet, row by row; `columns` defaults to a sheet that is about as wide as high. `row_titles`: a
    line above each row.

    Small pictures are enlarged by a whole factor up to about `min_cell_px`, so that captions stay readable. Pictures of
    different sizes share cells of the largest size. Raises ValueError without cells.
    """
    if not cells:
        raise ValueError("a grid needs at least one picture")
    columns = columns or math.ceil(math.sqrt(len(cells)))
    pictures = [_enlarged(cell.image.convert("RGB"), min_cell_px) for cell in cells]
    cell_width = max(picture.width for picture in pictures)
    picture_height = max(picture.height for picture in pictures)
    font = _font(max(11, min(20, cell_width // 18)))
    captions = [_wrapped(cell.caption, font, cell_width) for cell in cells]
    caption_height = max((_text_height(text, font) for text in captions), default=0) + MARGIN_PX // 2
    title_height = _text_height(title, font) + MARGIN_PX if title else 0
    rows, width = math.ceil(len(cells) / columns), columns * (cell_width + MARGIN_PX) + MARGIN_PX
    row_titles = [_wrapped(text, font, width - 2 * MARGIN_PX) for text in row_titles]
    row_title_height = max((_text_height(text, font) for text in row_titles), default=0)
    row_height = row_title_height + picture_height + caption_height + MARGIN_PX
    sheet = Image.new("RGB", (width, title_height + rows * row_height + MARGIN_PX), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN_PX, MARGIN_PX // 2), title, fill=INK, font=font)
    for number, (picture, caption) in enumerate(zip(pictures, captions)):
        row, column = divmod(number, columns)
        left = MARGIN_PX + column * (cell_width + MARGIN_PX)
        top = MARGIN_PX + title_height + row * row_height + row_title_height
        if column == 0 and row < len(row_titles):
            draw.multiline_text((left, top - row_title_height), row_titles[row], fill=INK, font=font, spacing=2)
        sheet.paste(picture, (left + (cell_width - picture.width) // 2, top + (picture_height - picture.height) // 2))
        draw.multiline_text((left, top + picture_height + 3), caption, fill=INK, font=font, spacing=2)
    return sheet


def _enlarged(image: Image.Image, min_side_px: int) -> Image.Image:
    factor = max(1, min_side_px // max(image.size))
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; older versions have it in one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width_px: int) -> str:
    """At most MAX_CAPTION_LINES lines that fit the width; what is cut off is marked."""
    letter_px = max(1.0, font.getlength("abcdefghij nopqrstuvw") / 21)
    letters = max(8, int(width_px / letter_px))
    lines = textwrap.wrap(" ".join(text.split()), letters, max_lines=MAX_CAPTION_LINES, placeholder=" ...")
    return "\n".join(lines)


def _text_height(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    if not text:
        return 0
    top, bottom = font.getbbox("Ag")[1::2]
    return (int(bottom - top) + 6) * (text.count("\n") + 1)
