"""What is special to Stable Diffusion 1, 2 and SDXL, through the command line: options of families with a noise
schedule. What holds for every family is in test_families.py."""

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
    return Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 5), case=CASES[request.param])


def test_options_of_stable_diffusion_train(work: Work) -> None:
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a (red:1.3) cat --n blue --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    more = [
        "--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma=5", "--noise_offset=0.1",
        "--multires_noise_iterations=3",
        "--ip_noise_gamma=0.1", "--loss_type=huber", "--max_token_length=150", "--weighted_captions",
        "--gradient_checkpointing",
        "--max_train_steps=2", "--sample_every_n_steps=2", f"--sample_prompts={prompts}", "--network_args",
        "conv_dim=2",
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
    assert metadata["modelspec.prediction_type"] == (
        "v" if "--v_parameterization" in work.case.options() else "epsilon"
    )


def test_a_layer_that_the_text_encoder_has_not_is_refused_at_start(work: Work) -> None:
    from library.core.errors import ConfigError

    if work.case.name == "sdxl":
        pytest.skip("SDXL takes fixed layers")
    with pytest.raises(ConfigError, match="--clip_skip is 3; .* has 2 layers in use"):
        work.train("out", "--clip_skip=3")
    assert work.train("out", "--clip_skip=2", "--max_train_steps=1").is_file()


def test_where_samples_differ_from_those_of_known_trainers_is_told(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    more = ["--max_train_steps=1", "--console_log_level=INFO", "--network_train_unet_only"]
    work.train("without", *more)
    assert "clipped" not in caplog.text
    work.train("with", *more, f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    assert "ddim: predicted latents are not clipped" in caplog.text


def test_sample_prompts_may_be_long_and_weighted(work: Work) -> None:
    """Whatever --max_token_length and --weighted_captions say of captions."""
    from PIL import Image

    long = "red cat " * 45
    texts = ["red cat", "(red:1.9) cat", long + "dog", long + "photo", "red cat --n " + long + "blue"]
    prompts = work.folder / "prompts.txt"
    prompts.write_text("".join(f"{text} --w 64 --h 64 --s 2 --d 1 --l 9\n" for text in texts), encoding="utf-8")
    work.train(
        "out",
        "--max_train_steps=1",
        "--network_train_unet_only",
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=1",
    )
    pictures = [
        Image.open(path).tobytes() for path in sorted((work.folder / "out" / "sample").glob("lora_000001_0*.png"))
    ]
    assert len(pictures) == len(set(pictures)) == len(texts)
