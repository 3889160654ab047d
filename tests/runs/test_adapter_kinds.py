"""Kinds of adapters through the command line, by their short names: trained, written, and trained on from the file."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from library.core.errors import ConfigError
from library.training.adapters import NETWORKS, OWN_MODULES
from networks.files.network_files import by_module, read_adapter_file
from networks.kinds.registry import kind_of
from tests.runs.conftest import Work

KINDS = {
    "loha": (["--network_dim=2", "--network_args", "dora_wd=True", "rank_dropout=0.1"], "networks.loha", "lora_te1_"),
    "lokr": (["--network_dim=2", "--network_args", "factor=4", "decompose_both=True"], "networks.lokr", "lora_te1_"),
    "glora": (["--network_dim=2", "--network_args", "module_dropout=0.1"], "networks.glora", "lora_te1_"),
    "oft": (["--network_dim=4", "--network_alpha=0.01"], "networks.oft", "oft_unet_"),
    "diag_oft": (
        ["--network_dim=4", "--network_alpha=0", "--network_args", "rescaled=True"],
        "networks.diag_oft",
        "lora_unet_",
    ),
    "boft": (
        ["--network_dim=14", "--network_alpha=0", "--network_args", "enable_all_linear=True"],
        "networks.boft",
        "lora_unet_",
    ),
}
"""short name -> (options, module, start of some names in the file)"""


@pytest.mark.parametrize("name", KINDS)
def test_trained_and_trained_on(work: Work, name: str) -> None:
    options, module, start = KINDS[name]
    more = [f"--network_module={name}", "--max_train_steps=3", *options]
    path = work.train("out", *more)
    tensors = read_adapter_file(path)
    parts = by_module(tensors)
    assert any(part.startswith(start) for part in parts)
    assert {kind_of(part).name for part in parts.values()} == {KIND_NAMES.get(name, name)}
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_module"] == module
    on = work.train(
        "on",
        f"--network_module={name}",
        "--max_train_steps=1",
        "--learning_rate=1e-8",
        f"--network_weights={path}",
        "--dim_from_weights",
    )
    again = read_adapter_file(on)
    assert set(again) == set(tensors)
    assert all((again[key].float() - tensors[key].float()).abs().max() < 1e-4 for key in tensors)


KIND_NAMES = {"loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "diag_oft": "OFT", "boft": "BOFT"}
"""what a file's tensors tell; those of Diag-OFT are those of OFT"""


def test_rotations_leave_text_encoders_alone(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    """Their outputs may be cached without --network_train_unet_only; a rate for them is told to be idle."""
    path = work.train(
        "out",
        "--network_module=oft",
        "--max_train_steps=1",
        "--cache_text_encoder_outputs",
        "--text_encoder_lr",
        "1e-3",
    )
    assert all(name.startswith("oft_unet_") for name in by_module(read_adapter_file(path)))
    assert "trains the denoiser alone" in caplog.text
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        work.train("none", "--network_module=boft", "--network_train_text_encoder_only")


def test_rows_that_do_not_divide_are_told(work: Work) -> None:
    with pytest.raises(ConfigError, match="do not divide into 5 blocks"):
        work.train("out", "--network_module=oft", "--network_dim=5", "--max_train_steps=1")


def test_every_short_name_has_a_module() -> None:
    assert {*KINDS, "lora", "lycoris"} <= set(NETWORKS.names())
    assert {module for _, module, _ in KINDS.values()} <= set(OWN_MODULES)
