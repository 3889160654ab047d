"""What a plan predicts is what a run holds: growth of main memory on the CPU, a process per case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE

LATENTS = ["--cache_latents_to_disk"]
ALL = [*LATENTS, "--cache_text_encoder_outputs_to_disk"]
UNET, AGAIN = "--network_train_unet_only", "--gradient_checkpointing"
CASES = {
    "adapter": ("flux", "network", 512, 8, LATENTS),
    "adapter_checkpointed": ("flux", "network", 512, 16, [*LATENTS, AGAIN]),
    "whole_model": ("flux", "full", 512, 8, ALL),
    "unet": ("sd1", "network", 512, 4, []),
    "sdxl": ("sdxl", "network", 512, 8, [*ALL, UNET]),
    "sdxl_checkpointed": ("sdxl", "network", 512, 16, [*ALL, UNET, AGAIN]),
    "sdxl_whole": ("sdxl", "full", 512, 8, ALL),
    "sdxl_whole_checkpointed": ("sdxl", "full", 512, 16, [*ALL, AGAIN]),
    "sd3": ("sd3", "network", 384, 12, [*ALL, UNET]),
    "sd3_checkpointed": ("sd3", "network", 384, 24, [*ALL, UNET, AGAIN]),
    "sd3_whole": ("sd3", "full", 384, 12, ALL),
    "anima_checkpointed": ("anima", "network", 512, 16, [*ALL, UNET, AGAIN]),
    "anima_whole": ("anima", "full", 512, 8, ALL),
    "wan": ("wan", "network", 512, 8, ALL),
    "wan_checkpointed": ("wan", "network", 512, 16, [*ALL, AGAIN]),
}
"""name -> tiny set, what is trained, side of the pictures, their number, options"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the accounts of Linux")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name != "adapter_checkpointed" else []) for name in CASES]
)
def test_the_peak_is_within_a_tenth(name: str, tmp_path: Path) -> None:
    tiny, trainable, side, batch, options = CASES[name]
    # memory that is freed goes back to the system, so that what is held is what is in use
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    sizes = [str(side), str(batch)]
    words = [sys.executable, "-m", "tests.runs.plan_case", str(tmp_path), tiny, trainable, *sizes, *options]
    done = subprocess.run(
        words, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    predicted, measured = map(int, done.stdout.split()[-2:])
    assert measured > 60e6, "too little to be compared"
    assert abs(predicted - measured) < 0.1 * measured, (predicted, measured)
