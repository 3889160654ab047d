"""An option of a script chooses another record: the variant's class, metadata and caches, in the same script."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from library.core.options import option
from library.families.record import CacheNames
from library.families.registry import record_of, script_name
from library.training import cache_tools, parser_common
from library.training.wiring.flux import FluxFamily, FluxOptions
from tests.planted import plant
from tests.runs.conftest import read_parts
from tests.runs.families import Tinies


@dataclass(frozen=True, kw_only=True)
class SecondOptions(FluxOptions):
    """The second"""

    model_type: str = option("second", help="which of the models", choices=("flux", "second"))


RECORD = dataclasses.replace(
    record_of("flux"), name="second", prefix="", family="tests.planted.test_variants:SecondFamily",
    variant_of=("flux", "model_type", "second"),
    caches=CacheNames(latents="_second.npz", text="_second_te.npz"), tiny=(),
)  # fmt: skip


class SecondFamily(FluxFamily):
    record = RECORD
    options = SecondOptions

    def latents_caching(self):
        strategy = super().latents_caching()
        strategy.architecture = self.architecture
        return strategy

    def metadata(self):
        return {"ss_base_model_version": "second"}


@pytest.fixture
def second(monkeypatch):
    plant(monkeypatch, RECORD)
    cache_tools.family_switches.cache_clear()
    yield
    cache_tools.family_switches.cache_clear()


def test_without_variants_the_family_is_itself():
    assert parser_common.chosen_variant("flux", ["--model_type", "second"]) == "flux"


@pytest.mark.parametrize(("words", "chosen"), [
    (["--model_type", "second"], "second"), (["--model-type=second"], "second"), (["--model_type", "flux"], "flux"),
    ([], "flux"),
    (["--model_type"], "flux"), (["--config_file", "FILE"], "second"),
    (["--config_file", "FILE", "--model_type=flux"], "flux"),
    (["--config_file", "no_such_file.toml"], "flux"),
])  # fmt: skip
def test_the_command_line_or_its_file_chooses(second, tmp_path, words, chosen):
    (tmp_path / "run.toml").write_text('[model]\nmodel_type = "second"\n', encoding="utf-8")
    words = [str(tmp_path / "run.toml") if word == "FILE" else word for word in words]
    assert parser_common.chosen_variant("flux", words) == chosen
    assert parser_common.chosen_variant("sd", words) == "sd"


def test_the_caching_tools_choose_it_too(second):
    assert cache_tools.chosen_family(["--family", "flux", "--model_type", "second"]) == "second"
    assert cache_tools.chosen_family(["--family", "second"]) == "second"


def test_it_trains_in_the_script_of_its_family(second, tmp_path, tmp_path_factory):
    assert script_name("second") == "flux_train_network"
    work = Tinies(tmp_path_factory).work("flux", tmp_path)
    file = work.train(
        "out", "--model_type=second", "--max_train_steps=1", "--network_train_unet_only", "--cache_latents_to_disk"
    )
    assert read_parts(file)[0]["ss_base_model_version"] == "second"
    assert list(work.images.glob("*_second.npz")) and not list(work.images.glob("*_flux.npz"))
