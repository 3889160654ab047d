"""The data of a run: the kinds of dataset that its script takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.core.options import Config
from library.dataset.architectures import ARCHITECTURES
from library.dataset.plan import requests_of_epoch
from library.families.registry import FAMILIES, script_name
from library.training import checks, data_phase, trainer_base
from library.training.accelerator_setup import prepare_runtime
from library.training.option_groups import SHARED_GROUPS
from library.training.parser_common import parse
from library.training.trainables.network import NetworkTrainable
from library.training.wiring.flux import FluxFamily
from tests.library.dataset.images import make_folder, make_group
from tests.library.dataset.small_family import SmallTextCaching, SmallTextEncoder, small_strategies
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
    monkeypatch.setattr(trainer_base, "find_data", lambda config, architecture, script, limit=None: asked.append(script))
    monkeypatch.setattr(data_phase, "find_data", lambda config, architecture, script, limit=None: asked.append(script))
    options = config(tmp_path)
    with pytest.raises(ConfigError):
        trainer_base.Trainer(options, FluxFamily(options), ControlNetLike(options)).check()
    checks.all_problems(options, FluxFamily, ControlNetLike)
    assert asked == ["flux_train_control_net"] * 2


@pytest.mark.parametrize(
    ("trained", "kept", "cached"),
    [
        ([True, False], [True, False], {"t5_out", "txt_ids", "t5_attn_mask"}),
        ([False, True], [False, True], {"l_pooled", "txt_ids", "t5_attn_mask"}),
        ([False, False], [], {"l_pooled", "t5_out", "txt_ids", "t5_attn_mask"}),
    ],
)
def test_any_text_encoder_may_learn_beside_a_cache_of_the_others(tmp_path: Path, trained, kept, cached) -> None:
    """It stays, its keys are not cached, and captions become tokens where one stays."""
    group, caching = make_group(make_folder(tmp_path, 2, sizes=((64, 64),)), batch_size=2), SmallTextCaching(False)
    caching.trained = trained
    strategies, encoders = small_strategies(text=caching), [SmallTextEncoder(), SmallTextEncoder()]
    runtime = prepare_runtime(Config.read({}, SHARED_GROUPS))
    data = data_phase.DataGroups(group, None)
    phase = data_phase.prepare_text(data, strategies, runtime, load=lambda: encoders, encode_prompts=None)
    assert [encoder is not None for encoder in phase.text_encoders] == kept
    assert all(set(item.text_encoder_outputs) == cached for item in group.items)
    request = next(iter(requests_of_epoch(group.plan(1, 0, 1), epoch=1, first_step=0, rank=0, num_processes=1)))
    batch = group.load(request)
    assert set(batch.conditioning) == cached and (batch.input_ids_list is not None) == bool(kept)
    if kept == [False, True]:
        made = strategies.encode(phase.text_encoders, batch.input_ids_list)
        assert "l_pooled" not in made and set(batch.conditioning | made) == set(caching.layout.names)


def test_names_of_scripts() -> None:
    root = Path(__file__).resolve().parents[3]
    assert {f"{script_name(family)}.py" for family in FAMILIES} == {
        path.name for path in root.glob("*train_network.py")
    }


def test_sheets_of_samples_are_drawn_where_there_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(tmp_path)
    found = data_phase.find_data(options, ARCHITECTURES["flux"])
    data = data_phase.group_data(options, found, ARCHITECTURES["flux"], 5)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    data.show(5, None)
    assert not list(empty.iterdir())
    data.show(5, str(tmp_path / "out"))
    assert (tmp_path / "out" / "dataset.png").is_file()
