"""How denoisers of image and video scripts compute: every script, on a tiny model of its family."""

from __future__ import annotations

import functools

import pytest
import torch

from library.core.options import Config
from library.generation import speed
from library.generation.flux_options import InferenceModelOptions
from library.generation.gen_img.options import GenerationModelOptions
from library.generation.speed_options import SpeedOptions
from library.generation.wan_options import WanModelOptions
from tests.library.generation.tiny_scripts import SCRIPTS, build, made


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    return functools.cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_sums_of_float16_last_for_one_run_and_tell_where_they_have_no_effect(name, tinies, tmp_path, caplog):
    tiny, switches = tinies(name), torch.backends.cuda.matmul
    with caplog.at_level("INFO"):
        summed = made(name, tiny, tmp_path / "summed", "--fp16_accumulation")
    assert switches.allow_fp16_accumulation
    assert "--fp16_accumulation has no effect: the device is cpu" in caplog.text
    assert torch.equal(made(name, tiny, tmp_path / "plain"), summed)
    assert not switches.allow_fp16_accumulation


def test_sums_of_float16_need_a_denoiser_in_float16(monkeypatch):
    monkeypatch.setattr(speed, "fp16_sums_lack", lambda device: None)

    def told(group: type, **given: object) -> list[str]:
        groups = {group: group(**given), SpeedOptions: SpeedOptions(fp16_accumulation=True)}
        return speed.speed_notices(Config(groups, given))

    assert told(WanModelOptions, dit_dtype="half") == [] == told(GenerationModelOptions, fp16=True)
    assert told(InferenceModelOptions, dtype="fp8", flux_dtype="float16") == []
    (line,) = told(InferenceModelOptions, dtype="float16", flux_dtype="fp8")
    assert line.endswith("on the denoiser: --flux_dtype is fp8; needed: --flux_dtype float16")
    (line,) = told(WanModelOptions)
    assert line.endswith("--dit_dtype is bfloat16; needed: --dit_dtype float16")
    (line,) = told(GenerationModelOptions)
    assert line.endswith("neither --fp16 nor --bf16 is given; needed: --fp16")
