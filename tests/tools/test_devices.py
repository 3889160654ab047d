"""--device of every tool and script that has it: a device that is not there, or none at all, is one message at start."""

from __future__ import annotations

import pytest
import torch

from library import anima_inference
from library.device_utils import device_problem
from tools import extract_lora, merge_lora, merge_models, resize_lora

TOOLS = {
    "resize_lora": (resize_lora, ["--model", "a.safetensors", "--save_to", "b.safetensors"]),
    "merge_lora": (merge_lora, ["--models", "a.safetensors", "--save_to", "b.safetensors"]),
    "extract_lora": (extract_lora, ["--model_org", "a.safetensors", "--model_tuned", "a.safetensors", "--save_to", "b.safetensors"]),
    "merge_models": (merge_models, ["--models", "a.safetensors", "--output", "b.safetensors"]),
    "anima_minimal_inference": (anima_inference, ["--prompt", "x"]),
}
DEVICES = ["gpu", "cuda:77", "meta", "", "cpu:x", "cuda:-1", "é"] + ([] if torch.cuda.is_available() else ["cuda", "cuda:0"])


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
    assert problem.startswith("--device is 'cuda:77', which is not there; here there are: ") and problem.endswith("built without CUDA")
    assert device_problem("device", "cpu") is None and device_problem("device", None) is None
