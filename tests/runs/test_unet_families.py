"""What is special to Stable Diffusion 1, 2 and SDXL, through the real command line: options of families with a noise schedule.
What holds for every family is in test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training import cli
from tests.runs.conftest import draw_pictures, read_parts
from tests.tiny_sd import KINDS, TinySd, build_tiny_sd

DATASET = """
[[datasets]]
resolution = 64
batch_size = 2
[[datasets.subsets]]
image_dir = '{images}'
caption_extension = ".txt"
{keys}
"""
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


@pytest.fixture(scope="module", params=KINDS)
def tiny(request, tmp_path_factory) -> TinySd:
    return build_tiny_sd(tmp_path_factory.mktemp(request.param), request.param)


def train(tiny: TinySd, folder: Path, out: str, *more: str, keys: str = "flip_aug = true") -> Path:
    images = folder / "images"
    if not images.exists():
        draw_pictures(images, 5)
    data = folder / "data.toml"
    data.write_text(DATASET.format(images=images, keys=keys), encoding="utf-8")
    argv = [
        *tiny.arguments(), f"--dataset_config={data}", f"--output_dir={folder / out}", "--output_name=lora",
        "--network_module=networks.lora", "--network_dim=4", "--max_train_steps=4", "--seed=5", "--learning_rate=1e-2",
        "--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more,
    ]  # fmt: skip
    cli.run("sdxl" if tiny.kind == "sdxl" else "sd", "network", argv)
    return folder / out / "lora.safetensors"


def test_what_the_model_is_and_predicts_is_recorded(tiny: TinySd, tmp_path: Path) -> None:
    for more, ending, prediction in (([], "", "epsilon"), (["--v_parameterization"], "_v", "v")):
        metadata = read_parts(train(tiny, tmp_path, f"out{ending}", "--max_train_steps=1", *more))[0]
        version = VERSIONS[tiny.kind] + (ending if tiny.kind != "sdxl" else "")
        assert (metadata["ss_base_model_version"], metadata["modelspec.prediction_type"]) == (version, prediction)


def test_options_of_stable_diffusion_train(tiny: TinySd, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (red:1.3) cat --n blue --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    more = [
        "--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma=5", "--noise_offset=0.1", "--multires_noise_iterations=3",
        "--ip_noise_gamma=0.1", "--loss_type=huber", "--max_token_length=150", "--weighted_captions", "--gradient_checkpointing",
        "--max_train_steps=2", "--sample_every_n_steps=2", f"--sample_prompts={prompts}", "--network_args", "conv_dim=2",
    ]  # fmt: skip
    if tiny.kind == "sdxl":
        more = ["--cache_text_encoder_outputs", "--network_train_unet_only", *more]
    else:
        more = ["--clip_skip=2", *more]
    file = train(tiny, tmp_path, "out", *more)
    assert len(list((tmp_path / "out" / "sample").glob("*_00_*_1.png"))) == 1
    assert any("resnets" in key or "in_layers" in key for key in _keys(file))


def _keys(file: Path) -> list[str]:
    from library.safetensors_utils import read_header

    return list(read_header(file)[0])
