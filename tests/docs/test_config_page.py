"""The page on dataset configurations: its examples are valid, its tables complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from library.config_util import load_blueprint
from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.clips.settings import ClipSettings
from library.dataset.clips.windows import windows_of
from library.dataset.config_schema import KEYS

PAGE = (Path(__file__).parents[2] / "docs" / "config_README-en.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("toml") + [block for block in blocks("json") if '"datasets"' in block])
def test_examples_are_valid(text, tmp_path):
    path = tmp_path / ("d.json" if text.startswith("{") else "d.toml")
    path.write_text(text, encoding="utf-8")
    options = DatasetOptions(dataset_config=path, masked_loss="conditioning_data_dir" in text)
    blueprint = load_blueprint(options, architecture=ARCHITECTURES["wan" if "video_" in text else "flux"])
    assert blueprint.datasets and not blueprint.warnings


def rows() -> dict[str, list[str]]:
    """First cells of the tables of keys -> the other cells."""
    found = {}
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for name in re.findall(r"`(\w+)`", cells[0]):
                found[name] = cells[1:]
    return found


def test_clips_of_the_example_are_those_of_the_code():
    settings = {"slide": {"frame_stride": 10}, "uniform": {"frame_sample": 4}}
    for name in ("head", "chunk", "slide", "uniform", "full"):
        clips = ClipSettings(target_frames=(13, 25), frame_extraction=name, **settings.get(name, {}))
        [told] = re.findall(rf"^\| `{name}` \|[^|]*\| (?:`[^`]*`: )?([^|]*) \|$", PAGE, re.MULTILINE)
        starts: dict[int, list[int]] = {}
        for start, length in windows_of(40, clips, 4):
            starts.setdefault(length, []).append(start)
        numbers = [int(number) for number in re.findall(r"\d+", told.partition(", as")[0])]
        wanted = [0, *starts] if name == "head" else [n for length, found in starts.items() for n in (length, *found)]
        assert numbers == wanted, name


def test_every_key_has_a_row_with_its_default():
    table = rows()
    assert set(KEYS) <= set(table), set(KEYS) - set(table)
    options = DatasetOptions()
    for name, key in KEYS.items():
        default = getattr(options, key.option) if key.option else key.default
        cell = table[name][1].strip("`")
        if isinstance(default, bool):
            assert cell == str(default).lower(), name
        elif isinstance(default, (int, float)):
            assert float(cell) == default, name
        elif default:
            assert cell == (str(list(default)) if isinstance(default, tuple) else default), name


def test_levels_are_those_of_the_schema():
    for name, cells in rows().items():
        if name in KEYS and len(cells) >= 4 and re.fullmatch(r"[GDS ]+", cells[2]):
            assert cells[2].replace(" ", "") == KEYS[name].levels, name
