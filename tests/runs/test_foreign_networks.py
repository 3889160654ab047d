"""Network modules of other packages: their arguments are looked at before models are loaded."""

import sys
from pathlib import Path

import pytest

from tests.runs.families import Tinies, refused_run

MODULE = '''
from networks.lora import create_network as make

CALLS = []


def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    CALLS.append(type(unet).__name__)
    print("making a network")
    if "always" in __file__:
        next(p for p in unet.parameters() if p.shape[0] > 8)
    if int(kwargs.get("rank", "1")) < 1:
        raise ValueError("rank must be at least 1")
    if type(unet).__name__ == "Flux":
        return make(multiplier, network_dim, network_alpha, vae, text_encoder, unet)
'''


@pytest.fixture(scope="module")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


def argv_of(tinies: Tinies, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *pairs: str) -> list[str]:
    (folder / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    work = tinies.work("flux", folder)
    return [*work.argv("out", "--max_train_steps=1"), f"--network_module={name}", "--network_args", *pairs]


def test_a_bad_argument_is_told_before_models_are_loaded(tinies, tmp_path, monkeypatch, capsys):
    argv = argv_of(tinies, tmp_path, "own_network", monkeypatch, "rank=0")
    message = refused_run("flux", argv, monkeypatch, capsys)
    assert "--network_args" in message and "rank=0" in message and "rank must be at least 1" in message


def test_a_module_that_needs_the_model_is_asked_later(tinies, tmp_path, monkeypatch, capsys):
    """What it cannot make of a stand-in, with or without arguments, is no problem of the arguments."""
    import importlib

    from library.training import cli

    cli.run("flux", "network", argv_of(tinies, tmp_path, "always_network", monkeypatch, "rank=2"))
    assert importlib.import_module("always_network").CALLS[-1] == "Flux"
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert capsys.readouterr().out.count("making a network") == 1


def test_arguments_of_lycoris(tinies, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lycoris")
    work = tinies.work("sd", tmp_path)
    bad = ["--network_module=lycoris.kohya", "--network_args", "algo=lora", "conv_dim=many"]
    message = refused_run("sd", [*work.argv("out"), *bad], monkeypatch, capsys)
    assert "conv_dim=many" in message and "lycoris.kohya" in message
