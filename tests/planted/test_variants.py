"""An option of a script chooses another record: the variant's class, metadata and caches, in the same script."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from library.core.errors import ConfigError
from library.core.options import option
from library.families.record import CacheNames
from library.families.registry import record_of, script_name, script_of_kind
from library.generation import flux_inference
from library.generation.flux_inference import FluxScript
from library.generation.flux_options import GROUPS, InferenceModelOptions
from library.training import cache_tools, parser_common
from library.training.wiring.flux import FluxFamily, FluxOptions
from tests.planted import plant
from tests.runs.conftest import read_parts
from tests.runs.families import Tinies


@dataclass(frozen=True, kw_only=True)
class SecondOptions(FluxOptions):
    """The second"""

    model_type: str = option("second", help="which of the models", choices=("flux", "second"))


@dataclass(frozen=True, kw_only=True)
class SecondModelOptions(InferenceModelOptions):
    """Models of the second"""

    model_type: str = option("second", help="which of the models", choices=("flux", "second"))
    shade: str = option("pale", help="what it has alone")


class SecondScript(FluxScript):
    family, title = "second", "The second"
    adapters = SecondModelOptions
    groups = tuple(SecondModelOptions if group is InferenceModelOptions else group for group in GROUPS)

    def load(self, config):
        from library.generation.flux_pipeline import load_pipeline

        return load_pipeline(config[SecondModelOptions])

    def check(self, config):
        if config[SecondModelOptions].shade == "none":
            raise ConfigError("the second needs a shade")


SECOND_SCRIPT = SecondScript()
RECORD = dataclasses.replace(
    record_of("flux"), name="second", prefix="", family="tests.planted.test_variants:SecondFamily",
    image_script="tests.planted.test_variants:SECOND_SCRIPT", variant_of=("flux", "model_type", "second"),
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


def test_it_paints_in_the_image_script_of_its_family(second, tmp_path, capsys):
    from tests.library.test_flux_inference import arguments
    from tests.tiny import build_tiny_flux

    tiny = build_tiny_flux(tmp_path / "tiny")
    words = arguments(tiny, tmp_path / "out")
    own, (made,) = flux_inference.run(words), flux_inference.run([*words, "--model_type=second", "--shade=deep"])
    assert own[0].is_file() and made.is_file()
    with pytest.raises(ConfigError, match="the second needs a shade"):
        flux_inference.run([*words, "--model_type", "second", "--shade=none"])
    with pytest.raises(SystemExit):
        flux_inference.main(["--model_type=second", "--help"])
    shown = capsys.readouterr().out
    assert "Make images with The second" in shown and "--shade" in shown
    with pytest.raises(SystemExit):
        flux_inference.main(["--help"])
    assert "--shade" not in capsys.readouterr().out


def test_without_an_image_script_of_its_own_the_family_says_what_it_has(monkeypatch, tmp_path):
    plant(monkeypatch, dataclasses.replace(RECORD, image_script=""))
    assert flux_inference.SCRIPT.chosen(["--model_type=second"]) is flux_inference.SCRIPT


def test_messages_name_the_script_with_its_option(monkeypatch):
    kinds = (dataclasses.replace(record_of("flux").model_kinds[0], name="second"),)
    plant(monkeypatch, dataclasses.replace(RECORD, model_kinds=kinds))
    assert script_of_kind("second") == "flux_train_network.py --model_type second"
    assert script_of_kind("second", for_pictures=True) == "flux_minimal_inference.py --model_type second"
    assert script_of_kind("flux") == "flux_train_network.py"
