"""One picture of how samples change over a run: a row per prompt, a column per occasion, growing as the run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from library.generation.image_grid import GridCell, image_grid
from library.generation.picture_files import read_texts, write_picture

CELL_PX = 256
MAX_COLUMNS = 24
"""columns of a sheet; of more occasions the first, the last and those evenly between are shown"""


@dataclass
class SampleSheet:
    """Small copies of all samples by occasion (optimizer steps done, label) and number of the prompt."""

    occasions: dict[tuple[int, str], dict[int, Image.Image]] = field(default_factory=dict)
    guides: Mapping[int, Image.Image] = field(default_factory=dict)
    """control pictures that the samples follow, by number of the prompt: the first column"""

    def add(self, step: int, label: str, pictures: Mapping[int, Image.Image]) -> None:
        """The pictures of one occasion, by number of their prompt."""
        self.occasions[step, label] = {number: _small(image) for number, image in pictures.items()}

    def read_folder(self, folder: Path, output_name: str | None, last_step: int) -> None:
        """Take up the pictures of the first `last_step` steps that an earlier part of the run has left, by their texts.
        Of two at the same place the newer one."""
        begin = re.escape(f"{output_name}_") if output_name else ""
        name = re.compile(rf"{begin}e?\d{{6}}_\d\d_.*\.png")
        paths = [path for path in folder.glob("*.png") if name.fullmatch(path.name)] if folder.is_dir() else []
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            texts = read_texts(path)
            step, label, number = (texts.get(key, "") for key in ("step", "occasion", "number"))
            if step.isdecimal() and number.isdecimal() and label and int(step) <= last_step:
                with Image.open(path) as image:
                    self.occasions.setdefault((int(step), label), {})[int(number)] = _small(image)

    def write(self, path: Path, captions: Mapping[int, str], title: str) -> None:
        """Draw the sheet; nothing without pictures. `captions`: number of a prompt -> text above its row."""
        if not self.occasions:
            return
        columns = spread(sorted(self.occasions), MAX_COLUMNS)
        numbers = sorted({number for column in columns for number in self.occasions[column]})
        shown = [(label, self.occasions[step, label]) for step, label in columns]
        if self.guides:
            shown = [("control picture", {number: _small(guide) for number, guide in self.guides.items()}), *shown]
        cells = [
            GridCell(pictures.get(number) or _blank(), label) for number in numbers for label, pictures in shown
        ]
        rows = [f"{number}: {captions.get(number, '')}" for number in numbers]
        write_picture(image_grid(cells, columns=len(shown), title=title, row_titles=rows), path)


def spread(items: list, most: int) -> list:
    """At most `most` of the items: the first, the last and those evenly between."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _small(image: Image.Image) -> Image.Image:
    copy = image.convert("RGB")
    copy.thumbnail((CELL_PX, CELL_PX))
    return copy


def _blank() -> Image.Image:
    """In place of a picture that could not be made."""
    return Image.new("RGB", (CELL_PX, CELL_PX), (225, 225, 222))
