"""Faulty dataset configurations: every error is found, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from library.config_util import DatasetConfigError
from tests.golden_dir import behaviour_cases
from tests.golden_tests.test_config import blueprint_of, write_config


def make_folders(folder: Path, text: str) -> None:
    """The folders named in a configuration, with one image each."""
    for name in re.findall(r'(?:_dir|_dirs)"?\s*[=:]\s*"([^"]+)"', text):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / name / "1.png")


@pytest.mark.parametrize("case", behaviour_cases("config_invalid.json"))
def test_every_error_is_reported(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folders(tmp_path, case["input"]["text"])
    with pytest.raises(DatasetConfigError) as caught:
        blueprint_of(
            case["input"].get("argv", []), write_config(tmp_path, case), case["input"].get("script", "train_network")
        )
    found = {error.path: error for error in caught.value.errors}
    assert len(found) == len(caught.value.errors)
    expected = {error["path"]: error for error in case["expected"]["errors"]}
    required = {path for path, error in expected.items() if not error.get("optional")}
    assert required <= set(found) <= set(expected), caught.value
    for path, error in found.items():
        kinds = expected[path]["kind"]
        assert error.kind in ([kinds] if isinstance(kinds, str) else kinds)
        if "nearest" in expected[path]:
            assert error.nearest == expected[path]["nearest"]
        assert error.key in error.path and str(error).startswith(error.path)
