"""Metadata of the files that real runs write, against the recorded cases: the whole way from the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.training import cli
from tests.golden_dir import behaviour, behaviour_cases
from tests.golden_tests.test_metadata import assert_metadata, family_of
from tests.tiny import build_tiny_flux
from tests.tiny_anima import build_tiny_anima
from tests.tiny_sd import build_tiny_sd

FILE = "metadata.json"


MODELS = {"flux": build_tiny_flux, "anima": build_tiny_anima, "sdxl": lambda folder: build_tiny_sd(folder, "sdxl")}
"""family -> maker of its tiny models; Stable Diffusion by version"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny models that a case trains, made when first asked for."""
    made = {}

    def of_case(case):
        family = family_of(case["name"])
        kind = case["name"].partition("_")[0] if family == "sd" else family
        if kind not in made:
            make = MODELS.get(kind) or (lambda folder: build_tiny_sd(folder, kind))
            made[kind] = make(tmp_path_factory.mktemp(kind))
        return made[kind]

    return of_case


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw_images(root: Path, recorded) -> None:
    """The pictures of the file with their captions; what they show does not matter."""
    folder = root / recorded["image_dir"]
    folder.mkdir(parents=True)
    for image in recorded["images"]:
        width, height = image["width"], image["height"]
        path = folder / image["name"]
        Image.frombytes("RGB", (width, height), random.Random(image["name"]).randbytes(3 * width * height)).save(path)
        path.with_suffix(".txt").write_text(image["caption"], encoding="utf-8")


def run_case(case, models, root: Path, *more: str) -> Path:
    """Train as the case says; the folder with the written files."""
    recorded = behaviour(FILE)
    draw_images(root, recorded)
    dataset = root / "dataset.toml"
    dataset.write_text(recorded["dataset_toml"].replace("{ROOT}", root.as_posix()), encoding="utf-8")
    output = root / "output"
    argv = [
        *models(case).arguments(), *case["arguments"], f"--dataset_config={dataset}", f"--output_dir={output}",
        "--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more,
    ]  # fmt: skip
    cli.run(family_of(case["name"]), "network", argv)
    return output


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_files_of_a_run(case, models, tmp_path):
    output = run_case(case, models, tmp_path)
    final = metadata_of(output / f"{case['final_file']['text'].get('ss_output_name', 'last')}.safetensors")
    assert_metadata(case["final_file"], final)
    for name, expected in case["other_files"].items():
        written = metadata_of(output / f"{name}.safetensors")
        assert {key: written.get(key) for key in expected} == expected, name
        assert json.loads(written["ss_datasets"]) == json.loads(final["ss_datasets"])


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_files_of_a_run_without_metadata(case, models, tmp_path):
    output = run_case(case, models, tmp_path, "--no_metadata")
    written = sorted(output.glob("*.safetensors"))
    assert len(written) == len(case["other_files"]) + 1
    for path in written:
        keys = sorted(key for key in metadata_of(path) if key.startswith("ss_"))
        assert keys == sorted(case["no_metadata"]["exactly_these_ss_keys"]), path.name
