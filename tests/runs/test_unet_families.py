"""Stable Diffusion 1, 2 and SDXL through the real command line: same command same bytes, resume exact, the loss falls."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training import cli
from tests.runs.conftest import draw_pictures, fingerprint, read_parts
from tests.runs.test_exactness import Stopped, stop_after
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


def test_the_same_command_writes_the_same_bytes_and_a_resumed_run_too(tiny: TinySd, tmp_path: Path) -> None:
    first = train(tiny, tmp_path, "first", "--save_every_n_steps=2", "--save_state")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(tiny, tmp_path, "parts", "--save_every_n_steps=2", "--save_state")
    state = tmp_path / "parts" / "lora-step00000002-state"
    resumed = train(tiny, tmp_path, "parts", "--save_every_n_steps=2", "--save_state", f"--resume={state}")
    again = train(tiny, tmp_path, "again", "--save_every_n_steps=2", "--save_state")
    assert fingerprint(first) == fingerprint(again) == fingerprint(resumed)
    metadata = read_parts(first)[0]
    assert metadata["ss_base_model_version"] == VERSIONS[tiny.kind]
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_the_loss_falls(tiny: TinySd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One noise level and one picture: what is left is the picture, which can be learned."""
    from library.training import loop

    losses: list[float] = []
    original = loop.micro_step

    def noting(run, batch):
        output = original(run, batch)
        losses.append(float(output.loss_sum / max(output.count, 1)))
        return output

    monkeypatch.setattr(loop, "micro_step", noting)
    more = ["--max_train_steps=24", "--v_parameterization", "--min_timestep=960", "--max_timestep=961", "--network_dim=16"]
    train(tiny, tmp_path, "out", *more, "--cache_latents", "--network_train_unet_only")
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses


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


def test_a_layer_that_the_text_encoder_has_not_is_refused_at_start(tiny: TinySd, tmp_path: Path) -> None:
    from library.errors import ConfigError

    if tiny.kind == "sdxl":
        pytest.skip("SDXL takes fixed layers")
    with pytest.raises(ConfigError, match="--clip_skip is 3; .* has 2 layers in use"):
        train(tiny, tmp_path, "out", "--clip_skip=3")
    assert train(tiny, tmp_path, "out", "--clip_skip=2", "--max_train_steps=1").is_file()


def test_where_samples_differ_from_those_of_known_trainers_is_told(tiny: TinySd, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    more = ["--max_train_steps=1", "--console_log_level=INFO", "--network_train_unet_only"]
    train(tiny, tmp_path, "without", *more)
    assert "clipped" not in caplog.text
    train(tiny, tmp_path, "with", *more, f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    assert "ddim: predicted latents are not clipped" in caplog.text


def test_sample_prompts_may_be_long_and_weighted(tiny: TinySd, tmp_path: Path) -> None:
    """Whatever --max_token_length and --weighted_captions say of captions."""
    from PIL import Image

    long = "red cat " * 45
    texts = ["red cat", "(red:1.9) cat", long + "dog", long + "photo", "red cat --n " + long + "blue"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{text} --w 64 --h 64 --s 2 --d 1 --l 9\n" for text in texts), encoding="utf-8")
    train(tiny, tmp_path, "out", "--max_train_steps=1", "--network_train_unet_only", f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    pictures = [Image.open(path).tobytes() for path in sorted((tmp_path / "out" / "sample").glob("lora_000001_0*.png"))]
    assert len(pictures) == len(set(pictures)) == len(texts)
