"""What graphical front ends write starts and trains: two steps of every panel, on tiny models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from library.safetensors_utils import read_header
from library.training import cli
from tests.presets.front_ends import CHOICES, as_it_stands, dropping, panels
from tests.runs.conftest import draw_pictures
from tests.runs.families import FamilyWork, Tinies

COUNT = 10
FAMILIES = ("sd", "sdxl", "flux")
WRITERS = (dropping, as_it_stands)
GIVEN_UP = ("shuffle_caption", "caption_dropout_rate")
"""fields that a panel gives up for cached text encoder outputs"""


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FamilyWork]:
    tinies = Tinies(tmp_path_factory)
    return {family: tinies.work(family, tmp_path_factory.mktemp(f"presets_{family}")) for family in FAMILIES}


def test_the_panels_hold_every_choice() -> None:
    for family in FAMILIES:
        found = panels(family, COUNT)
        for group in ("noise", "weights", "text", "samples", "memory", "precision"):
            for choice in CHOICES[group]:
                wanted = {name: value for name, value in choice.items() if name not in GIVEN_UP}
                assert any(panel.items() >= wanted.items() for panel in found), (family, choice)


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_preset_trains(works: dict[str, FamilyWork], family: str, number: int) -> None:
    work, writer = works[family], WRITERS[number % 2]
    folder = work.folder / f"preset{number}"
    draw_pictures(folder / "train" / "1_zorbit cat", 2)
    panel = panels(family, COUNT)[number]
    if panel["network_module"].startswith("lycoris") and importlib.util.find_spec("lycoris") is None:
        pytest.skip("the package lycoris-lora is not installed")
    files = dict(word[2:].split("=", 1) for word in work.tiny.arguments())
    panel.update(
        files,
        train_data_dir=str(folder / "train"),
        output_dir=str(folder / "out"),
        output_name="last",
        logging_dir=str(folder / "log"),
    )
    (folder / "preset.toml").write_text(writer(panel, folder / "prompt.txt"), encoding="utf-8")
    cli.run(family, "network", ["--config_file", str(folder / "preset.toml"), "--max_data_loader_n_workers=0"])
    metadata = read_header(folder / "out" / "last.safetensors")[1]
    assert metadata["ss_steps"] == "2" and not list(Path(folder / "out").glob("sample/*"))
