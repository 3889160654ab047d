"""How denoisers of image and video scripts compute: every script, on a tiny model of its family."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library import fp8_optimization_utils
from library.core.attention_modes import ATTENTION_MODES
from library.core.errors import ConfigError
from library.core.options import Config
from library.generation import speed, wan_inference
from library.generation.flux_options import InferenceModelOptions
from library.generation.gen_img.options import GenerationModelOptions
from library.generation.speed_options import SpeedOptions
from library.generation.wan_options import WanModelOptions
from library.safetensors_utils import read_header, save_file_atomic
from tests.library.generation.tiny_scripts import (
    SCRIPTS,
    TRANSFORMERS,
    VIDEOS,
    build,
    denoiser_file,
    made,
    rewritten,
    with_denoiser,
)

ROOT = Path(__file__).parents[3]


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


REFUSED = ["--upcast_linear", "--upcast_quantization", "--mixed_precision_transformer"]


@pytest.mark.parametrize("name", ["sdxl", "gen_img"])
def test_a_u_net_refuses_what_is_for_transformers(name, tinies, tmp_path):
    with pytest.raises(ConfigError) as caught:
        made(name, tinies(name), tmp_path, *REFUSED)
    assert [problem.split()[0] for problem in caught.value.problems] == REFUSED


def test_what_the_device_lacks_is_refused(tinies, tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_optimization_utils, "can_multiply_fp8", lambda device: False)
    for name in ("flux", "wan"):
        with pytest.raises(ConfigError, match="--fp8_fast multiplies in 8 bits, which the CPU cannot"):
            made(name, tinies(name), tmp_path, "--fp8_scaled", "--fp8_fast")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_denoiser_computes_in_the_types_of_its_file(name, tinies, tmp_path, caplog):
    tiny, mixed = tinies(name), ["--mixed_precision_transformer", *in_halves(name)]
    files = {way: tmp_path / f"{way}.safetensors" for way in ("whole", "mixed")}
    for way, path in files.items():
        rewritten(denoiser_file(name, tiny), path, torch.bfloat16, only_matrices=way == "mixed")

    def picture(way: str, *more: str) -> torch.Tensor:
        caplog.clear()
        with caplog.at_level("INFO"):
            return made(name, tiny, tmp_path / "out", with_denoiser(name, tiny, files[way]), *more)

    plain = picture("whole", *in_halves(name))
    assert torch.equal(picture("whole", *mixed), plain), "one type is what the option of the format asks for"
    kept = picture("mixed", *mixed)
    assert re.search(r"transformer: .*tensors of bfloat16.*between layers bfloat16", caplog.text)
    assert re.search(r"\d\d+ tensors of float32", caplog.text)
    exact = picture("mixed")
    assert not torch.equal(kept, plain) and not torch.equal(kept, exact)
    assert distance(kept, exact) < 0.1 and distance(kept, plain) < 0.1
    with pytest.raises(ConfigError, match="--fp8_scaled is given with --mixed_precision_transformer"):
        picture("mixed", *mixed, "--fp8_scaled")


def test_types_of_the_file_stay_beside_all_else(tinies, tmp_path, monkeypatch):
    """LoRAs, block swap, compiled blocks; a merged model is written in them."""
    tiny, path, lora = tinies("wan"), tmp_path / "mixed.safetensors", tmp_path / "lora.safetensors"
    rewritten(denoiser_file("wan", tiny), path, torch.bfloat16, only_matrices=True)
    generator = torch.Generator().manual_seed(4)
    name = "lora_unet_blocks_1_cross_attn_k"
    tensors = {f"{name}.{part}": torch.randn(size, generator=generator) / 4
               for part, size in (("lora_down.weight", (4, 48)), ("lora_up.weight", (48, 4)))}  # fmt: skip
    save_file_atomic({**tensors, f"{name}.alpha": torch.tensor(4.0)}, lora)
    mixed = [with_denoiser("wan", tiny, path), "--mixed_precision_transformer"]

    def latents(*words: str) -> torch.Tensor:
        return made("wan", tiny, tmp_path / "out", *mixed, *words)

    plain = latents()
    for same in (["--blocks_to_swap=1"], ["--compile", "--compile_backend=eager"]):
        assert torch.equal(latents(*same), plain), same
    merged, hooked = (latents(f"--lora_weight={lora}", *words) for words in ([], ["--no-merge_lora_weights"]))
    assert distance(merged, plain) > 3 * distance(merged, hooked) > 0
    target = tmp_path / "merged.safetensors"
    (file,) = wan_inference.run([*mixed, f"--lora_weight={lora}", f"--save_merged_model={target}"])
    kinds, of_file = ({name: one.dtype for name, one in read_header(one)[0].items()} for one in (file, path))
    assert kinds == {**of_file, **{name: torch.float32 for name in of_file if name.startswith("time_")}}
    assert torch.equal(made("wan", tiny, tmp_path / "out", with_denoiser("wan", tiny, file), mixed[1]), merged)


def test_attention_in_16_bits_asks_the_file(tinies, tmp_path, monkeypatch):
    halves = dataclasses.replace(ATTENTION_MODES["torch_math"], halves_only=True)
    monkeypatch.setitem(ATTENTION_MODES, "torch_math", halves)
    words = ["--mixed_precision_transformer", "--attn_mode=torch_math"]
    with pytest.raises(ConfigError, match="numbers of 16 bits alone; add a file that is mostly of 16 bits"):
        made("wan", tinies("wan"), tmp_path, *words)
    path = tmp_path / "whole.safetensors"
    rewritten(denoiser_file("wan", tinies("wan")), path, torch.bfloat16, only_matrices=False)
    made("wan", tinies("wan"), tmp_path, with_denoiser("wan", tinies("wan"), path), *words)


HELP = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name).main(["--help"])
    except SystemExit as end:
        assert not end.code, name
    assert "torch" not in sys.modules, name
"""


def test_help_of_every_script_comes_without_torch():
    names = [name for name in SCRIPTS if name not in ("chroma", "gen_img")]
    modules = ["library.generation.gen_img.script", *(f"library.generation.{name}_inference" for name in names)]
    done = subprocess.run([sys.executable, "-c", HELP, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
