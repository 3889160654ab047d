"""Trained weights that the precision of the files cannot hold: named before anything is written, or bounded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.core.errors import TrainingError
from tests.runs.conftest import Work


@pytest.mark.parametrize("module", ["lora", "lycoris"])
def test_save_precision(work: Work, module: str) -> None:
    if module == "lycoris":
        pytest.importorskip("lycoris")
    words = [f"--network_module={module}", "--max_train_steps=1", "--learning_rate=1e-9", "--network_train_unet_only"]
    start = load_file(work.train("start", *words))
    large = next(key for key in start if key.endswith("lora_down.weight"))
    start[large] = start[large].float()
    start[large][0, 0] = 1e5  # up is zero, so that nothing else is large
    save_file(start, work.folder / "large.safetensors")
    words += [f"--network_weights={work.folder / 'large.safetensors'}", "--save_precision=fp16"]
    with pytest.raises(TrainingError) as caught:
        work.train("refused", *words)
    assert "too large for --save_precision fp16" in str(caught.value) and large.partition(".")[0] in str(caught.value)
    assert "--clamp_overflow" in str(caught.value) and not (work.folder / "refused" / "lora.safetensors").exists()
    saved = load_file(work.train("bounded", *words, "--clamp_overflow"))
    assert saved[large].dtype == torch.float16 and float(saved[large][0, 0]) == 65504
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    alpha = saved[large.replace("lora_down.weight", "alpha")]
    assert alpha.dtype == torch.float32
