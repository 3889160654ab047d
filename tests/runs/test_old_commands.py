"""What known scripts and front ends accept, starts: each row of old command lines and configuration files that once
ended here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.core.registry import import_target
from library.families.registry import FAMILIES
from tests.runs.conftest import losses_of
from tests.runs.families import FamilyWork, Tinies


@pytest.fixture(scope="module")
def works(tmp_path_factory) -> dict[str, FamilyWork]:
    tinies = Tinies(tmp_path_factory)
    return {family: tinies.work(family, tmp_path_factory.mktemp(f"old_{family}")) for family in FAMILIES}


STORED_SMALL = ("Linear", "Conv2d")
"""kinds of layers whose weights --fp8_base stores in 8 bits; norms and embeddings stay"""


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_eight_bit_storage_of_a_unet_trains_close_to_16_bits(works, family: str, monkeypatch) -> None:
    """8 bits have 3 bits of mantissa: each weight is off by 1/16 at most, the loss by a few percent."""
    work, kinds = works[family], {}
    family_class = import_target(FAMILIES[family].family)
    load = family_class.load_denoiser

    def loading(self, runtime):
        denoiser = load(self, runtime)
        for module in denoiser.modules():
            weight = getattr(module, "weight", None)
            if weight is not None:
                kinds.setdefault(type(module).__name__, set()).add(weight.dtype)
        return denoiser

    monkeypatch.setattr(family_class, "load_denoiser", loading)
    options = ["--mixed_precision=bf16", "--max_train_steps=3", "--network_args", "conv_dim=2"]
    plain = losses_of(work.train("wide", *options))
    assert torch.float8_e4m3fn not in set().union(*kinds.values())
    kinds.clear()
    small = losses_of(work.train("small", "--fp8_base", *options))
    assert {kind: types for kind, types in kinds.items() if torch.float8_e4m3fn in types} == {
        kind: {torch.float8_e4m3fn} for kind in STORED_SMALL
    }
    assert small == pytest.approx(plain, rel=0.05) and small != plain


def test_prompts_that_a_front_end_left_empty_make_no_samples(works, capsys) -> None:
    work = works["flux"]
    (work.folder / "prompt.txt").write_text("\n", encoding="utf-8")
    work.train(
        "empty", "--max_train_steps=1", "--sample_every_n_steps=1", f"--sample_prompts={work.folder / 'prompt.txt'}"
    )
    told = capsys.readouterr().err
    assert told.count("holds no prompt: no sample images are made") == 1 and "Traceback" not in told
    assert not list(Path(work.folder / "empty").glob("sample/*"))


@pytest.mark.parametrize(
    "family, options, refused",
    [
        ("sd", "--unet_lr=1 --learning_rate=1 --text_encoder_lr 0.5", True),
        ("sd", "--unet_lr=1 --learning_rate=1 --text_encoder_lr 1", False),
        ("sd", "--unet_lr=1 --text_encoder_lr 0.5 --network_train_unet_only", False),
        ("anima", "--unet_lr=1 --learning_rate=1", False),
        ("sdxl", "--unet_lr=1 --text_encoder_lr 1 0.5", True),
    ],
)
def test_rates_that_an_optimizer_refuses_in_its_first_step_are_named_at_start(
    works, family: str, options: str, refused: bool
) -> None:
    trainer = works[family].trainer("rates", "--optimizer_type=prodigy", *options.split())
    if not refused:
        trainer.trainable.check(trainer.family)
        return
    with pytest.raises(ConfigError, match="Prodigy takes one learning rate for all parts.* 0.5 and 1.0"):
        trainer.trainable.check(trainer.family)


def test_lycoris_on_8_bit_weights_is_named_at_start(works) -> None:
    trainer = works["sd"].trainer("lycoris", "--network_module=lycoris.kohya", "--mixed_precision=bf16", "--fp8_base")
    with pytest.raises(ConfigError, match="computes in the number format of the base's weights"):
        trainer.trainable.check(trainer.family)
