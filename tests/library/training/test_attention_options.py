"""What the options of the attention come to: which of several counts, and what is told where a package is missing."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from library.components.attention_backends import KERNELS
from library.core.attention_modes import ATTENTION_MODES, MODE_NAMES, AttentionChoice, Place
from library.core.errors import ConfigError
from library.training.attention_options import ATTENTION_SWITCHES, attention_settings
from library.training.wiring.video_options import ATTENTION_SWITCHES as VIDEO_SWITCHES
from tests.runs.families import Tinies

GPU = Place("cuda", in_halves=True, training=True)
CPU = Place("cpu", in_halves=True, training=True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def settings(place: Place, switches=ATTENTION_SWITCHES, **given):
    return attention_settings(switches, given, place)


def test_the_first_of_several_counts_and_the_others_are_told(installed) -> None:
    both = {"sdpa": True, "xformers": True}
    assert settings(GPU).choice == AttentionChoice() == settings(GPU, sdpa=True).choice
    assert settings(GPU, **both).choice.mode == "xformers"
    assert settings(GPU, VIDEO_SWITCHES, **both, flash_attn=True).choice.mode == "torch"
    assert settings(GPU, VIDEO_SWITCHES, flash3=True).choice.mode == "flash3"
    chosen = settings(GPU, **both, attn_mode="flash2", split_attn=True)
    assert chosen.choice == AttentionChoice("flash", split=True) and not chosen.problems
    assert [item.written for item in chosen.idle] == ["--xformers", "--sdpa"]
    assert not settings(GPU, mem_eff_attn=True).idle
    assert settings(CPU, mem_eff_attn=True).choice.mode == "torch_efficient"


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_what_a_mode_needs_is_told_with_what_works(mode: str, installed, monkeypatch: pytest.MonkeyPatch) -> None:
    about = ATTENTION_MODES[{"sdpa": "torch", "flash2": "flash"}.get(mode, mode)]
    assert not ATTENTION_MODES[about.instead].package

    def told(place: Place) -> str:
        return " ".join(settings(place, attn_mode=mode).problems)

    assert (told(GPU) == "") == about.trains and told(replace(GPU, training=False)) == ""
    assert (told(CPU) != "") == (about.gpu_only or about.gpu_trains_only)
    wide = told(replace(GPU, in_halves=False))
    assert ("--mixed_precision bf16" in wide) == (about.halves_only and about.trains)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = told(replace(GPU, training=False))
    assert (missing != "") == bool(about.package)
    if about.package:
        assert about.package in missing and "not installed" in missing and f"--attn_mode {about.instead}" in missing


def test_a_switch_that_front_ends_write_starts_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = settings(GPU, xformers=True, split_attn=True)
    assert found.choice == AttentionChoice(split=True) and not found.problems
    assert "xformers is not installed" in found.notes[0]
    assert settings(GPU, VIDEO_SWITCHES, flash_attn=True).problems


def test_a_run_computes_as_it_is_told(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work, called, plain = Tinies(tmp_path_factory).work("sd1", tmp_path), [], KERNELS["torch_math"]
    monkeypatch.setitem(KERNELS, "torch_math", lambda *states: called.append(1) or plain(*states))
    work.train("told", "--max_train_steps=1", "--attn_mode=torch_math", "--xformers")
    assert called and "--xformers: has no effect beside --attn_mode torch_math" in caplog.text
    with pytest.raises(ConfigError, match="flash-attn is not installed.*--attn_mode torch_flash"):
        work.train("missing", "--attn_mode=flash", "--mixed_precision=bf16")
