"""What is special to Stable Diffusion 1, 2 and SDXL, through the command line: options of families with a noise schedule.
What holds for every family is in test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.safetensors_utils import read_header
from library.tiny_models import build_tiny
from tests.families import CASES
from tests.runs.conftest import Work, draw_pictures, read_parts


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Work:
    tiny = build_tiny(request.param, tmp_path / "model")
    return Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 5), CASES[request.param])


def test_options_of_stable_diffusion_train(work: Work) -> None:
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a (red:1.3) cat --n blue --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    more = [
        "--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma=5", "--noise_offset=0.1", "--multires_noise_iterations=3",
        "--ip_noise_gamma=0.1", "--loss_type=huber", "--max_token_length=150", "--weighted_captions", "--gradient_checkpointing",
        "--max_train_steps=2", "--sample_every_n_steps=2", f"--sample_prompts={prompts}", "--network_args", "conv_dim=2",
    ]  # fmt: skip
    if work.case.caches_text:
        more = ["--cache_text_encoder_outputs", "--network_train_unet_only", *more]
    else:
        more = ["--clip_skip=2", *more]
    file = work.train("out", *more)
    assert len(list((work.folder / "out" / "sample").glob("*_00_*_1.png"))) == 1
    assert any("resnets" in key or "in_layers" in key for key in read_header(file)[0])


def test_what_the_model_predicts_is_recorded(work: Work) -> None:
    metadata = read_parts(work.train("out", "--max_train_steps=1"))[0]
    assert metadata["modelspec.prediction_type"] == ("v" if "--v_parameterization" in work.case.options() else "epsilon")
