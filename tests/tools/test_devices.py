"""--device of every tool and script that has it: a device that is not there, or none at all, is one message at
start."""

from __future__ import annotations

import pytest
import torch

from library import device_utils
from library.device_utils import can_compute, device_problem, format_problem
from library.generation import (
    anima_inference,
    flux_inference,
    hunyuan_image_inference,
    lumina_inference,
    sdxl_inference,
)
from library.generation.gen_img import script as unet_inference
from tests.runs.families import Tinies, refused_run
from tools import extract_lora, merge_lora, merge_models, resize_lora

TOOLS = {
    "resize_lora": (resize_lora, ["--model", "a.safetensors", "--save_to", "b.safetensors"]),
    "merge_lora": (merge_lora, ["--models", "a.safetensors", "--save_to", "b.safetensors"]),
    "extract_lora": (
        extract_lora,
        ["--model_org", "a.safetensors", "--model_tuned", "a.safetensors", "--save_to", "b.safetensors"],
    ),
    "merge_models": (merge_models, ["--models", "a.safetensors", "--output", "b.safetensors"]),
    "anima_minimal_inference": (anima_inference, ["--prompt", "x"]),
    "lumina_minimal_inference": (lumina_inference, ["--prompt", "x"]),
    "hunyuan_image_minimal_inference": (hunyuan_image_inference, ["--prompt", "x"]),
}
DEVICES = ["gpu", "cuda:77", "meta", "", "cpu:x", "cuda:-1", "é"] + (
    [] if torch.cuda.is_available() else ["cuda", "cuda:0"]
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_device_that_is_not_there(tool: str, device: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module, argv = TOOLS[tool]
    try:
        code = module.main([*argv, f"--device={device}"])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and f"--device is '{device}'" in error and "cpu" in error and "Traceback" not in error


def test_the_message_tells_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = device_problem("device", "cuda:77")
    assert problem.startswith("--device is 'cuda:77', which is not there; here there are: ") and problem.endswith(
        "built without CUDA"
    )
    assert device_problem("device", "cpu") is None and device_problem("device", None) is None


SCRIPTS = {
    "flux": (
        flux_inference,
        ["--prompt=x", "--flux_dtype=fp8"],
        ["--dtype asks for bfloat16", "--flux_dtype asks for float8_e4m3fn"],
    ),
    "anima": (
        anima_inference,
        ["--prompt=x", "--save_path=out", "--fp8_scaled"],
        ["--dtype bfloat16 asks", "--fp8_scaled asks for float8_e4m3fn"],
    ),
    "lumina": (
        lumina_inference,
        ["--prompt=x", "--dtype=fp8"],
        ["--dtype fp8 asks for float8_e4m3fn", "--ae_dtype bf16 asks for bfloat16"],
    ),
    "hunyuan_image": (
        hunyuan_image_inference,
        ["--prompt=x", "--save_path=out", "--fp8"],
        ["--dtype bfloat16 asks", "--fp8 asks for float8_e4m3fn"],
    ),
    "sdxl": (sdxl_inference, ["--prompt=x", "--dtype=bf16"], ["--dtype bf16 asks for bfloat16"]),
    "gen_img": (unet_inference, ["--prompt=x", "--bf16"], ["--bf16 asks for bfloat16"]),
}


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with float32 and float16 alone."""
    monkeypatch.setattr(device_utils, "can_compute", lambda device, dtype: dtype in (torch.float32, torch.float16))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_tell_formats_that_the_device_lacks(script: str, old_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module, argv, told = SCRIPTS[script]
    with pytest.raises(SystemExit) as ended:
        module.main(argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error
    assert all(part in error for part in told), error


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_training_tells_formats_that_the_device_lacks(
    family: str, old_gpu, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    work = Tinies(tmp_path_factory).work(family, tmp_path)
    told = refused_run(family, work.argv("out", "--mixed_precision=bf16", "--fp8_base"), monkeypatch, capsys)
    assert "--mixed_precision bf16 asks for bfloat16" in told and "--fp8_base asks for float8_e4m3fn" in told


def test_what_the_cpu_computes_with():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert all(can_compute(cpu, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn))
    assert not can_compute(meta, torch.bfloat16)  # holds no values
    assert (
        format_problem("--dtype", "bfloat16", "cpu", "") is None
        and format_problem("--dtype", "bfloat16", "no device", "") is None
    )


def test_a_format_that_the_device_imitates_is_a_warning(monkeypatch):
    from library.core.options import Config
    from library.training.computing_options import PrecisionOptions
    from library.training.device_checks import precision_warnings

    monkeypatch.setattr(device_utils, "get_preferred_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    (line,) = precision_warnings(Config.read({"mixed_precision": "bf16"}, (PrecisionOptions,)))
    assert "Tesla T4" in line and "fp16" in line
    assert precision_warnings(Config.read({"mixed_precision": "fp16"}, (PrecisionOptions,))) == []
