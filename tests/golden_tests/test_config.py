"""Dataset configurations and what they resolve to."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from library.config_util import load_blueprint
from library.core.options import add_options, read_options
from library.dataset import CachingOptions, DatasetOptions
from library.dataset.architectures import ARCHITECTURES, DataArchitecture
from tests.golden_dir import behaviour, behaviour_cases


def architecture_of(script: str) -> DataArchitecture:
    """The family that a script trains, by the beginning of its name."""
    return next((ARCHITECTURES[name] for name in ARCHITECTURES if script.startswith(f"{name}_")), ARCHITECTURES["sd"])


def blueprint_of(argv: list[str], config: Path | None, script: str = "train_network"):
    """Parse a command line as a script does and resolve the configuration. Options of other groups are passed over."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, DatasetOptions)
    add_options(parser, CachingOptions)
    given = [*argv, "--dataset_config", str(config)] if config else argv
    values = vars(parser.parse_known_args(given)[0])
    return load_blueprint(
        read_options(values, DatasetOptions), read_options(values, CachingOptions),
        explicit=frozenset(values), architecture=architecture_of(script), script=script,
    )


def write_config(folder: Path, case: dict) -> Path:
    path = folder / f"dataset.{case['input'].get('format', 'toml')}"
    path.write_text(case["input"]["text"], encoding="utf-8")
    return path


def plain(value):
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def assert_datasets(blueprint, expected: list[dict]) -> None:
    assert len(blueprint.datasets) == len(expected)
    for params, wanted in zip(blueprint.datasets, expected):
        assert params.kind == wanted["kind"]
        assert {name: plain(getattr(params, name)) for name in wanted["params"]} == wanted["params"]
        assert len(params.subsets) == len(wanted["subsets"])
        for subset, wanted_subset in zip(params.subsets, wanted["subsets"]):
            got = {name: plain(getattr(subset, name)) for name in wanted_subset}
            if got.get("image_dir"):
                got["image_dir"] = got["image_dir"].replace(os.sep, "/")
            assert got == wanted_subset


@pytest.mark.parametrize("case", behaviour_cases("config.json", "valid"))
def test_file_and_command_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blueprint = blueprint_of(
        case["input"].get("argv", []), write_config(tmp_path, case), case["input"].get("script", "train_network")
    )
    assert blueprint.used_config_file
    assert_datasets(blueprint, case["expected"]["datasets"])


@pytest.mark.parametrize("case", behaviour_cases("config.json", "folders"))
def test_folders(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in case["input"]["files"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    blueprint = blueprint_of(case["input"]["argv"], None, case["input"].get("script", "train_network"))
    assert not blueprint.used_config_file
    assert_datasets(blueprint, case["expected"]["datasets"])


def test_defaults(tmp_path):
    config = tmp_path / "dataset.toml"
    config.write_text('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n')
    (dataset,) = blueprint_of([], config).datasets
    (subset,) = dataset.subsets
    defaults = behaviour("config.json")["defaults"]
    for name in set(defaults) - {"resolution", "image_dir"}:
        record = dataset if hasattr(dataset, name) else subset
        assert plain(getattr(record, name)) == defaults[name], name
