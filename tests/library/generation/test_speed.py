"""How denoisers of image and video scripts compute: every script, on a tiny model of its family."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from library import fp8_optimization_utils
from library.core.errors import ConfigError
from library.core.options import Config
from library.generation import speed
from library.generation.flux_options import InferenceModelOptions
from library.generation.gen_img.options import GenerationModelOptions
from library.generation.speed_options import SpeedOptions
from library.generation.wan_options import WanModelOptions
from tests.library.generation.tiny_scripts import SCRIPTS, TRANSFORMERS, VIDEOS, build, made


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    return functools.cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


def in_halves(name: str) -> list[str]:
    """The words that ask for bfloat16."""
    if name == "sd3":
        return ["--bf16"]
    return ["--dit_dtype=bfloat16"] if name in VIDEOS else ["--dtype=bfloat16"]


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


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).std() / second.std())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_matrices_in_8_bits_multiply_as_the_options_say(name, tinies, tmp_path, caplog):
    ways = {
        "plain": [], "scaled": ["--fp8_scaled"], "fast": ["--fp8_scaled", "--fp8_fast"],
        "closer": ["--fp8_scaled", "--upcast_linear", "--upcast_quantization"],
        "idle": ["--upcast_linear", "--fp8_fast"],
    }  # fmt: skip
    told, pictures = {}, {}
    for way, words in ways.items():
        caplog.clear()
        with caplog.at_level("INFO"):
            pictures[way] = made(name, tinies(name), tmp_path / way, *in_halves(name), *words)
        told[way] = caplog.text
    assert torch.equal(pictures["idle"], pictures["plain"])
    for option in ("fp8_fast", "upcast_linear"):
        assert f"--{option} has no effect without --fp8_scaled" in told["idle"]
    for way in ("scaled", "fast", "closer"):
        assert 0 < distance(pictures[way], pictures["plain"]) < 0.3, way
    assert not torch.equal(pictures["fast"], pictures["scaled"])
    assert not torch.equal(pictures["closer"], pictures["scaled"])
    layers = int(re.search(r"--upcast_linear: (\d+) layers of the denoiser", told["closer"])[1])
    assert layers >= 4 and "--upcast_quantization: weights become 8 bits in float32 in any case" in told["closer"]


@pytest.mark.parametrize("name", ["sdxl", "gen_img"])
def test_a_u_net_refuses_what_is_for_weights_in_8_bits(name, tinies, tmp_path):
    with pytest.raises(ConfigError) as caught:
        made(name, tinies(name), tmp_path, "--upcast_linear", "--upcast_quantization")
    assert [problem.split()[0] for problem in caught.value.problems] == ["--upcast_linear", "--upcast_quantization"]


def test_what_the_device_lacks_is_refused(tinies, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_optimization_utils, "can_multiply_fp8", lambda device: False)
    for name in ("flux", "wan"):
        with pytest.raises(ConfigError, match="--fp8_fast multiplies in 8 bits, which the CPU cannot"):
            made(name, tinies(name), tmp_path, "--fp8_scaled", "--fp8_fast")
