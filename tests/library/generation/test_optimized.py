"""--optimized fills what is left out, by device and packages, and says what it did."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from library import fp8_optimization_utils
from library.core.errors import ConfigError
from library.core.options import Config
from library.generation import (
    anima_options,
    flux_options,
    framepack_options,
    hunyuan_image_options,
    hunyuan_video_options,
    lumina_options,
    optimized,
    sd3_options,
    sdxl_options,
    wan_options,
)
from library.generation.gen_img.script import CLASSES
from library.generation.optimized import choose
from library.generation.picture_files import read_texts
from library.generation.recorded_requests import ENTRY
from library.safetensors_utils import save_file_atomic
from library.training import compilation
from tests.library.generation import tiny_scripts
from tests.library.generation.tiny_scripts import build, made, script_of, words

ATTENTION, EIGHT, SUMS = {"attn_mode": "sageattn"}, {"fp8_scaled": True}, {"fp16_accumulation": True}
FAST = {**EIGHT, "fp8_fast": True}
BUNDLES = {
    "flux": (flux_options.GROUPS, {"dtype": "float16"}, {**ATTENTION, **FAST, **SUMS}),
    "sd3": (sd3_options.GROUPS, {"fp16": True}, {**ATTENTION, **FAST, **SUMS}),
    "anima": (anima_options.GROUPS, {}, {**ATTENTION, **FAST}),
    "lumina": (lumina_options.GROUPS, {}, {**ATTENTION, **FAST}),
    "hunyuan_image": (hunyuan_image_options.GROUPS, {"dtype": "fp16"}, {**ATTENTION, **FAST, **SUMS}),
    "sdxl": (sdxl_options.GROUPS, {}, {**ATTENTION, **SUMS}),
    "hunyuan_video": (hunyuan_video_options.GROUPS, {}, {**ATTENTION, "compile": True, **FAST}),
    "framepack": (framepack_options.GROUPS, {"dit_dtype": "half"}, {**ATTENTION, "compile": True, **FAST, **SUMS}),
    "wan": (wan_options.GROUPS, {}, {**ATTENTION, "compile": True, **EIGHT}),
    "gen_img": (CLASSES, {"fp16": True}, SUMS),
    "gen_img of SDXL": (CLASSES, {"sdxl": True, "bf16": True}, ATTENTION),
}
"""script -> its groups, options, what is set on a GPU that can all of it"""


@pytest.fixture
def gpu(monkeypatch):
    """A machine that has all."""
    monkeypatch.setattr(optimized, "device_of", lambda config: torch.device("cuda"))
    monkeypatch.setattr(optimized, "can_compute", lambda device, dtype: True)
    monkeypatch.setattr(optimized, "described", lambda device: "the GPU")
    monkeypatch.setattr(optimized, "fp16_sums_lack", lambda device: None)
    monkeypatch.setattr(fp8_optimization_utils, "can_multiply_fp8", lambda device: True)
    monkeypatch.setattr(compilation, "backend_problems", lambda backend, option: [])
    find = importlib.util.find_spec
    sage = "sageattention"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name if name == sage else find(name, *a))


def chosen(name: str, **given: object) -> optimized.Chosen:
    groups, options, _ = BUNDLES[name]
    return choose(Config.read({**options, **given}, groups), groups)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_machine_that_has_all_sets_what_the_script_has(name, gpu):
    found = chosen(name)
    assert found.values == BUNDLES[name][2]
    assert found.line.startswith("--optimized sets --") and "left as given" not in found.line
    assert ("left out" in found.line) == (name not in ("flux", "sd3", "hunyuan_image", "sdxl", "framepack"))


GIVEN = [
    ({"attn_mode": "torch"}, ("attn_mode",), "left as given: --attn_mode"),
    ({"compile": False}, ("compile",), "left as given: --compile"),
    ({"fp8": True}, ("fp8_scaled", "fp8_fast"), "left as given: --fp8; left out: --fp8_fast (weights are not in"),
    ({"fp8_scaled": False}, ("fp8_scaled", "fp8_fast"), "left as given: --fp8_scaled"),
    ({"fp8_scaled": True}, ("fp8_scaled",), "left as given: --fp8_scaled"),
    ({"upcast_linear": True}, ("fp8_fast",), "left as given: --upcast_linear"),
    ({"fp16_accumulation": False}, ("fp16_accumulation",), "left as given: --fp16_accumulation"),
    ({"mixed_precision_transformer": True}, ("attn_mode", "fp8_scaled", "fp8_fast"), "the file says what they are"),
    ({"lycoris": True, "lora_weight": ["a"]}, ("fp8_scaled", "fp8_fast"), "--lycoris needs whole weights"),
    ({"save_merged_model": "a", "lora_weight": ["a"]}, ("fp8_scaled", "fp8_fast"), "writes whole weights"),
    ({"dit_dtype": "float32"}, ("attn_mode", "fp16_accumulation"), "takes numbers of 16 bits alone"),
]


@pytest.mark.parametrize(("given", "without", "told"), GIVEN)
def test_what_is_given_stays_and_what_does_not_go_with_it_is_left_out(given, without, told, gpu):
    whole = BUNDLES["framepack"][2]
    found = chosen("framepack", **given)
    assert found.values == {name: value for name, value in whole.items() if name not in without}
    assert told in found.line


def test_what_the_machine_lacks_is_left_out_with_the_reason(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(compilation, "backend_problems", lambda backend, option: ["--compile_backend is x"])
    monkeypatch.setattr(optimized, "fp16_sums_lack", lambda device: "PyTorch is 2.6; needed: 2.7 or later")
    monkeypatch.setattr(fp8_optimization_utils, "can_multiply_fp8", lambda device: False)
    found = chosen("framepack")
    assert found.values == EIGHT and found.line == (
        "--optimized sets --fp8_scaled; left out: --attn_mode sageattn (the package sageattention is not installed);"
        " --compile (--compile_backend is x); --fp8_fast (the GPU does not multiply 8-bit numbers);"
        " --fp16_accumulation (PyTorch is 2.6; needed: 2.7 or later)"
    )
    save_file_atomic({"a.weight": torch.zeros(2, 2).to(torch.float8_e5m2)}, tmp_path / "e5m2.safetensors")
    found = chosen("framepack", dit=str(tmp_path / "e5m2.safetensors"))
    assert found.values == {} and "has weights in 8 bits of another kind" in found.line
    monkeypatch.setattr(optimized, "can_compute", lambda device, dtype: False)
    assert chosen("framepack").values == {} and "the GPU has no 8-bit numbers" in chosen("framepack").line


@pytest.mark.parametrize("name", tiny_scripts.SCRIPTS)
def test_on_the_cpu_nothing_is_set_and_a_line_says_so(name, tmp_path, caplog):
    tiny = build(name, tmp_path / "tiny")
    with caplog.at_level("INFO"):
        found = made(name, tiny, tmp_path / "optimized", "--optimized")
    assert "--optimized sets nothing: " in caplog.text and "the device is cpu" in caplog.text
    assert torch.equal(found, made(name, tiny, tmp_path / "plain"))


def test_a_run_is_that_of_what_was_set_and_records_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(optimized, "device_of", lambda config: torch.device("cuda"))
    monkeypatch.setattr(optimized, "can_compute", lambda device, dtype: True)
    monkeypatch.setattr(fp8_optimization_utils, "can_multiply_fp8", lambda device: True)
    tiny = build("flux", tmp_path / "tiny")
    with caplog.at_level("INFO"):
        (path,) = script_of("flux").run(words("flux", tiny, tmp_path / "a", "--dtype=bfloat16", "--optimized"))
    assert "--optimized sets --fp8_scaled, --fp8_fast; left out: --attn_mode sageattn (the package" in caplog.text
    (same,) = script_of("flux").run(
        words("flux", tiny, tmp_path / "b", "--dtype=bfloat16", "--fp8_scaled", "--fp8_fast")
    )
    assert same.read_bytes() == path.read_bytes()
    recorded = json.loads(read_texts(path)[ENTRY])["options"]
    assert "optimized" not in recorded and recorded["fp8_scaled"] and recorded["fp8_fast"]
    (again,) = script_of("flux").run([f"--from_metadata={path}", f"--output_dir={tmp_path / 'c'}"])
    assert again.read_bytes() == path.read_bytes()
    (kept,) = script_of("flux").run(
        [f"--from_metadata={path}", "--optimized", "--fp8_fast=false", f"--output_dir={tmp_path / 'd'}"]
    )
    assert not json.loads(read_texts(kept)[ENTRY])["options"]["fp8_fast"]


def test_heads_that_are_too_wide_are_told_at_start(tmp_path):
    with pytest.raises(ConfigError, match="heads of Stable Diffusion 1 are wider"):
        made("gen_img", build("gen_img", tmp_path / "tiny"), tmp_path, "--attn_mode=sageattn")
