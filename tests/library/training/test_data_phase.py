"""The data of a run: the kinds of dataset that its script takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.dataset.architectures import ARCHITECTURES
from library.families.registry import FAMILIES, script_name
from library.training import checks, data_phase, trainer_base
from library.training.parser_common import parse
from library.training.trainables.network import NetworkTrainable
from library.training.wiring.flux import FluxFamily
from tests.runs.conftest import draw_pictures


def config(tmp_path: Path):
    images = draw_pictures(tmp_path / "images", 2)
    data = tmp_path / "d.toml"
    data.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{images}'\n", encoding="utf-8")
    return parse([f"--dataset_config={data}"], "flux", "network")


def test_the_script_decides_which_datasets_are_taken(tmp_path: Path) -> None:
    options, architecture = config(tmp_path), ARCHITECTURES["flux"]
    assert data_phase.find_data(options, architecture, "flux_train_network").scan is not None
    with pytest.raises(ConfigError, match="conditioning_data_dir"):
        data_phase.find_data(options, architecture, "flux_train_control_net")


class ControlNetLike(NetworkTrainable):
    script = "train_control_net"


def test_a_run_looks_at_its_data_as_its_own_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the usual check, and in the one that follows options which could not be read."""
    asked = []
    monkeypatch.setattr(trainer_base, "find_data", lambda config, architecture, script: asked.append(script))
    monkeypatch.setattr(data_phase, "find_data", lambda config, architecture, script: asked.append(script))
    options = config(tmp_path)
    with pytest.raises(ConfigError):
        trainer_base.Trainer(options, FluxFamily(options), ControlNetLike(options)).check()
    checks.all_problems(options, FluxFamily, ControlNetLike)
    assert asked == ["flux_train_control_net"] * 2


def test_names_of_scripts() -> None:
    root = Path(__file__).resolve().parents[3]
    assert {f"{script_name(family)}.py" for family in FAMILIES} == {path.name for path in root.glob("*train_network.py")}
