"""--debug_dataset."""

from __future__ import annotations

from PIL import Image

from library.dataset.debug import debug_dataset
from library.dataset.items import SubsetParams
from tests.library.dataset.images import make_folder, make_group
from tests.library.dataset.small_family import small_strategies


def test_every_sample_is_described_and_drawn(tmp_path):
    group = make_group(make_folder(tmp_path / "images", 5, SubsetParams(num_repeats=2, flip_aug=True)))
    group.set_strategies(small_strategies())
    lines: list[str] = []
    assert debug_dataset(group, seed=7, epochs=2, sheet=tmp_path / "out" / "sheet.png", show=lines.append) == 20
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 4 * 64 and sheet.height > 4 * 64
    text = "\n".join(lines)
    assert (
        "mirrored" in text
        and "images 2 of 64x64" in text
        and "20 samples with their captions" in text
        and "picture number 4" in text
        and "96x64 to" in text
    )
