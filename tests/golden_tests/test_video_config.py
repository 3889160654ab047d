"""Dataset configurations in the form of the known video tool: datasets without subsets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from library.config_util import Blueprint, DatasetConfigError, load_blueprint
from library.dataset import DatasetOptions
from library.dataset.clips.settings import ClipSettings, OneFrameSettings
from library.dataset.items import DatasetParams
from tests.golden_dir import behaviour, behaviour_cases
from tests.golden_tests.test_config import plain, write_config
from tests.golden_tests.video_architectures import ARCHITECTURES

FIELDS = {"image_directory": "image_dir", "fp_latent_window_size": "window_size"}
STRIDE = 4


def read(case: dict, folder: Path) -> Blueprint:
    for name in re.findall(r'[\w/]+\.jsonl', case["input"]["text"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    options = DatasetOptions(dataset_config=write_config(folder, case))
    return load_blueprint(options, architecture=ARCHITECTURES[case["input"]["architecture"]])


def setting(dataset: DatasetParams, name: str) -> Any:
    [subset] = dataset.subsets
    owners = (subset.clips or ClipSettings(), subset.one_frame or OneFrameSettings(), subset, dataset)
    name = FIELDS.get(name, name)
    return plain(next(getattr(owner, name) for owner in owners if hasattr(owner, name)))


def in_effect(dataset: DatasetParams, name: str) -> Any:
    [subset] = dataset.subsets
    if name == "cache_directory":
        return subset.cache_directory or subset.image_dir or subset.video_directory
    if name == "bucket_no_upscale":
        return dataset.bucket_no_upscale and dataset.enable_bucket
    return plain(getattr(subset.clips.in_effect(STRIDE), name))


def test_defaults(tmp_path):
    for kind, defaults in behaviour("video_config.json")["defaults"].items():
        case = {"input": {"text": f'[[datasets]]\n{kind}_directory = "x"\n', "architecture": "wan"}}
        [dataset] = read(case, tmp_path).datasets
        for name, value in {**defaults, f"{kind}_directory": "x"}.items():
            assert setting(dataset, name) == value, name


@pytest.mark.parametrize("case", behaviour_cases("video_config.json", "cases"))
def test_a_file(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets = read(case, tmp_path).datasets
    assert len(datasets) == len(case["expected"]["datasets"])
    for dataset, wanted in zip(datasets, case["expected"]["datasets"]):
        assert ("video" if dataset.subsets[0].clips else "image") == wanted["kind"]
        found = {name: setting(dataset, name) for name in wanted["params"]}
        assert found == wanted["params"] and isinstance(found.get("source_fps"), (float, type(None)))
        assert {name: in_effect(dataset, name) for name in wanted["effective"]} == wanted["effective"]


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("case", behaviour_cases("video_config_invalid.json", "cases"))
def test_every_error_is_reported(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetConfigError) as caught:
        read(case, tmp_path)
    left = list(caught.value.errors)
    for wanted in case["expected"]["errors"]:
        fitting = [error for error in left if error.path in as_list(wanted["path"])]
        assert fitting or wanted.get("optional"), (wanted, str(caught.value))
        for error in fitting[:1]:
            assert error.kind in as_list(wanted["kind"])
            assert error.nearest == wanted.get("nearest", error.nearest)
            assert str(error).startswith(error.path)
            left.remove(error)
    assert not left, left
